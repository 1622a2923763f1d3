"""Masked-LM pretraining from scratch, or continued from another run (which is how a teacher is adapted).

python -m kd_jax.main.pretrain --config=configs/FILE.py --workdir=DIR --config.prepared=DIR
"""

import pathlib

from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.main import command, masked_lm, trained
from kd_jax.main.training import JobPhase
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.trainer.mesh import make_mesh


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    which = config.pretrain.model
    require(which in ("teacher", "student"), "pretrain.model", f"{which!r} is unknown", "use teacher or student")
    vocabulary = ("vocabulary",) if which == "student" else ()  # a teacher has the tokenizer's
    return ("prepared", "seed", "transfer", "masking", which, "pretrain", "compute_dtype", *vocabulary)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains config.teacher or config.student (config.pretrain.model) with the masked-LM loss."""
    names = keys(config)
    which, start = config.pretrain.model, config.pretrain.init_from
    prepared = Prepared(config.prepared)
    if which == "student":
        prepared = seen_by_student(prepared, config.vocabulary)
    mesh = make_mesh(config.mesh)
    model = masked_lm.encoder_model(config[which], prepared, config.compute_dtype, which)
    if start:
        trained.check_tokenizer(start, prepared, "pretrain.init_from")
    masked_lm.train(
        config,
        workdir,
        prepared,
        mesh,
        command="pretrain",
        keys=names,
        model=model,
        phases=(JobPhase(0, make_pretrain_objective, (model,), dict),),
        init=(lambda _: trained.trained_params(start, model, mesh)) if start else None,
    )


if __name__ == "__main__":
    command.main(run, description="Masked-LM pretraining.")
