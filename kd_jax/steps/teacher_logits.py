"""The teacher's distribution at some positions, live or cached, and the losses against it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.losses.blocked import with_bias_inside
from kd_jax.losses.logits import distill_loss
from kd_jax.losses.sparse import Tail, sampled_divergence, top_k_divergence
from kd_jax.losses.tiling import Decoder
from kd_jax.types import Array


@dataclass(frozen=True)
class TeacherForm:
    """The form in which the teacher's predictions reach the loss.

    kind: "hidden": the features that its decoder turns into logits; "top_k" and "sampled" as losses.sparse defines
    them, `tail` being the policy of top_k; "states": no predictions, but inner states from a cache. cached: they come
    with the batch, from a cache. dropped: what happens to the teacher's probability of tokens that the student lacks:
    "renormalize" or "unknown" (given to the student's token `unknown`).
    """

    kind: str = "hidden"
    tail: Tail = "bucket"
    dropped: str = "renormalize"
    unknown: int = 0
    cached: bool = False

    @property
    def fields(self) -> tuple[str, ...]:
        """The batch's fields that a cache of this form brings."""
        return {
            "hidden": ("teacher_features",),
            "top_k": ("teacher_ids", "teacher_log_p"),
            "sampled": ("teacher_ids", "teacher_weights", "teacher_entropy"),
        }[self.kind]


def on_kept(logits: jax.Array, kept: Array, temperature: Array, form: TeacherForm) -> jax.Array:
    """Logits over the student's tokens from logits over the teacher's.

    logits [..., teacher tokens], kept int32 [student tokens] ascending -> [..., student tokens]. form.dropped:
    "renormalize" keeps the ratios among the kept tokens; "unknown" adds the probability of the others at this
    temperature to the unknown token.
    """
    selected = jnp.take(logits, kept, axis=-1)
    if form.dropped == "renormalize":
        return selected
    scaled = logits.astype(jnp.float32) / temperature
    without_kept = scaled.at[..., kept].set(-jnp.inf)
    dropped = jax.nn.logsumexp(without_kept, axis=-1)
    unknown = jnp.logaddexp(scaled[..., kept[form.unknown]], dropped) * temperature
    return selected.astype(jnp.float32).at[..., form.unknown].set(unknown)


def teacher_logits(
    features: tuple[jax.Array, ...], constants: dict[str, Any], form: TeacherForm
) -> tuple[jax.Array, ...]:
    """Each teacher's logits over the student's tokens, not differentiated."""
    temperature = constants["temperature"]
    every = []
    for states, (table, bias) in zip(features, constants["decoders"], strict=True):
        whole = "kept" not in constants or form.dropped != "renormalize"
        if not whole:  # only the kept columns are formed
            table = jnp.take(table, constants["kept"], axis=0)
            bias = None if bias is None else jnp.take(bias, constants["kept"])
        states, table, bias = with_bias_inside(states, table.astype(states.dtype), bias)
        logits = jnp.einsum("...h,vh->...v", states, table)
        if bias is not None:
            logits = logits + jnp.expand_dims(bias.astype(logits.dtype), range(logits.ndim - 1))
        if "kept" in constants and whole:
            logits = on_kept(logits, constants["kept"], temperature, form)
        every.append(logits)
    return jax.lax.stop_gradient(tuple(every))


def fused_decoder(per_position: dict[str, Any], constants: dict[str, Any], form: TeacherForm) -> Decoder | None:
    """The teacher of `fused_losses`, over the student's tokens; None if its logits take more than one product."""
    features = per_position.get("teacher_features", ())
    if len(features) != 1 or ("kept" in constants and form.dropped != "renormalize"):
        return None
    ((table, bias),) = constants["decoders"]
    if "kept" in constants:
        table = jnp.take(table, constants["kept"], axis=0)
        bias = None if bias is None else jnp.take(bias, constants["kept"])
    return Decoder(features[0], table, bias)


def term_sums(
    logits_BxV: jax.Array, per_position: dict[str, Any], constants: dict[str, Any], form: TeacherForm
) -> tuple[Array, dict[str, Array]]:
    """(loss, sums of "kl", "mlm" and "accuracy") of the student's logits; the loss has the terms of
    constants["scales"]."""
    scales, temperature = constants["scales"], constants["temperature"]
    targets, weights = per_position["targets"], per_position["weights"]
    if form.kind == "hidden":
        theirs = teacher_logits(per_position["teacher_features"], constants, form) if "kl" in scales else ()
        return distill_loss(logits_BxV, theirs, targets, weights, temperature, scales)
    if form.kind == "top_k":
        ids, log_p = per_position["teacher_ids"], per_position["teacher_log_p"]
        kl = top_k_divergence(logits_BxV, ids, log_p, weights, temperature, form.tail)[0]
    else:
        ids, mass = per_position["teacher_ids"], per_position["teacher_weights"]
        kl = sampled_divergence(logits_BxV, ids, mass, per_position["teacher_entropy"], weights, temperature)[0]
    loss, sums = distill_loss(
        logits_BxV, (), targets, weights, temperature, {name: scales[name] for name in scales if name != "kl"}
    )
    return loss + scales["kl"] * kl, {**sums, "kl": kl}
