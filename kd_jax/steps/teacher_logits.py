"""The teacher's distribution at some positions, in whichever form it comes, and the losses against it."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.losses.logits import kl_divergence, masked_cross_entropy
from kd_jax.losses.sparse import sampled_divergence, top_k_divergence
from kd_jax.types import Array


@dataclass(frozen=True)
class TeacherForm:
    """In which form the teacher's side reaches the loss.

    kind "hidden": the features that its decoder turns into logits, from the teacher itself or from a cache; "top_k" and
    "sampled" as losses.sparse defines them, `tail` being the policy of top_k. dropped: where the teacher's mass on
    pieces that the student does not have goes, "renormalize" or "unknown" (the student's piece `unknown`).
    """

    kind: str = "hidden"
    tail: str = "bucket"
    dropped: str = "renormalize"
    unknown: int = 0

    @property
    def fields(self) -> tuple[str, ...]:
        """The batch's fields that a cache of this form brings."""
        return {
            "hidden": ("teacher_features",),
            "top_k": ("teacher_ids", "teacher_log_p"),
            "sampled": ("teacher_ids", "teacher_weights", "teacher_entropy"),
        }[self.kind]


def averaged_log_p(all_logits: tuple[jax.Array, ...], temperature: Array) -> jax.Array:
    """log of the mean of several teachers' probabilities at that temperature, float32."""
    each = [jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1) for logits in all_logits]
    return jax.nn.logsumexp(jnp.stack(each), axis=0) - jnp.log(float(len(each)))


def on_kept(logits: jax.Array, kept: Array, temperature: Array, form: TeacherForm) -> jax.Array:
    """Logits over the student's pieces from logits over the teacher's, with the mass on the others where `dropped`
    says.

    logits [..., teacher pieces], kept int32 [student pieces] ascending -> [..., student pieces]. "renormalize" keeps
    the ratios among the kept pieces; "unknown" adds the others' mass at this temperature to the unknown piece.
    """
    selected = jnp.take(logits, kept, axis=-1)
    if form.dropped == "renormalize":
        return selected
    scaled = logits.astype(jnp.float32) / temperature
    without_kept = scaled.at[..., kept].set(-jnp.inf)
    dropped = jax.nn.logsumexp(without_kept, axis=-1)
    unknown = jnp.logaddexp(scaled[..., kept[form.unknown]], dropped) * temperature
    return selected.astype(jnp.float32).at[..., form.unknown].set(unknown)


def teacher_logits(features: tuple[jax.Array, ...], constants: dict[str, Any], form: TeacherForm) -> jax.Array:
    """Logits over the student's pieces, of one teacher or of several whose probabilities are averaged; not
    differentiated."""
    temperature = constants["temperature"]
    every = []
    for states, (table, bias) in zip(features, constants["decoders"], strict=True):
        whole = "kept" not in constants or form.dropped != "renormalize"
        if not whole:  # only the kept columns are formed
            table = jnp.take(table, constants["kept"], axis=0)
            bias = None if bias is None else jnp.take(bias, constants["kept"])
        logits = jnp.einsum("...h,vh->...v", states, table.astype(states.dtype))
        if bias is not None:
            logits = logits + jnp.expand_dims(bias.astype(logits.dtype), range(logits.ndim - 1))
        if "kept" in constants and whole:
            logits = on_kept(logits, constants["kept"], temperature, form)
        every.append(logits)
    if len(every) == 1:
        return jax.lax.stop_gradient(every[0])
    return jax.lax.stop_gradient(averaged_log_p(tuple(every), temperature) * temperature)


def term_sums(
    logits_BxV: jax.Array, per_position: dict[str, Any], constants: dict[str, Any], form: TeacherForm
) -> tuple[jax.Array, dict[str, Array]]:
    """(loss, sums of "kl", "mlm" and "accuracy") of the student's logits; the loss has the terms of
    constants["scales"]."""
    scales, temperature = constants["scales"], constants["temperature"]
    targets, weights = per_position["targets"], per_position["weights"]
    sums = {}
    if "kl" in scales:
        if form.kind == "hidden":
            theirs = teacher_logits(per_position["teacher_features"], constants, form)
            sums["kl"] = kl_divergence(logits_BxV, theirs, weights, temperature)[0]
        elif form.kind == "top_k":
            ids, log_p = per_position["teacher_ids"], per_position["teacher_log_p"]
            sums["kl"] = top_k_divergence(logits_BxV, ids, log_p, weights, temperature, form.tail)[0]
        else:
            ids, mass = per_position["teacher_ids"], per_position["teacher_weights"]
            entropy = per_position["teacher_entropy"]
            sums["kl"] = sampled_divergence(logits_BxV, ids, mass, entropy, weights, temperature)[0]
    if "mlm" in scales:
        sums["mlm"] = masked_cross_entropy(logits_BxV, targets, weights)[0]
    loss = jnp.zeros((), jnp.float32)
    for name, value in sums.items():
        loss = loss + scales[name] * value
    hits = jnp.argmax(logits_BxV, axis=-1) == targets
    return loss, {**sums, "accuracy": jnp.sum(hits * weights)}
