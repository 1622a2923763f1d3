"""Masked cross entropy and temperature-scaled KL divergence, each as (sum, weight), reduced in float32.

Both carry hand-written gradients: they keep the logits in the dtype they came in as the only large residual, and
equal student and teacher logits give a gradient of exactly zero. `-inf` logits stand for classes that do not exist.

The sums over classes are written for XLA on a CPU. It fuses a sum into one pass only if the operand is made of logits
and columns [..., 1], and it materializes whatever two sums, or a sum and a gradient, have in common. So scalars become
columns, and every use has a column of its own: they differ where the weight is 0, which keeps XLA from sharing them.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.types import Array, Term

# The least log probability: below any that counts, and finite, so that 0 times it is 0 and not NaN.
LOWEST = -10_000.0


def column(value: Array | float, weights: jax.Array, elsewhere: float) -> jax.Array:
    """float32 [..., 1] for weights [...]: the scalar, or `elsewhere` where the weight is 0."""
    return jnp.where(weights > 0, jnp.asarray(value, jnp.float32), elsewhere)[..., None]


def row_maximum(logits: jax.Array) -> jax.Array:
    """The largest logit of each row, float32 [..., 1]."""
    return jnp.max(logits.astype(jnp.float32), axis=-1, keepdims=True)


def _finite_maximum(logits: jax.Array) -> jax.Array:
    """The largest logit of each row, or 0 if it is not finite."""
    largest = row_maximum(logits)
    return jnp.where(jnp.isfinite(largest), largest, 0.0)


def log_normalizer(logits: jax.Array) -> jax.Array:
    """log sum exp(logits) over the last axis, float32 [..., 1]."""
    largest = _finite_maximum(logits)
    return largest + jnp.log(jnp.sum(jnp.exp(logits.astype(jnp.float32) - largest), axis=-1, keepdims=True))


def tempered_center(logits: jax.Array, temperature: jax.Array, inverse: jax.Array) -> jax.Array:
    """The c of softmax(logits / T) = exp((logits - c) / T), float32 [..., 1]; T and 1 / T are columns [..., 1]."""
    largest = _finite_maximum(logits)
    shifted = logits.astype(jnp.float32) * inverse - largest * inverse
    return largest + temperature * jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))


def one_hot(classes: jax.Array, size: int) -> jax.Array:
    """float32 [..., size]: 1 in the column of each class, int [...]."""
    # Integer columns keep XLA from vectorizing the loop on a CPU. The floats 1, 0, 3, 2, ... are a constant that it
    # does not recognize as an iota and turn back into integers.
    columns = (np.arange(size) ^ 1).astype(np.float32).reshape((1,) * classes.ndim + (-1,))
    return (columns == (classes ^ 1).astype(jnp.float32)[..., None]).astype(jnp.float32)


def chosen_logits(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """The logit of each row's class, float32 [...] for classes int [...]."""
    return jnp.take_along_axis(logits, classes[..., None], axis=-1)[..., 0].astype(jnp.float32)


def weighted_sum(losses: jax.Array, weights: jax.Array) -> jax.Array:
    """The sum of losses [...] where the weights are not 0; values elsewhere, even NaN, do not count."""
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0.0))


def awaited(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """The weights, NaN where the loss is NaN: the scale of the gradient."""
    # Makes the gradient depend on the loss, so that XLA finishes the loss first and reuses the logits' memory for it.
    return jnp.where(losses == losses, weights, losses)


def masked_cross_entropy(logits: Array, targets: Array, weights: Array, label_smoothing: float = 0.0) -> Term:
    """Sum of -log softmax(logits)[target] over the positions whose weight is 1, and the number of those positions.

    logits [..., V] of any float dtype, targets int [...] (any value where the weight is 0), weights 0/1 [...]. With
    label smoothing e, the target distribution is (1 - e) * one-hot + e * uniform over the classes whose logit is not
    -inf (Szegedy et al., arXiv 1512.00567). Differentiable in the logits alone; the sum is a float32 scalar.
    """
    weights = jnp.asarray(weights, jnp.float32)
    targets = jnp.clip(jnp.asarray(targets), 0, logits.shape[-1] - 1)
    return _cross_entropy(label_smoothing, jnp.asarray(logits), targets, weights), jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(smoothing: float, *inputs: Any) -> jax.Array:
    return _cross_entropy_forward(smoothing, *inputs)[0]


def _cross_entropy_forward(smoothing: float, logits: jax.Array, targets: jax.Array, weights: jax.Array):
    normalizer = log_normalizer(logits)
    chosen = chosen_logits(logits, targets)
    if smoothing:
        others = jnp.mean(logits, axis=-1, dtype=jnp.float32, where=logits > -jnp.inf)
        chosen = (1 - smoothing) * chosen + smoothing * others
    losses = normalizer[..., 0] - chosen
    return weighted_sum(losses, weights), (logits, targets, weights, awaited(weights, losses), normalizer)


def _cross_entropy_backward(smoothing: float, residuals: tuple[jax.Array, ...], cotangent: jax.Array):
    logits, targets, weights, scale, normalizer = residuals
    target = one_hot(targets, logits.shape[-1])
    if smoothing:
        exists = logits > -jnp.inf
        target = (1 - smoothing) * target + smoothing * exists / jnp.sum(exists, axis=-1, keepdims=True)
    gradient = (jnp.exp(logits.astype(jnp.float32) - normalizer) - target) * (cotangent * scale)[..., None]
    return jnp.where(weights[..., None] > 0, gradient, 0.0).astype(logits.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def kl_divergence(student_logits: Array, teacher_logits: Array, weights: Array, temperature: Array | float) -> Term:
    """Sum of T**2 * KL(softmax(teacher / T) || softmax(student / T)) over the positions whose weight is 1, and their
    number.

    Logits [..., V] of any float dtype, weights 0/1 [...], temperature T > 0, a number or a traced scalar (Hinton et
    al., arXiv 1503.02531; T**2 keeps the size of the gradient when T changes). Never negative; exactly zero, gradient
    included, where the logits are equal. Classes may be -inf for the teacher, or for both. Differentiable in the
    student's logits alone; the sum is a float32 scalar.
    """
    weights = jnp.asarray(weights, jnp.float32)
    temperature = jnp.asarray(temperature, jnp.float32)
    total: Any = _kl_divergence(jnp.asarray(student_logits), jnp.asarray(teacher_logits), weights, temperature)
    return total, jnp.sum(weights)


@jax.custom_vjp
def _kl_divergence(*inputs: Any) -> jax.Array:
    return _kl_divergence_forward(*inputs)[0]


def _kl_divergence_forward(student: jax.Array, teacher: jax.Array, weights: jax.Array, temperature: jax.Array):
    temperatures = column(temperature, weights, 1.0)
    student_center = tempered_center(student, temperatures, column(1 / temperature, weights, 2.0))
    teacher_center = tempered_center(teacher, temperatures, column(1 / temperature, weights, 3.0))
    inverse, lowest = column(1 / temperature, weights, 4.0), column(LOWEST, weights, LOWEST - 1)
    log_q = jnp.maximum(student.astype(jnp.float32) * inverse - student_center * inverse, lowest)
    log_p = jnp.maximum(teacher.astype(jnp.float32) * inverse - teacher_center * inverse, lowest)
    # p log(p / q) - p + q is at least 0 for each class and sums to the divergence, as p and q both sum to 1. The two
    # additional terms cancel the rounding errors of the normalizers.
    p = jnp.exp(log_p)
    divergences = jnp.sum(p * (log_p - log_q) - p + jnp.exp(log_q), axis=-1)
    losses = temperature**2 * jnp.maximum(divergences, 0.0)
    residuals = (student, teacher, weights, awaited(weights, losses), temperature, student_center, teacher_center)
    return weighted_sum(losses, weights), residuals


def _kl_divergence_backward(residuals: tuple[jax.Array, ...], cotangent: jax.Array):
    student, teacher, weights, scale, temperature, student_center, teacher_center = residuals
    inverse = column(1 / temperature, weights, 5.0)
    q = jnp.exp(student.astype(jnp.float32) * inverse - student_center * inverse)
    p = jnp.exp(teacher.astype(jnp.float32) * inverse - teacher_center * inverse)
    gradient = (q - p) * (temperature * cotangent * scale)[..., None]
    return jnp.where(weights[..., None] > 0, gradient, 0.0).astype(student.dtype), None, None, None


_kl_divergence.defvjp(_kl_divergence_forward, _kl_divergence_backward)


def most_likely(logits: Array, targets: Array, weights: Array) -> Term:
    """How often the target has the largest logit, ties included, and the number of positions; not differentiated.

    Shapes as in `masked_cross_entropy`.
    """
    # Reuses the loss's row maximum; an argmax, which XLA does not vectorize on a CPU, takes longer than the loss.
    weights, logits = jnp.asarray(weights, jnp.float32), jax.lax.stop_gradient(jnp.asarray(logits))
    targets = jnp.asarray(targets)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    chosen = chosen_logits(logits, jnp.clip(targets, 0, logits.shape[-1] - 1))
    hits = inside & (chosen >= row_maximum(logits)[..., 0])
    return jnp.sum(jnp.where(weights > 0, hits * weights, 0.0)), jnp.sum(weights)


def averaged_logits(logits: Sequence[Array], weights: Array, temperature: Array | float) -> jax.Array:
    """Logits, float32 [..., V], whose softmax at that temperature is the mean of those of several teachers.

    logits: each [..., V] of any float dtype; weights 0/1 [...]. Those of a single teacher are returned unchanged.
    """
    if len(logits) == 1:
        return jnp.asarray(logits[0])
    weights = jnp.asarray(weights, jnp.float32)
    temperatures, inverse = column(temperature, weights, 1.0), 1 / jnp.asarray(temperature, jnp.float32)

    def probabilities(one: jax.Array) -> jax.Array:
        center = tempered_center(one, temperatures, column(inverse, weights, 2.0))
        return jnp.exp((one.astype(jnp.float32) - center) * inverse)

    total = sum(probabilities(jnp.asarray(one)) for one in logits)
    return jnp.log(total) * jnp.asarray(temperature, jnp.float32)


def distill_loss(
    student_logits_BxV: Array,
    teacher_logits: Sequence[Array],
    targets_B: Array,
    weights_B: Array,
    temperature: Array | float,
    scales: Mapping[str, Array | float],
) -> tuple[Array, dict[str, Array]]:
    """(loss, {"kl", "mlm", "accuracy"}): scales["kl"] * KL to the teachers + scales["mlm"] * hard loss, and the sums.

    teacher_logits: one [B, V] per teacher; their probabilities are averaged. A term that is not in `scales` is not
    computed; "kl" alone needs a teacher. The sums are float32 scalars over the positions whose weight is 1: T**2 * KL,
    cross entropy, and targets that are the most likely class. Differentiable in the student's logits. Temperature and
    scales may be traced. Made for `blocked_losses`.
    """
    sums: dict[str, Array] = {}
    if "kl" in scales:
        teacher = jax.lax.stop_gradient(averaged_logits(teacher_logits, weights_B, temperature))
        sums["kl"] = kl_divergence(student_logits_BxV, teacher, weights_B, temperature)[0]
    if "mlm" in scales:
        sums["mlm"] = masked_cross_entropy(student_logits_BxV, targets_B, weights_B)[0]
    loss = sum((scales[name] * value for name, value in sums.items()), start=jnp.float32(0.0))
    return loss, sums | {"accuracy": most_likely(student_logits_BxV, targets_B, weights_B)[0]}
