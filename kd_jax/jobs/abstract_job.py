"""The real train step of a command, from shapes alone: nothing is read, drawn or placed."""

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.commands import CompileCheck
from kd_jax.config.data import Cache, Masking, Rows, States, Vocabulary
from kd_jax.config.execution import Execution, Rules, read_execution
from kd_jax.config.settings import read
from kd_jax.config.training import Distill, Pretrain, Training
from kd_jax.data.masking import num_slots
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import TrimmedPrepared, kept_ids, seen_by_student
from kd_jax.jobs.cache import check_tokens
from kd_jax.jobs.job import compiled_step, sharding_lines, state_functions
from kd_jax.jobs.masked_lm import encoder_model
from kd_jax.jobs.teachers import (
    Teacher,
    check,
    layers_of,
    placed_shapes,
    step_settings,
    teacher_form,
    teacher_tables,
)
from kd_jax.losses.tiling import has_kernels
from kd_jax.models.attention_kernels import find_kernel
from kd_jax.models.functional import Functional, flops_per_row
from kd_jax.steps.distill import MEANS, RELATIONS, STATES, make_distill_objective, text_slots
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.trainer.mesh import batch_sharding, replicated, row_multiple
from kd_jax.trainer.state import State


@dataclass(frozen=True)
class AbstractJob:
    """A step and its inputs as shapes with shardings.

    flops(rows): floating-point operations of the matrix products of a step on one device. fields: of a batch, name ->
    (shape of a row, dtype). multiple: a batch has a multiple of this many rows. tables: sharding tables, as lines.
    """

    settings: Training
    step: Callable[..., Any]
    state: State
    constants: dict[str, Any]
    fields: dict[str, tuple[tuple[int, ...], Any]]
    length: int
    multiple: int
    flops: Callable[[int], float]
    mesh: jax.sharding.Mesh
    tables: list[str]

    def lower(self, rows: int) -> jax.stages.Lowered:
        """The step on a batch of this many rows."""
        sharding = batch_sharding(self.mesh)
        batch = {
            name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)
            for name, (shape, dtype) in self.fields.items()
        }
        return cast(Any, self.step).lower(self.state, self.constants, batch)


def abstract_job(config: ConfigDict, mesh: jax.sharding.Mesh) -> AbstractJob:
    """The step of config.compile_check.command on a mesh of devices that need not exist here. Raises UserError."""
    what = read(CompileCheck, config.compile_check, "compile_check").command
    execution, masking = read_execution(config), read(Masking, config.masking, "masking")
    settings = read(Pretrain, config.pretrain, "pretrain") if what == "pretrain" else None
    # If text is masked later, the step with the logits: it is the larger one.
    distill = read(Distill, config.distill, "distill").parts[-1][1] if what != "pretrain" else None
    vocabulary = read(Vocabulary, config.vocabulary, "vocabulary")
    which = settings.model if settings else "student"
    prepared = _prepared(config, "teacher" if distill else which, vocabulary)
    length = prepared.settings.rows.length
    slots = num_slots(length, masking.rate)
    kernel = find_kernel(execution.attention, mesh)
    fused = has_kernels(execution.logits, mesh)
    fields: dict[str, Any] = dict.fromkeys(("tokens", "segment_ids", "positions"), ((length,), jnp.int32))
    fields |= dict.fromkeys(("masked_positions", "masked_targets"), ((slots,), jnp.int32))
    fields["masked_weights"] = ((slots,), jnp.float32)

    def model_of(name: str) -> Functional:
        return encoder_model(config[name], prepared, config.compute_dtype, name, kernel)

    student = model_of(which)
    whole = {"seed": jax.ShapeDtypeStruct((), np.int32, sharding=replicated(mesh))}
    constants: dict[str, Any] = dict(whole)
    width = 0
    tables: list[str] = []
    model, teacher, cache = student, None, None
    if distill is None:
        objective = make_pretrain_objective(student, fused)
    else:
        kept = kept_ids(prepared) if isinstance(prepared, TrimmedPrepared) else None
        teacher = Teacher("", model_of("teacher"), execution.sharding.teacher, kept)
        if kept is not None:
            constants["kept"] = jax.ShapeDtypeStruct(kept.shape, np.int32, sharding=replicated(mesh))
        if what == "distill":
            if kept is not None:
                fields["teacher_tokens"] = fields["tokens"]
            check(distill, execution, "", "")
            models, shape, once = (teacher.model,), teacher.model.config, execution.sharding.teacher_once
            form = teacher_form(vocabulary, prepared)
            constants["teachers"] = (placed_shapes(teacher, mesh),)
            tables = teacher_tables([teacher], mesh)
        elif distill.clean:
            states = read(States, config.states, "states")
            models, shape, once = (), teacher.model.config, False
            width = states.components or shape.hidden_size
            form = teacher_form(vocabulary, prepared, "states", cached=True)
            pairs = layers_of("hidden", distill.hidden.layers, student.config, shape) if distill.hidden.used else ()
            kept_states = {STATES.format(layer): ((length, width), jnp.dtype(states.dtype)) for _, layer in pairs}
            if distill.sentence.used:
                kept_states[MEANS] = ((text_slots(length), width), jnp.dtype(states.dtype))
            fields |= kept_states
            relations = distill.relations
            pairs = layers_of("relations", relations.layers, student.config, shape) if relations.used else ()
            names = [RELATIONS.format(part, layer) for _, layer in pairs for part in relations.parts]
            fields |= dict.fromkeys(names, ((length, width), jnp.dtype(states.dtype)))
            if distill.center:
                center = jax.ShapeDtypeStruct((width,), jnp.float32, sharding=replicated(mesh))
                constants["centers"] = dict.fromkeys(kept_states, center)
        else:
            cache = read(Cache, config.cache, "cache")
            check_tokens(cache, prepared.tokenizer.vocab_size)
            models, shape, once = (), None, False
            form = teacher_form(vocabulary, prepared, cache.format, tail=cache.tail, cached=True)
            if form.kind == "hidden":
                constants["decoder"] = teacher.model.decoder(placed_shapes(teacher, mesh))
                tables = sharding_lines(constants["decoder"], "teacher's decoder, frozen:")
            fields |= _cached_fields(cache, teacher.model, slots)
        step, model = step_settings(distill, student, shape, form, once, width, fused)
        objective = make_distill_objective(model, models, step)
    training = settings or distill
    assert training is not None
    rules = getattr(execution.sharding, which)
    state = state_functions(model, training.of_step, mesh, rules)[2]
    return AbstractJob(
        training,
        compiled_step(objective, model, training.of_step, mesh, rules),
        state,
        constants,
        fields,
        length,
        row_multiple(mesh) * training.accumulation,
        _flops(distill, what, cache, execution, rules, student, teacher, mesh, length, slots),
        mesh,
        [*sharding_lines(state["params"], "trained:"), *tables],
    )


def _prepared(config: ConfigDict, which: str, vocabulary: Vocabulary) -> Prepared:
    """The data's shapes: those of config.prepared, or, without it, of the config alone."""
    if config.prepared:
        return seen_by_student(Prepared(config.prepared), vocabulary)
    size = config[which].vocab_size
    problem = "without config.prepared there is no tokenizer that says it"
    require(size > 0, f"{which}.vocab_size", problem, "give the number of tokens, or a prepared folder")
    require(not vocabulary.trim, "vocabulary.trim", "its size is known of a prepared folder only", "name one")
    tokenizer = types.SimpleNamespace(vocab_size=size, unk_id=0)
    settings = types.SimpleNamespace(rows=read(Rows, config.rows, "rows"))
    return cast(Prepared, types.SimpleNamespace(tokenizer=tokenizer, settings=settings))


def _cached_fields(cache: Cache, teacher: Functional, slots: int) -> dict[str, Any]:
    """What a batch from a cache has in addition to the masked rows, in the dtypes of the cache."""
    dtype = jnp.dtype(cache.dtype)
    if cache.format == "hidden":
        return {"teacher_features": ((slots, teacher.config.hidden_size), dtype)}
    if cache.format == "top_k":
        return {"teacher_ids": ((slots, cache.k), jnp.int32), "teacher_log_p": ((slots, cache.k), dtype)}
    return {
        "teacher_ids": ((slots, cache.samples), jnp.int32),
        "teacher_weights": ((slots, cache.samples), dtype),
        "teacher_entropy": ((slots,), jnp.float32),
    }


def _flops(
    distill: Distill | None,
    what: str,
    cache: Cache | None,
    execution: Execution,
    rules: Rules,
    student: Functional,
    teacher: Teacher | None,
    mesh: jax.sharding.Mesh,
    length: int,
    slots: int,
) -> Callable[[int], float]:
    """Rows of a step -> floating-point operations on one device. A dimension that is not split along `tensor` is
    computed by all of the devices on that axis."""
    at = slots if distill is None or distill.kd_positions == "masked" else None
    heads = slots
    if distill is not None and distill.clean:  # every position, and no logits
        at, heads = None, 0

    def share(rules: Rules) -> int:
        return mesh.shape["tensor"] if "tensor" in f"{rules.mlp},{rules.heads}" else 1

    def of(model: Functional, rules: Rules, training: bool) -> float:
        counted = flops_per_row(model.config, length, heads, model.config.vocab_size, training, last_layer_at=at)
        return counted / share(rules)

    each = of(student, rules, True)
    if teacher is not None and what == "distill":
        each += of(teacher.model, teacher.rules, False)
    elif teacher is not None and cache is not None and cache.format == "hidden":
        config = teacher.model.config
        each += 2.0 * slots * config.hidden_size * config.vocab_size / share(execution.sharding.teacher)
    return lambda rows: each * rows / row_multiple(mesh)
