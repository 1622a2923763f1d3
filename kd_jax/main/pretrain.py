"""Masked-LM pretraining from scratch, or continued from another run (which is how a teacher is adapted).

python -m kd_jax.main.pretrain --config=configs/FILE.py --workdir=DIR --config.prepared=DIR
"""

import dataclasses
import functools
import pathlib

import jax
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.data import Masking, Transfer, Vocabulary
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.config.training import Pretrain
from kd_jax.data.batches import MaskedBatches
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import trained
from kd_jax.jobs.job import Job, Phase, train
from kd_jax.jobs.masked_lm import encoder_model, heldout_evaluation, transfer_set_of
from kd_jax.losses.tiling import has_kernels
from kd_jax.main import command
from kd_jax.models.attention_kernels import find_kernel
from kd_jax.models.encoder_config import EncoderConfig, encoder_config
from kd_jax.models.functional import Functional
from kd_jax.steps.objective import Objective
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.trainer.mesh import make_mesh

# Fields of an encoder that may change when training goes on: how it is initialized, regularized and laid out.
_FREE = ("initializer_range", "dropout", "attention_dropout", "scan", "remat")


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    which = config.pretrain.model
    require(which in ("teacher", "student"), "pretrain.model", f"{which!r} is unknown", "use teacher or student")
    vocabulary = ("vocabulary",) if which == "student" else ()  # a teacher has the tokenizer's
    return ("prepared", "seed", "transfer", "masking", which, "pretrain", "compute_dtype", *vocabulary, "train_body")


def work(config: ConfigDict, workdir: pathlib.Path) -> command.Work:
    """Trains config.teacher or config.student (config.pretrain.model), or its head alone, with the masked-LM loss."""
    pretrain, execution = read(Pretrain, config.pretrain, "pretrain"), read_execution(config)
    masking, transfer = read(Masking, config.masking, "masking"), read(Transfer, config.transfer, "transfer")
    which, start = pretrain.model, pretrain.init_from
    prepared = Prepared(config.prepared)
    if which == "student":
        prepared = seen_by_student(prepared, read(Vocabulary, config.vocabulary, "vocabulary"))
    mesh = make_mesh(execution.mesh)
    kernel = find_kernel(execution.attention, mesh)
    model = encoder_model(config[which], prepared, config.compute_dtype, which, kernel)
    if start:
        trained.check_tokenizer(start, prepared, "pretrain.init_from")
        check_shape(model.config, start, prepared, which)
    rules = getattr(execution.sharding, which)
    fused = has_kernels(execution.logits, mesh)
    objective = make_pretrain_objective(model, fused)
    if not config.train_body:
        objective = make_head_objective(model, fused)
        pretrain = dataclasses.replace(pretrain, weight_decay=0.0)  # decay would move the frozen encoder
    transfer_set = transfer_set_of(transfer, prepared, config.seed)
    job = Job(
        settings=pretrain,
        seed=config.seed,
        model=model,
        phases=(Phase(0, objective),),
        batches=MaskedBatches(transfer_set.stores, transfer_set, masking, prepared.tokenizer, pretrain.batch_size),
        evaluate=heldout_evaluation(model, prepared, masking, mesh, pretrain, workdir),
        init=(lambda _: trained.trained_params(start, model, mesh, rules=rules)) if start else None,
        rules=rules,
        notes={
            "tokenizer_fingerprint": prepared.tokenizer.fingerprint,
            "realized": transfer_set.describe(pretrain.steps * pretrain.batch_size),
        },
    )
    return lambda directory: train(job, directory, mesh, execution)


def check_shape(shape: EncoderConfig, start: str, prepared: Prepared, which: str) -> None:
    """Raises UserError where config.teacher or config.student computes something else than the model it starts from."""
    saved = encoder_config(trained.encoder_block(start, "pretrain.init_from"), prepared.tokenizer.vocab_size)
    for field in dataclasses.fields(shape):
        mine, theirs = getattr(shape, field.name), getattr(saved, field.name)
        require(
            mine == theirs or field.name in _FREE or not shape.reads(field.name),
            f"{which}.{field.name}",
            f"it is {mine!r}, and {start}, which the run starts from, has {theirs!r}",
            f"set it to {theirs!r}, or start from another run",
        )


@functools.cache
def make_head_objective(model: Functional, fused: bool = False) -> Objective:
    """The masked-LM objective as a function of the head alone; a frozen encoder has no dropout."""
    whole = make_pretrain_objective(model, fused)

    def loss(params, frozen, batch, key, scales, progress):
        del key
        frozen_encoder = {**params, "encoder": jax.lax.stop_gradient(params["encoder"])}
        return whole.loss(frozen_encoder, frozen, batch, None, scales, progress)  # type: ignore[arg-type]

    return dataclasses.replace(whole, loss=loss)


COMMAND = command.Command("pretrain", "Masked-LM pretraining.", keys, work)
run = COMMAND.run

if __name__ == "__main__":
    COMMAND.main()
