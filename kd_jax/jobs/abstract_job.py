"""The real train step of a command, from shapes alone: nothing is read, drawn or placed."""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, FrozenConfigDict

from kd_jax.config import require
from kd_jax.config.settings import read
from kd_jax.config.training import Training
from kd_jax.data.masking import num_slots
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import TrimmedPrepared, kept_ids, seen_by_student
from kd_jax.jobs import masked_lm
from kd_jax.jobs.cache import check as check_cache
from kd_jax.jobs.cache import resolved
from kd_jax.jobs.frozen import Frozen
from kd_jax.jobs.job import STEP_KEYS, Programs, programs
from kd_jax.jobs.teachers import check_settings, settings_for, teacher_form
from kd_jax.models.functional import Functional, flops_per_row
from kd_jax.steps.distill import make_cached_objective, make_distill_objective
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.trainer.mesh import batch_sharding, describe_shardings, row_multiple, rules_of
from kd_jax.trainer.state import with_shardings

COMMANDS = ("pretrain", "distill", "cached")


@dataclass(frozen=True)
class AbstractJob:
    """A compiled step's inputs as shapes that say where they lie.

    flops: (rows) -> those of the matrix products of a step on one device, under the sharding of the job.
    """

    block: ConfigDict  # the job's, with batch size and accumulation
    programs: Programs
    frozen: dict[str, Any]
    fields: dict[str, tuple[tuple[int, ...], Any]]  # of a batch: shape of a row, dtype
    length: int
    multiple: int  # a batch has a multiple of so many rows
    flops: Callable[[int], float]
    mesh: jax.sharding.Mesh
    tables: list[str]  # what of whom lies where

    def lower(self, rows: int) -> jax.stages.Lowered:
        """The step on a batch of so many rows."""
        sharding = batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
            for name, (shape, dtype) in self.fields.items()
        }
        return self.programs.step.lower(self.programs.abstract, self.frozen, batch)


def abstract_job(config: ConfigDict, mesh: jax.sharding.Mesh) -> AbstractJob:
    """The step of config.compile_check.command on a mesh of devices that may not be here. Raises UserError."""
    what = config.compile_check.command
    require(what in COMMANDS, "compile_check.command", f"{what!r} is unknown", f"use {', '.join(COMMANDS)}")
    prepared = _prepared(config)
    length = prepared.config["rows"]["length"]
    slots = num_slots(length, config.masking.rate)
    fields: dict[str, Any] = dict.fromkeys(("tokens", "segment_ids", "positions"), ((length,), jnp.int32))
    fields |= dict.fromkeys(("masked_positions", "masked_targets"), ((slots,), jnp.int32))
    fields["masked_weights"] = ((slots,), jnp.float32)

    def model_of(name: str) -> Functional:
        return masked_lm.encoder_model(config[name], prepared, config.compute_dtype, name)

    which = config.pretrain.model if what == "pretrain" else "student"
    block = config.pretrain if what == "pretrain" else config.distill
    read(Training, block, "pretrain" if what == "pretrain" else "distill")
    rules = rules_of(config.sharding[which], f"sharding.{which}")
    teacher_rules = rules_of(config.sharding.teacher, "sharding.teacher")
    student, teacher = model_of(which), None if what == "pretrain" else model_of("teacher")
    kept = kept_ids(prepared) if isinstance(prepared, TrimmedPrepared) and what != "pretrain" else None
    whole = () if kept is None else ("kept",)
    reads, model = Frozen(), student
    if teacher is None:
        objective, arguments = make_pretrain_objective, (student,)
    elif what == "distill":
        check_settings(config)
        settings, model = settings_for(config, student, teacher.config, teacher_form(config, prepared), cached=False)
        objective, arguments = make_distill_objective, (model, (teacher,), settings)
        reads = Frozen(teachers=(teacher,), whole=whole)
    else:
        config = resolved(config)
        check_cache(config, prepared.tokenizer.vocab_size)
        form = teacher_form(config, prepared, config.cache.format, config.cache.tail)
        settings, model = settings_for(config, student, None, form, cached=True)
        objective, arguments = make_cached_objective, (model, settings)
        reads = Frozen(decoder=teacher if form.kind == "hidden" else None, whole=whole)
        fields |= _cached_fields(config, teacher, slots)
    steps = FrozenConfigDict({key: block[key] for key in STEP_KEYS})
    compiled = programs(objective, arguments, model, steps, mesh, rules, (reads, teacher_rules))
    layout = reads.layout(mesh, teacher_rules)
    shapes = reads.abstract(whole={} if kept is None else {"kept": kept.shape})
    return AbstractJob(
        block,
        compiled,
        with_shardings(shapes, layout),
        fields,
        length,
        row_multiple(mesh) * block.accumulation,
        _flops(config, student, teacher, mesh, slots, what),
        mesh,
        [
            *describe_shardings(model.abstract(), compiled.layout["params"], "trained:"),
            *reads.describe(mesh, teacher_rules),
        ],
    )


def _prepared(config: ConfigDict) -> Prepared:
    """The data's shapes: those of config.prepared, or, without it, of the config alone."""
    if config.prepared:
        return seen_by_student(Prepared(config.prepared), config.vocabulary)
    which = "teacher" if config.compile_check.command != "pretrain" else config.pretrain.model
    size = config[which].vocab_size
    problem = "without config.prepared there is no tokenizer that says it"
    require(size > 0, f"{which}.vocab_size", problem, "give the number of pieces, or a prepared folder")
    require(not config.vocabulary.trim, "vocabulary.trim", "its size is known of a prepared folder only", "name one")
    tokenizer = types.SimpleNamespace(vocab_size=size, unk_id=0)
    return cast(Prepared, types.SimpleNamespace(tokenizer=tokenizer, config={"rows": config.rows.to_dict()}))


def _cached_fields(config: ConfigDict, teacher: Functional, slots: int) -> dict[str, Any]:
    """What a batch from a cache has beside the masked rows, in the dtypes of the cache."""
    block, dtype = config.cache, jnp.dtype(config.cache.dtype)
    if block.format == "hidden":
        return {"teacher_features": ((slots, teacher.config.hidden_size), dtype)}
    if block.format == "top_k":
        return {"teacher_ids": ((slots, block.k), jnp.int32), "teacher_log_p": ((slots, block.k), dtype)}
    return {
        "teacher_ids": ((slots, block.samples), jnp.int32),
        "teacher_weights": ((slots, block.samples), dtype),
        "teacher_entropy": ((slots,), jnp.float32),
    }


def _flops(config: ConfigDict, student: Functional, teacher: Functional | None, mesh, slots: int, what: str):
    """Rows of a step -> floating-point operations on one device. What is whole along `tensor` is computed by all of
    the devices along it."""
    length = config.rows.length
    at = slots if what == "pretrain" or config.distill.kd_positions == "masked" else None

    def share(table: ConfigDict) -> int:
        return mesh.shape["tensor"] if "tensor" in f"{table.mlp},{table.heads}" else 1

    def of(model: Functional, table: ConfigDict, training: bool) -> float:
        counted = flops_per_row(model.config, length, slots, model.config.vocab_size, training, last_layer_at=at)
        return counted / share(table)

    which = config.pretrain.model if what == "pretrain" else "student"
    each = of(student, config.sharding[which], True)
    if teacher is not None and what == "distill":
        each += of(teacher, config.sharding.teacher, False)
    elif teacher is not None and config.cache.format == "hidden":
        decoder = 2.0 * slots * teacher.config.hidden_size * teacher.config.vocab_size
        each += decoder / share(config.sharding.teacher)
    return lambda rows: each * rows / row_multiple(mesh)
