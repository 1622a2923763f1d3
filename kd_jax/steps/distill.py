"""Distillation at the masked-LM stage: the teacher's logits, hidden states and relations, mixed with the hard loss."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd_jax.config import training
from kd_jax.config.training import RELATION_PARTS
from kd_jax.losses.blocked import block_for, blocked_losses
from kd_jax.losses.features import hidden_distance, relation_divergence, text_means
from kd_jax.losses.fused import fused_losses, serves_mesh
from kd_jax.losses.tiling import Decoder
from kd_jax.models.functional import Captured, Functional
from kd_jax.models.heads import gather_positions
from kd_jax.models.projection import WithProjections
from kd_jax.steps.objective import Frozen, Key, Loss, Objective, Scales, linear
from kd_jax.steps.teacher_logits import TeacherForm, fused_decoder, term_sums
from kd_jax.types import Array, Batch, Params, Term

LOGIT_TERMS = ("kl", "mlm")
SHORTEST = 3  # tokens of the shortest text in a packed row, special ones included (data.packing.SMALLEST_SEGMENT)

# Batch fields from a cache of states: states after a layer, its queries, keys and values, all [R, L, H], and the means
# of texts [R, S, H].
STATES, RELATIONS, MEANS = "teacher_layer_{}", "teacher_{}_{}", "teacher_texts"

_FEATURES = "teacher_features_{}"  # batch fields with each teacher's features, where it predicts the whole batch first


@dataclass(frozen=True)
class DistillSettings(training.Loss):
    """The loss as the step computes it: hashable, with layers resolved to pairs (student's, teacher's).

    once: the teacher predicts a step's whole batch before it is split into micro-batches.
    fused: logits stay in kernels if these support the terms: not for averaged teachers, top-k or samples, nor if the
        unknown token gets the probability of dropped ones.
    """

    hidden_layers: tuple[tuple[int, int], ...] = ()
    relation_layers: tuple[tuple[int, int], ...] = ()
    relation_heads: int = 1
    once: bool = False
    fused: bool = False
    form: TeacherForm = field(default_factory=TeacherForm)

    def __post_init__(self):
        super().__post_init__()
        if self.once and (self.features or self.kd_positions != "masked"):
            raise ValueError("once: the states of all positions would have to be kept for the whole batch")

    def captured(self, side: int) -> dict[str, Any]:
        """The inner states that the terms read, of the student (side 0) or the teacher (side 1)."""
        return {
            "layers": tuple(pair[side] for pair in self.hidden_layers) if self.hidden.used else (),
            "projections": tuple(pair[side] for pair in self.relation_layers) if self.relations.used else (),
            "embeddings": self.embeddings.used,
        }


class Targets(NamedTuple):
    """The teacher's side of the terms on inner states, by layer; texts: see losses.features.text_means."""

    layers: Mapping[int, Array]
    projections: Mapping[int, Mapping[str, Array]] = {}
    embeddings: Array | None = None
    texts: Array | None = None


def with_output(states: Captured, model: Functional) -> Captured:
    """The same, with the encoder's output, after its final norm if it has one, as the states of the last layer.

    For unmasked text, teacher and student are compared there, since finetuning and sentence encoders read it; the terms
    on masked text compare the states before that norm.
    """
    return states._replace(layers={**states.layers, model.config.num_layers - 1: states.hidden})


def text_slots(length: int) -> int:
    """The maximum number of texts in a packed row of that length."""
    return length // SHORTEST


def number_of_texts(batch: Batch) -> Array:
    """float32: the number of texts, or segments of long ones, in the rows of a batch."""
    return jnp.sum(jnp.max(jnp.asarray(batch["segment_ids"]), axis=1)).astype(jnp.float32)


def real_tokens(batch: Batch) -> Array:
    """float32 [R, L]: 1 where there is text, 0 on padding."""
    return (batch["segment_ids"] > 0).astype(jnp.float32)


@functools.cache
def make_distill_objective(
    student: WithProjections, teachers: tuple[Functional, ...], settings: DistillSettings
) -> Objective:
    """KL(teacher || student) * T**2 (Hinton et al. 2015), the hard masked-LM loss, and distances of hidden states.

    Teacher in the loop: frozen["teachers"] holds the parameters of each of `teachers`, whose probabilities are
    averaged. From a cache (settings.form.cached): the batch carries the teacher's predictions, and frozen["decoder"]
    the (table, bias) that turns cached features into logits; `teachers` is empty. frozen["kept"] int32 [student
    tokens], where the student's vocabulary is trimmed: the teacher's id of each of its tokens; a teacher in the loop
    then reads batch["teacher_tokens"].

    Cached states of clean text (settings.form.kind "states") come with the batch, under STATES, RELATIONS and MEANS;
    with settings.center, frozen["centers"] holds what is subtracted from states and means, under the same names,
    float32 [H].

    A term whose weight is 0 is not computed. Logits of both models are formed in blocks, at the masked positions only
    unless kd_positions is "all". Equal arguments give the same object, so equal jobs share one compilation.
    """
    form = settings.form

    def predict(frozen: Frozen, batch: Batch) -> tuple[Captured, ...]:
        """The teachers' states; nothing where no term reads them."""
        if not (settings.kl.used or settings.features):
            return ()
        theirs = {**batch, "tokens": batch["teacher_tokens"]} if "kept" in frozen else batch
        return tuple(
            states_of(teacher, params, theirs, None, 1)
            for teacher, params in zip(teachers, jax.lax.stop_gradient(frozen["teachers"]), strict=True)
        )

    def states_of(model: Functional, params: Params, batch: Batch, key: Key, side: int) -> Captured:
        columns = _columns(batch, settings)
        states = model.capture(params, batch, key, **settings.captured(side), columns_RxK=columns)
        return with_output(states, model) if settings.clean else states

    def features_of(frozen: Frozen, states: tuple[Captured, ...]) -> tuple[jax.Array, ...]:
        every = zip(teachers, frozen["teachers"], states)
        return tuple(teacher.mlm_features(params, one.hidden) for teacher, params, one in every)

    def predictions(frozen: Frozen, batch: Batch, states: tuple[Captured, ...]) -> dict[str, Any]:
        """The teacher's side of the KL term at each position, by the names that `term_sums` reads."""
        if form.cached:
            fields: dict[str, Any] = {name: batch[name] for name in form.fields}
            if form.kind == "hidden":
                fields["teacher_features"] = (fields["teacher_features"].astype(student.student.compute_dtype),)
            return fields
        if settings.once:
            return {"teacher_features": tuple(batch[_FEATURES.format(number)] for number in range(len(teachers)))}
        return {"teacher_features": features_of(frozen, states)}

    def constants_of(frozen: Frozen) -> dict[str, Any]:
        constants = {"kept": frozen["kept"]} if "kept" in frozen else {}
        if form.kind == "hidden":
            live = zip(teachers, frozen.get("teachers", ()))
            decoders = (frozen["decoder"],) if form.cached else tuple(one.decoder(params) for one, params in live)
            # Narrowed here, so that a table that is sharded is gathered in the narrow dtype.
            dtype = jnp.dtype(student.student.compute_dtype)
            constants["decoders"] = tuple((jnp.asarray(table).astype(dtype), bias) for table, bias in decoders)
        return constants

    def loss(params: Params, frozen: Frozen, batch: Batch, key: Key, scales: Scales, progress: Array) -> Loss:
        mine = student.student_params(params)
        ours = states_of(student.student, mine, batch, key, 0)
        states: tuple[Captured, ...] = () if form.cached or settings.once else predict(frozen, batch)
        # Terms on inner states have exactly one teacher.
        if form.kind == "states":
            theirs = _cached_targets(batch, frozen.get("centers", {}), settings)
        else:
            theirs = _targets(states, batch, settings)
        terms = _feature_terms(student, params, ours, theirs, batch, settings) if settings.features else {}
        total = jnp.float32(0.0)
        for name, (value, _) in terms.items():
            total += scales[name] * value
        if settings.clean:
            return total, terms
        kl = settings.kl
        constants = {
            **constants_of(frozen),
            "temperature": jnp.float32(linear(kl.temperature, kl.last_temperature, progress)),
        }
        # Called inside, so that a teacher's head is only applied where the KL term is used.
        predicted = functools.partial(predictions, frozen, batch, _at_masked(states, batch, settings))
        (hidden,) = (one.hidden for one in _at_masked((ours,), batch, settings))
        more, logit_terms = _logit_terms(student.student, mine, hidden, batch, predicted, constants, scales, settings)
        return total + more, terms | logit_terms

    def before(frozen: Frozen, batch: Batch) -> dict[str, Array]:
        """The teachers' features at the masked positions, [R, K, H] each."""
        every = features_of(frozen, predict(frozen, batch))
        return {_FEATURES.format(number): features for number, features in enumerate(every)}

    def weights(batch: Batch) -> dict[str, Array]:
        real = jnp.sum(real_tokens(batch))
        everywhere = {*settings.features, *(("kl",) if settings.kd_positions == "all" else ())}
        found: dict[str, Array] = {name: real for name in settings.used if name in everywhere}
        if settings.sentence.used:
            found["sentence"] = number_of_texts(batch)
        return found | {name: jnp.sum(batch["masked_weights"]) for name in settings.used if name not in found}

    def coefficients(progress: Array) -> dict[str, Array | float]:
        used = settings.used.items()
        return {name: linear(term.weight, term.last, progress, term.begin, term.end) for name, term in used}

    return Objective(weights, coefficients, loss, before if settings.once else None)


def _columns(batch: Batch, settings: DistillSettings) -> Array | None:
    """The masked positions, where the last layer's states are needed only there: the rest of it is then skipped."""
    everywhere = settings.kd_positions == "all" or settings.sentence.used or settings.clean
    return None if everywhere else batch["masked_positions"]


def _at_masked(states: tuple[Captured, ...], batch: Batch, settings: DistillSettings) -> tuple[Captured, ...]:
    """States for the logits: at the masked positions, unless all positions are needed."""
    if settings.kd_positions == "all" or not settings.sentence.used:
        return states
    columns = jnp.asarray(batch["masked_positions"])
    return tuple(one._replace(hidden=gather_positions(one.hidden, columns)) for one in states)


def _targets(states: tuple[Captured, ...], batch: Batch, settings: DistillSettings) -> Targets:
    """The teacher in the loop's targets for the terms on inner states; empty if there are none."""
    if not settings.features:
        return Targets({})
    (one,) = states
    texts = _means(one, batch) if settings.sentence.used else None
    projections = {layer: dict[str, Array](zip(RELATION_PARTS, heads)) for layer, heads in one.projections.items()}
    return Targets(one.layers, projections, one.embeddings, texts)


def _cached_targets(batch: Batch, centers: Mapping[str, Array], settings: DistillSettings) -> Targets:
    def field(name: str) -> jax.Array:
        values = jnp.asarray(batch[name])
        return values.astype(jnp.float32) - jnp.asarray(centers[name])[None, None] if settings.center else values

    captured, parts = settings.captured(1), settings.relations.parts
    layers = {layer: field(STATES.format(layer)) for layer in captured["layers"]}
    # All heads concatenated are one head as wide as the state; relation heads split it differently.
    projections = {
        layer: {part: jnp.asarray(batch[RELATIONS.format(part, layer)])[:, :, None] for part in parts}
        for layer in captured["projections"]
    }
    return Targets(layers, projections, texts=field(MEANS) if settings.sentence.used else None)


def _means(states: Captured, batch: Batch) -> jax.Array:
    return text_means(states.hidden, batch["segment_ids"], text_slots(batch["segment_ids"].shape[1]))


def _logit_terms(
    student: Functional,
    params: Params,
    hidden: jax.Array,
    batch: Batch,
    predictions: Callable[[], dict[str, Any]],
    constants: dict[str, Any],
    scales: Scales,
    settings: DistillSettings,
) -> tuple[Array, dict[str, Term]]:
    """Loss and terms "kl", "mlm" and "accuracy" from the student's hidden states, [R, K, H] at the masked positions or,
    with kd_positions "all", [R, L, H]; predictions() gives the teacher's side at the same positions.
    """
    table, bias = student.decoder(params)

    def run(states: jax.Array, names: tuple[str, ...], targets: Array, weights: Array) -> tuple[Array, dict[str, Term]]:
        per_position = {"targets": jnp.asarray(targets), "weights": weights}
        if "kl" in names:
            per_position |= predictions()
        here = {**constants, "scales": {name: scales[name] for name in names}}
        features, count = student.mlm_features(params, states), jnp.sum(weights)
        teacher = fused_decoder(per_position, constants, settings.form) if "kl" in names else None
        if settings.fused and (teacher or "kl" not in names) and serves_mesh(states.shape[0]):
            own, temperature = Decoder(features, table, bias), constants["temperature"]
            total, sums = fused_losses(own, teacher, targets, weights, temperature, here["scales"])
            return total, {name: (value, count) for name, value in sums.items()}

        def of_block(logits: jax.Array, per_position_B: Any, constants: Any) -> Any:
            return term_sums(logits, per_position_B, constants, settings.form)

        block = settings.block_positions or block_for(table.shape[-2])
        total, sums = blocked_losses(of_block, features, table, bias, per_position, here, block=block)
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


def _feature_terms(
    student: WithProjections,
    params: Params,
    ours: Captured,
    theirs: Targets,
    batch: Batch,
    settings: DistillSettings,
) -> dict[str, Term]:
    """The terms on inner states, each a mean over its layers (and parts) at every real token, or over texts."""
    weights = real_tokens(batch)
    terms = {}

    def projected(name: str, states: jax.Array) -> jax.Array:
        return student.project(params, name, states) if student.has(name) else states

    if settings.hidden.used:
        distance = settings.hidden.distance
        pairs = [
            hidden_distance(projected(f"hidden_{number}", ours.layers[mine]), theirs.layers[other], weights, distance)
            for number, (mine, other) in enumerate(settings.hidden_layers)
        ]
        terms["hidden"] = _mean(pairs)
    if ours.embeddings is not None and theirs.embeddings is not None:
        own = projected("embeddings", ours.embeddings)
        terms["embeddings"] = hidden_distance(own, theirs.embeddings, weights, settings.embeddings.distance)
    if settings.relations.used:
        pairs = [
            relation_divergence(
                ours.projections[mine][RELATION_PARTS.index(part)],
                theirs.projections[other][part],
                batch["segment_ids"],
                settings.relation_heads,
            )
            for mine, other in settings.relation_layers
            for part in settings.relations.parts
        ]
        terms["relations"] = _mean(pairs)
    if theirs.texts is not None:
        slots = theirs.texts.shape[1]
        own = projected("sentence", text_means(ours.hidden, batch["segment_ids"], slots))
        there = (jnp.max(jnp.asarray(batch["segment_ids"]), axis=1)[:, None] > jnp.arange(slots)[None]).astype(
            jnp.float32
        )
        terms["sentence"] = hidden_distance(own, theirs.texts, there, settings.sentence.distance)
    return terms


def _mean(terms: list[Term]) -> Term:
    """Terms of equal weight as one."""
    return jnp.stack([value for value, _ in terms]).mean(), terms[0][1]
