"""Distillation at the masked-LM stage: the teacher's logits, hidden states and relations, mixed with the hard loss."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd_jax.losses.blocked import block_for, blocked_losses
from kd_jax.losses.features import hidden_distance, relation_divergence
from kd_jax.models.functional import Captured, Functional
from kd_jax.models.heads import gather_positions
from kd_jax.models.projection import WithProjections
from kd_jax.steps.objective import Objective, linear
from kd_jax.steps.teacher_logits import TeacherForm, term_sums
from kd_jax.types import Array, Batch, Params, Term

LOGIT_TERMS = ("kl", "mlm")

_FEATURES = "teacher_features_{}"  # of each teacher, where it predicts the batch of a step at once


@dataclass(frozen=True)
class Weight:
    """The factor of a term as a function of progress: see term() in kd_jax/config/base.py."""

    start: float
    end: float
    begin: float = 0.0
    finish: float = 1.0

    @property
    def used(self) -> bool:
        return self.start > 0 or self.end > 0

    def __call__(self, progress: Array) -> Array | float:
        return linear(self.start, self.end, progress, self.begin, self.finish)


@dataclass(frozen=True)
class DistillSettings:
    """What of config.distill shapes the step, resolved and hashable; layers are pairs (student's, teacher's)."""

    kl: Weight = Weight(1.0, 1.0)
    mlm: Weight = Weight(1.0, 1.0)
    hidden: Weight = Weight(0.0, 0.0)
    embeddings: Weight = Weight(0.0, 0.0)
    relations: Weight = Weight(0.0, 0.0)
    temperature: float = 2.0
    final_temperature: float = 2.0
    kd_positions: str = "masked"
    hidden_distance: Literal["cosine", "mse"] = "cosine"
    hidden_layers: tuple[tuple[int, int], ...] = ()
    embeddings_distance: Literal["cosine", "mse"] = "mse"
    relation_heads: int = 1
    relation_layers: tuple[tuple[int, int], ...] = ()
    relation_parts: tuple[str, ...] = ("query", "key", "value")
    block: int = 0
    once: bool = False  # the teacher predicts the batch of a step at once, before it is cut into micro-batches
    form: TeacherForm = field(default_factory=TeacherForm)

    def used(self) -> dict[str, Weight]:
        """The terms that are part of the loss."""
        names = ("kl", "mlm", "hidden", "embeddings", "relations")
        return {name: weight for name in names if (weight := getattr(self, name)).used}


def real_tokens(batch: Batch) -> Array:
    """float32 [R, L]: 1 where there is text, 0 on padding."""
    return (batch["segment_ids"] > 0).astype(jnp.float32)


def make_distill_objective(
    student: WithProjections, teachers: tuple[Functional, ...], settings: DistillSettings
) -> Objective:
    """KL(teacher || student) * T**2 (Hinton et al. 2015), the hard masked-LM loss, and distances of hidden states.

    frozen["teachers"] holds the parameters of each teacher, whose probabilities are averaged; frozen["kept"] int32
    [student pieces], where the student's vocabulary is trimmed, the teacher's id of each of its pieces. Logits of both
    are formed in blocks, at the masked positions only; with kd_positions "all" the KL is taken at every real token.
    Terms whose weight is 0 are not computed: without hidden, embeddings and relations no state but the last is kept.
    """
    features = settings.used().keys() - set(LOGIT_TERMS)

    def teacher_states(frozen, batch) -> tuple[Captured, ...]:
        if not (settings.kl.used or features):
            return ()
        tokens = batch["tokens"]
        theirs = {**batch, "tokens": jnp.take(frozen["kept"], tokens)} if "kept" in frozen else batch
        wanted = _wanted(settings, 1)
        return tuple(
            teacher.capture(params, theirs, **wanted, columns_RxK=columns_of(batch, settings))
            for teacher, params in zip(teachers, jax.lax.stop_gradient(frozen["teachers"]), strict=True)
        )

    def in_loss(frozen, batch) -> tuple[Captured, ...]:
        return () if settings.once else teacher_states(frozen, batch)

    def loss(params, frozen, batch, key, scales, progress):
        columns = columns_of(batch, settings)
        mine, wanted = student.student_params(params), _wanted(settings, 0)
        ours = student.student.capture(mine, batch, key, **wanted, columns_RxK=columns)
        theirs = in_loss(frozen, batch)
        total, terms = jnp.float32(0.0), {}
        if features:
            terms |= _feature_terms(student, params, ours, theirs[0], batch, settings)
            total += sum(scales[name] * terms[name][0] for name in terms)

        def teacher_side() -> dict[str, Any]:
            if settings.once:
                return {"teacher_features": tuple(batch[_FEATURES.format(number)] for number in range(len(teachers)))}
            states = zip(teachers, frozen["teachers"], theirs)
            return {"teacher_features": tuple(one.mlm_features(their, state.hidden) for one, their, state in states)}

        decoders = tuple(teacher.decoder(params) for teacher, params in zip(teachers, frozen["teachers"]))
        more = {"decoders": decoders, **({"kept": frozen["kept"]} if "kept" in frozen else {})}
        logit_loss, logit_terms = logit_losses(
            student.student,
            student.student_params(params),
            ours.hidden,
            batch,
            teacher_side,
            more,
            scales,
            progress,
            settings,
        )
        return total + logit_loss, terms | logit_terms

    def before(frozen, batch) -> dict[str, Array]:
        """The teachers' features at the masked positions, [R, K, H] each."""
        states = zip(teachers, frozen["teachers"], teacher_states(frozen, batch))
        every = (one.mlm_features(params, state.hidden) for one, params, state in states)
        return {_FEATURES.format(number): features for number, features in enumerate(every)}

    if settings.once and (features or settings.kd_positions != "masked"):
        raise ValueError("once: only what is needed at the masked positions is kept for the whole batch")
    return Objective(weights_of(settings), coefficients_of(settings), loss, before if settings.once else None)


def make_cached_objective(student: WithProjections, settings: DistillSettings) -> Objective:
    """The same from cached predictions: the batch carries what `data.teacher_cache` has, at the masked positions.

    frozen["decoder"] holds (table, bias) of the teacher's head for the form "hidden", frozen["kept"] as above. The
    terms are those on logits alone.
    """

    def loss(params, frozen, batch, key, scales, progress):
        mine = student.student_params(params)
        hidden = student.student.hidden_at(mine, batch, batch["masked_positions"], key)
        kept = {"kept": frozen["kept"]} if "kept" in frozen else {}
        more = {"decoders": (frozen["decoder"],), **kept} if settings.form.kind == "hidden" else kept
        cached = {name: batch[name] for name in settings.form.fields}
        if settings.form.kind == "hidden":
            features = cached["teacher_features"].astype(student.student.compute_dtype)
            cached = {"teacher_features": (features,)}
        return logit_losses(
            student.student,
            student.student_params(params),
            hidden,
            batch,
            lambda: cached,
            more,
            scales,
            progress,
            settings,
        )

    return Objective(weights_of(settings), coefficients_of(settings), loss)


def columns_of(batch: Batch, settings: DistillSettings) -> Array | None:
    """The masked positions, where the states of the last layer are wanted at them alone."""
    return batch["masked_positions"] if settings.kd_positions == "masked" else None


def logit_losses(
    student: Functional,
    params: Params,
    hidden: jax.Array,
    batch: Batch,
    teacher_side: Callable[[], dict[str, Any]],
    constants: dict[str, Any],
    scales,
    progress: Array,
    settings: DistillSettings,
) -> tuple[Array, dict[str, Term]]:
    """Loss and terms "kl", "mlm" and "accuracy" from the student's hidden states, [R, K, H] at the masked positions or,
    with kd_positions "all", [R, L, H]; teacher_side() gives the teacher's at the same places.
    """
    temperature = linear(settings.temperature, settings.final_temperature, progress)
    table, bias = student.decoder(params)
    if "decoders" in constants:  # narrowed here, so that a table that lies in parts is gathered in the narrow dtype
        narrow = (jnp.asarray(table).astype(hidden.dtype) for table, _ in constants["decoders"])
        biases = (bias for _, bias in constants["decoders"])
        constants = {**constants, "decoders": tuple(zip(narrow, biases))}
    constants = {**constants, "temperature": jnp.float32(temperature), "scales": {}}

    def run(states, names: tuple[str, ...], targets, weights) -> tuple[Array, dict[str, Term]]:
        per_position = {"targets": jnp.asarray(targets), "weights": weights}
        if "kl" in names:
            per_position |= teacher_side()
        here = {**constants, "scales": {name: scales[name] for name in names}}

        def of_block(logits: jax.Array, per_position_B: Any, constants: Any) -> Any:
            return term_sums(logits, per_position_B, constants, settings.form)

        block = settings.block or block_for(table.shape[0])
        features = student.mlm_features(params, states)
        total, sums = blocked_losses(of_block, features, table, bias, per_position, here, block=block)
        count = jnp.sum(weights)
        return total, {name: (value, count) for name, value in sums.items()}

    weights = jnp.asarray(batch["masked_weights"])
    names = tuple(name for name in LOGIT_TERMS if name in scales)
    if settings.kd_positions == "masked":
        return run(hidden, names, batch["masked_targets"], weights)
    at_masked = gather_positions(hidden, jnp.asarray(batch["masked_positions"]))
    total, terms = run(at_masked, tuple(set(names) - {"kl"}), batch["masked_targets"], weights)
    if "kl" in names:
        kl, kl_terms = run(hidden, ("kl",), batch["tokens"], real_tokens(batch))
        total, terms = total + kl, terms | {"kl": kl_terms["kl"]}
    return total, terms


def weights_of(settings: DistillSettings):
    """The denominators of the terms, from the masks alone."""

    def weights(batch):
        masked, real = jnp.sum(batch["masked_weights"]), jnp.sum(real_tokens(batch))
        everywhere = {"hidden", "embeddings", "relations"} | ({"kl"} if settings.kd_positions == "all" else set())
        return {name: real if name in everywhere else masked for name in settings.used()}

    return weights


def coefficients_of(settings: DistillSettings):
    """The factors of the terms as a function of progress."""
    return lambda progress: {name: weight(progress) for name, weight in settings.used().items()}


def _wanted(settings: DistillSettings, side: int) -> dict[str, Any]:
    """What to capture of the student (side 0) or the teacher (side 1)."""
    return {
        "layers": tuple(pair[side] for pair in settings.hidden_layers) if settings.hidden.used else (),
        "projections": tuple(pair[side] for pair in settings.relation_layers) if settings.relations.used else (),
        "embeddings": settings.embeddings.used,
    }


def _feature_terms(
    student: WithProjections, params: Params, ours: Captured, theirs: Captured, batch: Batch, settings: DistillSettings
) -> dict[str, Term]:
    """The terms on hidden states, each a mean over its layers (and parts) at every real token."""
    weights = real_tokens(batch)
    terms = {}

    def projected(name: str, states):
        return student.project(params, name, states) if student.has(name) else states

    if settings.hidden.used:
        pairs = [
            hidden_distance(
                projected(f"hidden_{number}", ours.layers[mine]),
                theirs.layers[other],
                weights,
                settings.hidden_distance,
            )
            for number, (mine, other) in enumerate(settings.hidden_layers)
        ]
        terms["hidden"] = _mean(pairs)
    if ours.embeddings is not None and theirs.embeddings is not None:
        states = projected("embeddings", ours.embeddings)
        terms["embeddings"] = hidden_distance(states, theirs.embeddings, weights, settings.embeddings_distance)
    if settings.relations.used:
        order = ("query", "key", "value")
        pairs = [
            relation_divergence(
                ours.projections[mine][order.index(part)],
                theirs.projections[other][order.index(part)],
                batch["segment_ids"],
                settings.relation_heads,
            )
            for mine, other in settings.relation_layers
            for part in settings.relation_parts
        ]
        terms["relations"] = _mean(pairs)
    return terms


def _mean(terms: list[Term]) -> Term:
    """Terms of equal weight as one."""
    return jnp.stack([value for value, _ in terms]).mean(), terms[0][1]
