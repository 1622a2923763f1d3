"""Teacher distributions reduced to a few classes per position, and the divergence of the student from them.

Top-k keeps the k most likely classes with their probabilities; the caller chooses the policy for the rest. Sampling
keeps n classes drawn at random, with weights that add up, on average, to the whole distribution.

In the formulas p is the teacher's softmax(logits / T), q the student's, S the classes that are kept, and m the sum of p
over S. Gradients with respect to the student's logits are written by hand; besides these logits nothing of the size of
the vocabulary is kept for them.
"""

from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from kd_jax.losses.logits import LOWEST, awaited, column, tempered_center, weighted_sum
from kd_jax.types import Array, Term

Tail = Literal["renormalize", "bucket", "zero"]

# Its exp is finite in float32. So large a ratio only multiplies probabilities that are 0.
_LARGEST_EXPONENT = 80.0


def top_k_targets(logits_BxV: Array, k: int, temperature: Array | float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k most likely classes: (ids int32 [B, k], log p float32 [B, k], their mass float32 [B]).

    log p is normalized over all classes, not over the k; the mass is at most 1. ids descend in probability and are
    distinct. Raises ValueError for a k that is not in 1 ... V.
    """
    if not 1 <= k <= logits_BxV.shape[-1]:
        raise ValueError(f"k: {k} is not in 1 to {logits_BxV.shape[-1]}, the number of classes")
    center_Bx1, inverse = _center(jnp.asarray(logits_BxV), temperature)
    values_Bxk, ids_Bxk = jax.lax.top_k(logits_BxV, k)
    log_p_Bxk = (values_Bxk.astype(jnp.float32) - center_Bx1) * inverse
    mass_B = jnp.minimum(jnp.sum(jnp.exp(log_p_Bxk), axis=-1), 1.0)
    return ids_Bxk.astype(jnp.int32), log_p_Bxk, mass_B


def _center(logits_BxV: jax.Array, temperature: Array | float) -> tuple[jax.Array, jax.Array]:
    """The [B, 1] c of softmax(logits / T) = exp((logits - c) / T), and 1 / T."""
    ones_B = jnp.ones(logits_BxV.shape[0], jnp.float32)
    inverse = 1 / jnp.asarray(temperature, jnp.float32)
    return tempered_center(logits_BxV, column(temperature, ones_B, 1.0), column(inverse, ones_B, 2.0)), inverse


def top_k_divergence(
    student_logits_BxV: Array,
    ids_Bxk: Array,
    log_p_Bxk: Array,
    weights_B: Array,
    temperature: Array | float,
    tail: Tail,
) -> Term:
    """Sum of T**2 * divergence from the teacher's top-k over the positions whose weight is 1, and their number.

    ids int [B, k] are distinct, log_p of any float dtype [B, k] as `top_k_targets` gives them, at the same temperature
    T > 0, which may be traced. The policy for the teacher's mass 1 - m outside of S:

    "renormalize": KL(p / m on S || q), the student being normalized over all classes. Gradient T * (q - p / m), where p
    is 0 outside S. Biased: the mass outside is moved to S, so the student learns to be surer than its teacher and to
    leave nothing to other classes.

    "bucket": sum over S of p log(p / q) + (1 - m) log((1 - m) / (1 - mass of q on S)): all other classes form one.
    Gradient T * (q - p) on S, and T * q * (1 - (1 - m) / (1 - mass of q on S)) outside. The student's mass outside is
    pulled to the teacher's, but its distribution there is not taught. At most the full divergence, with equality if
    both distribute the rest alike.

    "zero": sum over S of p log(p / q). Gradient T * (m * q - p). The missing mass is neither counted nor moved, so a
    position counts with its m; but the minimum, T**2 * m log m and so negative, is still at q = p / m: biased like
    "renormalize".

    With k = V, all three are `kl_divergence` up to rounding. Differentiable in the student's logits alone; -inf logits
    have probability 0. Raises ValueError for an unknown policy.
    """
    if tail not in get_args(Tail):
        raise ValueError(f"tail: {tail!r} is unknown; use one of {', '.join(get_args(Tail))}")
    student_logits_BxV, weights_B = jnp.asarray(student_logits_BxV), jnp.asarray(weights_B, jnp.float32)
    ids_Bxk = jnp.clip(jnp.asarray(ids_Bxk, jnp.int32), 0, student_logits_BxV.shape[-1] - 1)
    log_p_Bxk = jnp.maximum(jnp.asarray(log_p_Bxk, jnp.float32), LOWEST)
    temperature = jnp.asarray(temperature, jnp.float32)
    total: Any = _top_k(tail, student_logits_BxV, ids_Bxk, log_p_Bxk, weights_B, temperature)
    return total, jnp.sum(weights_B)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _top_k(tail: Tail, *inputs: Any) -> jax.Array:
    return _top_k_forward(tail, *inputs)[0]


def _top_k_forward(
    tail: Tail, student_BxV: jax.Array, ids_Bxk: jax.Array, log_p_Bxk: jax.Array, weights_B: jax.Array, temperature: Any
):
    temperatures_Bx1 = column(temperature, weights_B, 1.0)
    center_Bx1 = tempered_center(student_BxV, temperatures_Bx1, column(1 / temperature, weights_B, 2.0))
    log_q_Bxk = _log_q(student_BxV, ids_Bxk, center_Bx1, temperature)
    p_Bxk = jnp.exp(log_p_Bxk)
    mass_Bx1 = jnp.sum(p_Bxk, axis=-1, keepdims=True)
    # Outside S the gradient is T * outside * q, on S it is T * (inside * q - p).
    inside_Bx1 = outside_Bx1 = jnp.ones_like(mass_Bx1)
    if tail == "renormalize":
        log_p_Bxk, p_Bxk = log_p_Bxk - jnp.log(mass_Bx1), p_Bxk / mass_Bx1
    elif tail == "zero":
        inside_Bx1 = outside_Bx1 = mass_Bx1
    divergences_B = jnp.sum(p_Bxk * (log_p_Bxk - log_q_Bxk), axis=-1)
    if tail == "bucket" and ids_Bxk.shape[-1] < student_BxV.shape[-1]:
        others_BxV = student_BxV.at[jnp.arange(ids_Bxk.shape[0])[:, None], ids_Bxk].set(-jnp.inf)
        # A sum of its own: 1 - (mass of q on S) would be nothing but rounding error where the student is sure.
        others_center_Bx1 = tempered_center(others_BxV, temperatures_Bx1, column(1 / temperature, weights_B, 3.0))
        log_rest_q_Bx1 = (others_center_Bx1 - center_Bx1) / temperature
        rest_p_Bx1 = jnp.maximum(1.0 - mass_Bx1, 0.0)
        log_ratio_Bx1 = jnp.log(rest_p_Bx1) - log_rest_q_Bx1
        counts_Bx1 = (rest_p_Bx1 > 0) & (log_rest_q_Bx1 > -jnp.inf)
        divergences_B += jnp.where(counts_Bx1, rest_p_Bx1 * log_ratio_Bx1, 0.0)[:, 0]
        outside_Bx1 -= jnp.where(counts_Bx1, jnp.exp(jnp.minimum(log_ratio_Bx1, _LARGEST_EXPONENT)), 0.0)
    if tail != "zero":
        divergences_B = jnp.maximum(divergences_B, 0.0)
    losses_B = temperature**2 * divergences_B
    scale_B = awaited(weights_B, losses_B)
    kept = (student_BxV, ids_Bxk, p_Bxk, weights_B, scale_B, temperature, center_Bx1, inside_Bx1, outside_Bx1)
    return weighted_sum(losses_B, weights_B), kept


def _top_k_backward(tail: Tail, kept: tuple[jax.Array, ...], cotangent: jax.Array):
    del tail
    student_BxV, ids_Bxk, p_Bxk, weights_B, scale_B, temperature, center_Bx1, inside_Bx1, outside_Bx1 = kept
    counts_Bx1, scale_Bx1 = weights_B[:, None] > 0, (temperature * cotangent * scale_B)[:, None]
    inverse_Bx1 = column(1 / temperature, weights_B, 4.0)
    q_BxV = jnp.exp(student_BxV.astype(jnp.float32) * inverse_Bx1 - center_Bx1 * inverse_Bx1)
    q_Bxk = jnp.exp(_log_q(student_BxV, ids_Bxk, center_Bx1, temperature))
    gradient_BxV = jnp.where(counts_Bx1, q_BxV * (outside_Bx1 * scale_Bx1), 0.0)
    on_kept_Bxk = jnp.where(counts_Bx1, (inside_Bx1 * q_Bxk - p_Bxk) * scale_Bx1, 0.0)
    gradient_BxV = gradient_BxV.at[jnp.arange(ids_Bxk.shape[0])[:, None], ids_Bxk].set(on_kept_Bxk)
    return gradient_BxV.astype(student_BxV.dtype), None, None, None, None


_top_k.defvjp(_top_k_forward, _top_k_backward)


def _log_q(student_BxV: jax.Array, ids_Bxk: jax.Array, center_Bx1: jax.Array, temperature: Any) -> jax.Array:
    """log q of the kept classes, float32 [B, k]."""
    chosen_Bxk = jnp.take_along_axis(student_BxV, ids_Bxk, axis=-1).astype(jnp.float32)
    return jnp.maximum((chosen_Bxk - center_Bx1) / temperature, LOWEST)


def sampled_targets(
    uniforms_Bxn: Array, logits_BxV: Array, samples: int, power: float, temperature: Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Classes drawn with replacement: (ids int32 [B, n], weights float32 [B, n], entropy of p float32 [B]).

    They are drawn from a proposal that is proportional to p ** power, and weighted with p / proposal / n, so that the
    weighted sum of their one-hot vectors is p on average: random sampling distillation (Anshumann et al., arXiv
    2503.16870), but without making the weights of a position sum to 1, which would bias them. power 1 gives every
    sample the weight 1 / n; less than 1 draws rare classes more often. entropy is in nats, at the temperature.

    uniforms: float32 in [0, 1), one per sample, so that the draw does not depend on how positions are batched; a class
    is found by inverting the cumulative proposal, to an accuracy of about 2**-23. One uniform from each n-th part of
    [0, 1) keeps the estimates unbiased and makes them vary less. Raises ValueError when their shape is not
    [B, samples].
    """
    logits_BxV, uniforms_Bxn = jnp.asarray(logits_BxV), jnp.asarray(uniforms_Bxn, jnp.float32)
    if uniforms_Bxn.shape != (logits_BxV.shape[0], samples) or samples < 1:
        raise ValueError(f"uniforms: {uniforms_Bxn.shape} is not [{logits_BxV.shape[0]}, samples = {samples}]")
    center_Bx1, inverse = _center(logits_BxV, temperature)
    log_p_BxV = jnp.maximum((logits_BxV.astype(jnp.float32) - center_Bx1) * inverse, LOWEST)
    entropy_B = -jnp.sum(jnp.exp(log_p_BxV) * log_p_BxV, axis=-1)
    log_proposal_BxV = power * log_p_BxV
    log_proposal_BxV = log_proposal_BxV - jax.nn.logsumexp(log_proposal_BxV, axis=-1, keepdims=True)
    ids_Bxn = _invert(uniforms_Bxn, jnp.where(log_p_BxV > LOWEST, jnp.exp(log_proposal_BxV), 0.0))
    log_ratio_Bxn = jnp.take_along_axis(log_p_BxV - log_proposal_BxV, ids_Bxn, axis=-1)
    return ids_Bxn, jnp.exp(log_ratio_Bxn) / samples, entropy_B


def _invert(uniforms_Bxn: jax.Array, masses_BxV: jax.Array, size: int = 64) -> jax.Array:
    """int32 [B, n]: the class that contains each uniform share of the cumulative masses, never one of mass 0."""
    # Two steps, sums of `size` classes and the classes in one of them: a cumulative sum over all classes would take
    # longer than the teacher's logits.
    rows, classes = masses_BxV.shape
    masses_BxGxS = jnp.pad(masses_BxV, ((0, 0), (0, -classes % size))).reshape(rows, -1, size)
    sums_BxG = jnp.cumsum(jnp.sum(masses_BxGxS, axis=-1), axis=-1)
    wanted_Bxn = uniforms_Bxn * sums_BxG[:, -1:]
    group_Bxn = jax.vmap(_first_above)(sums_BxG, wanted_Bxn)
    before_Bxn = jnp.take_along_axis(jnp.pad(sums_BxG, ((0, 0), (1, 0))), group_Bxn, axis=-1)
    inside_BxnxS = jnp.cumsum(jnp.take_along_axis(masses_BxGxS, group_Bxn[:, :, None], axis=1), axis=-1)
    within_Bxn = jax.vmap(jax.vmap(_first_above))(inside_BxnxS, (wanted_Bxn - before_Bxn)[:, :, None])[:, :, 0]
    return jnp.minimum(group_Bxn * size + within_Bxn, classes - 1).astype(jnp.int32)


def _first_above(cumulated: jax.Array, wanted: jax.Array) -> jax.Array:
    """The first index whose cumulative mass exceeds each wanted one; if rounding leaves none, the last with mass."""
    last = cumulated[-1]
    below = jnp.nextafter(last, jnp.zeros_like(last))
    return jnp.searchsorted(cumulated, jnp.minimum(wanted, below), side="right")


def sampled_divergence(
    student_logits_BxV: Array,
    ids_Bxn: Array,
    sample_weights_Bxn: Array,
    entropy_B: Array,
    weights_B: Array,
    temperature: Array | float,
) -> Term:
    """Sum of T**2 * (-entropy - sum of sample weight * log q) over the positions whose weight is 1, and their number.

    On average over the draws of `sampled_targets`, at the same temperature T, this is T**2 * KL(p || q) and its
    gradient T * (sum of sample weights * q - sample weights at their classes) is T * (q - p); a single draw may be
    negative. ids int [B, n] may repeat; sample weights and entropy are of any float dtype. T may be traced.
    Differentiable in the student's logits alone.
    """
    student_logits_BxV, weights_B = jnp.asarray(student_logits_BxV), jnp.asarray(weights_B, jnp.float32)
    ids_Bxn = jnp.clip(jnp.asarray(ids_Bxn, jnp.int32), 0, student_logits_BxV.shape[-1] - 1)
    sample_weights_Bxn = jnp.asarray(sample_weights_Bxn, jnp.float32)
    entropy_B, temperature = jnp.asarray(entropy_B, jnp.float32), jnp.asarray(temperature, jnp.float32)
    total: Any = _sampled(student_logits_BxV, ids_Bxn, sample_weights_Bxn, entropy_B, weights_B, temperature)
    return total, jnp.sum(weights_B)


@jax.custom_vjp
def _sampled(*inputs: Any) -> jax.Array:
    return _sampled_forward(*inputs)[0]


def _sampled_forward(
    student_BxV: jax.Array,
    ids_Bxn: jax.Array,
    sample_weights_Bxn: Any,
    entropy_B: Any,
    weights_B: Any,
    temperature: Any,
):
    temperatures_Bx1 = column(temperature, weights_B, 1.0)
    center_Bx1 = tempered_center(student_BxV, temperatures_Bx1, column(1 / temperature, weights_B, 2.0))
    log_q_Bxn = _log_q(student_BxV, ids_Bxn, center_Bx1, temperature)
    losses_B = temperature**2 * (-entropy_B - jnp.sum(sample_weights_Bxn * log_q_Bxn, axis=-1))
    scale_B = awaited(weights_B, losses_B)
    kept = (student_BxV, ids_Bxn, sample_weights_Bxn, weights_B, scale_B, temperature, center_Bx1)
    return weighted_sum(losses_B, weights_B), kept


def _sampled_backward(kept: tuple[jax.Array, ...], cotangent: jax.Array):
    student_BxV, ids_Bxn, sample_weights_Bxn, weights_B, scale_B, temperature, center_Bx1 = kept
    counts_Bx1, scale_Bx1 = weights_B[:, None] > 0, (temperature * cotangent * scale_B)[:, None]
    inverse_Bx1 = column(1 / temperature, weights_B, 4.0)
    q_BxV = jnp.exp(student_BxV.astype(jnp.float32) * inverse_Bx1 - center_Bx1 * inverse_Bx1)
    total_Bx1 = jnp.sum(sample_weights_Bxn, axis=-1, keepdims=True)
    gradient_BxV = jnp.where(counts_Bx1, q_BxV * (total_Bx1 * scale_Bx1), 0.0)
    drawn_Bxn = jnp.where(counts_Bx1, sample_weights_Bxn * scale_Bx1, 0.0)
    gradient_BxV = gradient_BxV.at[jnp.arange(ids_Bxn.shape[0])[:, None], ids_Bxn].add(-drawn_Bxn)
    return gradient_BxV.astype(student_BxV.dtype), None, None, None, None, None


_sampled.defvjp(_sampled_forward, _sampled_backward)
