"""Distillation of a student from a pretrained teacher over a mix of generic and task-specific text.

python -m kd_jax.main.distill --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.teacher_checkpoint=DIR
"""

import pathlib

from ml_collections import ConfigDict, FrozenConfigDict

from kd_jax.config import require
from kd_jax.data.prepared import Prepared
from kd_jax.main import command, masked_lm, trained
from kd_jax.steps.distill import make_distill_objective
from kd_jax.trainer.mesh import make_mesh

WEIGHTS = ("kl_weight", "kl_final_weight", "mlm_weight", "mlm_final_weight")
SETTINGS = ("temperature", "positions", *WEIGHTS)  # the keys of config.distill that the loss depends on


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    del config
    return ("prepared", "seed", "transfer", "masking", "student", "teacher_checkpoint", "distill", "compute_dtype")


def check_settings(config: ConfigDict) -> None:
    """Refuses impossible distillation settings before anything is read."""
    block = config.distill
    require(block.temperature > 0, "distill.temperature", f"{block.temperature} is not positive", "2.0 is usual")
    known = block.positions in ("masked", "all")
    require(known, "distill.positions", f"{block.positions!r} is unknown", "use masked or all")
    for name in WEIGHTS:
        require(block[name] >= 0, f"distill.{name}", f"{block[name]} is negative", "give 0 or more")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains config.student against the teacher of config.teacher_checkpoint."""
    check_settings(config)
    has_teacher = bool(config.teacher_checkpoint)
    require(has_teacher, "teacher_checkpoint", "it is empty", "give the workdir of a pretrain run")
    prepared = Prepared(config.prepared)
    mesh = make_mesh(config.mesh)
    student = masked_lm.encoder_model(config.student, prepared, config.compute_dtype, "student")
    block = trained.encoder_block(config.teacher_checkpoint, "teacher_checkpoint")
    teacher = masked_lm.encoder_model(block, prepared, config.compute_dtype, "teacher")
    trained.check_tokenizer(config.teacher_checkpoint, prepared, "teacher_checkpoint")
    masked_lm.train(
        config,
        workdir,
        prepared,
        mesh,
        command="distill",
        keys=keys(config),
        model=student,
        objective=make_distill_objective,
        arguments=(student, teacher, FrozenConfigDict({name: config.distill[name] for name in SETTINGS})),
        frozen={"teacher": trained.trained_params(config.teacher_checkpoint, teacher, mesh)},
    )


if __name__ == "__main__":
    command.main(run, description="Distills a student from a teacher.")
