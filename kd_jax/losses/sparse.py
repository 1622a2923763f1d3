"""Teacher distributions kept as a few pieces a position, top-k or sampled, and the divergences from them.

As in `logits`: (sum, weight), reduced in float32, with hand-written gradients that keep the logits and nothing else
that is large.
Classes of logit -inf do not exist. Positions of weight 0 may hold anything.
"""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd_jax.losses.logits import weighted_sum
from kd_jax.types import Array, Term

TAILS = ("renormalize", "bucket", "zero")


def top_k_targets(logits_BxV: Array, k: int, temperature: Array | float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids int32 [B, k], log_p float32 [B, k], mass float32 [B]) of the k likeliest pieces, the likeliest first.

    log_p is under the softmax over all pieces at the temperature; mass is the sum of their probabilities.
    """
    scaled = jnp.asarray(logits_BxV).astype(jnp.float32) / temperature
    largest, ids = jax.lax.top_k(scaled, k)
    log_p = largest - jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    return ids.astype(jnp.int32), log_p, jnp.sum(jnp.exp(log_p), axis=-1)


def top_k_divergence(
    student_logits: Array,
    ids: Array,
    log_p: Array,
    weights: Array,
    temperature: Array | float,
    tail: Literal["renormalize", "bucket", "zero"] | str,
) -> Term:
    """Sum of T**2 * KL(teacher || student) from `top_k_targets` over the positions whose weight is 1, and their number.

    student_logits [..., V] of any float dtype, ids int [..., k], no piece twice, log_p [..., k], weights 0/1 [...]. With
    q the student's softmax at temperature T, p the kept probabilities, m their sum, and K the kept pieces:

    - "renormalize": sum over K of p / m * log(p / m / q); gradient T * (q - p / m). Too sure: all of the teacher's tail
      is given to K.
    - "bucket": sum over K of p log(p / q), plus (1 - m) log((1 - m) / (1 - q(K))): the other pieces count as one.
      Gradient T * (q - p) on K and T * q * (1 - (1 - m) / (1 - q(K))) elsewhere. Says nothing of the order within the
      tail, and is otherwise exact.
    - "zero": sum over K of p log(p / q); gradient T * (m * q - p). What is missing counts for nothing; may be negative.

    At k = V all three are `kl_divergence`. Differentiable in the student's logits alone. ValueError for another tail.
    """
    if tail not in TAILS:
        raise ValueError(f"the tail policy {tail!r} is not one of {', '.join(TAILS)}")
    weights = jnp.asarray(weights, jnp.float32)
    log_p = jnp.asarray(log_p).astype(jnp.float32)
    temperature = jnp.asarray(temperature, jnp.float32)
    total: Any = _top_k(tail, jnp.asarray(student_logits), jnp.asarray(ids), log_p, weights, temperature)
    return total, jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _top_k(tail, logits, ids, log_p, weights, temperature):
    return _top_k_forward(tail, logits, ids, log_p, weights, temperature)[0]


def _top_k_forward(tail, logits, ids, log_p, weights, temperature):
    scaled = logits.astype(jnp.float32) / temperature
    normalizer = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(scaled, ids, axis=-1) - normalizer
    mass = jnp.sum(jnp.exp(log_p), axis=-1, keepdims=True)
    if tail == "renormalize":
        log_p = log_p - jnp.log(mass)
    p = jnp.exp(log_p)
    losses = jnp.sum(jnp.where(p > 0, p * (log_p - log_q), 0.0), axis=-1)
    log_rest = jnp.zeros_like(normalizer)
    if tail == "bucket":
        # Summed over the tail itself: 1 - q(K) would lose what is small.
        log_rest = jax.nn.logsumexp(_without(scaled, ids), axis=-1, keepdims=True) - normalizer
        rest = _rest(mass)
        some = (rest > 0) & (log_rest > -jnp.inf)
        losses += jnp.where(some, rest * (jnp.log(jnp.where(some, rest, 1.0)) - log_rest), 0.0)[..., 0]
    total = temperature**2 * weighted_sum(losses, weights)
    return total, (logits, ids, p, mass, weights, temperature, normalizer, log_rest)


def _top_k_backward(tail, residuals, cotangent):
    logits, ids, p, mass, weights, temperature, normalizer, log_rest = residuals
    q = jnp.exp(logits.astype(jnp.float32) / temperature - normalizer)
    if tail == "bucket":
        rest = _rest(mass)
        some = (rest > 0) & (log_rest > -jnp.inf)
        outside = jnp.where(some, 1 - rest / jnp.exp(jnp.where(some, log_rest, 0.0)), 1.0)
        on_kept = jnp.take_along_axis(q, ids, axis=-1)
        gradient = _added(q * outside, ids, on_kept * (1 - outside) - p)
    else:
        gradient = _added(q * mass if tail == "zero" else q, ids, -p)
    return *_scaled(gradient, logits, weights, temperature, cotangent), None, None, None, None


_top_k.defvjp(_top_k_forward, _top_k_backward)


def sampled_targets(
    uniforms_Bxn: Array, logits_BxV: Array, samples: int, power: float, temperature: Array | float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(ids int32 [B, n], weights float32 [B, n], entropy float32 [B]): an unbiased sample of softmax(logits / T) = p.

    n = samples draws with replacement from a proposal r that goes with p ** power, each of weight p / r / n (importance
    sampling; Anshumann et al. 2025, arXiv 2503.16870), so that the sum of weights times one-hot vectors has the mean p.
    uniforms in [0, 1) decide on the draws. entropy, in nats, is that of p.
    """
    scaled = jnp.asarray(logits_BxV).astype(jnp.float32) / temperature
    log_p = jax.nn.log_softmax(scaled, axis=-1)
    log_r = jax.nn.log_softmax(power * scaled, axis=-1)
    cumulated = jnp.cumsum(jnp.exp(log_r), axis=-1)
    # Scaled to the last sum, which rounding keeps from being 1, so that no draw falls behind the last piece.
    places = jnp.asarray(uniforms_Bxn)[:, :samples] * cumulated[:, -1:]
    ids = jax.vmap(partial(jnp.searchsorted, side="right"))(cumulated, places)
    ids = jnp.minimum(ids, scaled.shape[-1] - 1).astype(jnp.int32)
    weights = jnp.exp(jnp.take_along_axis(log_p - log_r, ids, axis=-1)) / samples
    p = jnp.exp(log_p)
    return ids, weights, -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)


def sampled_divergence(
    student_logits: Array, ids: Array, sample_weights: Array, entropy: Array, weights: Array, temperature: Array | float
) -> Term:
    """Sum of an unbiased estimate of T**2 * KL(teacher || student) from `sampled_targets`, and the number of positions.

    student_logits [..., V] of any float dtype, ids int [..., n] (a piece may stand there several times), sample_weights
    w [..., n], entropy [...], weights 0/1 [...]. The estimate is -sum of w log q - entropy, its gradient in the logits
    T * (sum(w) * q - sum of w times one-hot), unbiased as well; a single one may be negative. Differentiable in the
    student's logits alone.
    """
    weights, temperature = jnp.asarray(weights, jnp.float32), jnp.asarray(temperature, jnp.float32)
    w = jnp.asarray(sample_weights).astype(jnp.float32)
    logits, ids = jnp.asarray(student_logits), jnp.asarray(ids)
    total: Any = _sampled(logits, ids, w, jnp.asarray(entropy, jnp.float32), weights, temperature)
    return total, jnp.sum(weights)


@jax.custom_vjp
def _sampled(logits, ids, w, entropy, weights, temperature):
    return _sampled_forward(logits, ids, w, entropy, weights, temperature)[0]


def _sampled_forward(logits, ids, w, entropy, weights, temperature):
    scaled = logits.astype(jnp.float32) / temperature
    normalizer = jax.nn.logsumexp(scaled, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(scaled, ids, axis=-1) - normalizer
    losses = -jnp.sum(jnp.where(w > 0, w * log_q, 0.0), axis=-1) - entropy
    return temperature**2 * weighted_sum(losses, weights), (logits, ids, w, weights, temperature, normalizer)


def _sampled_backward(residuals, cotangent):
    logits, ids, w, weights, temperature, normalizer = residuals
    q = jnp.exp(logits.astype(jnp.float32) / temperature - normalizer)
    gradient = _added(q * jnp.sum(w, axis=-1, keepdims=True), ids, -w)
    return *_scaled(gradient, logits, weights, temperature, cotangent), None, None, None, None, None


_sampled.defvjp(_sampled_forward, _sampled_backward)


def _rest(mass: jax.Array) -> jax.Array:
    """1 - mass, and exactly 0 where only rounding is left of it."""
    rest = 1 - mass
    return jnp.where(rest > 1e-6, rest, 0.0)


def _rows(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values as [rows, last axis], and the row numbers as a column."""
    flat = values.reshape(-1, values.shape[-1])
    return flat, jnp.arange(flat.shape[0])[:, None]


def _without(values: jax.Array, ids: jax.Array) -> jax.Array:
    """-inf in the places ids [..., k] of each row."""
    flat, row = _rows(values)
    return flat.at[row, ids.reshape(-1, ids.shape[-1])].set(-jnp.inf).reshape(values.shape)


def _added(values: jax.Array, ids: jax.Array, more: jax.Array) -> jax.Array:
    """values [..., V] plus more [..., k] in the places ids [..., k]."""
    flat, row = _rows(values)
    places, more = ids.reshape(-1, ids.shape[-1]), more.reshape(-1, ids.shape[-1])
    return flat.at[row, places].add(more).reshape(values.shape)


def _scaled(gradient, logits, weights, temperature, cotangent):
    """The gradient in the logits, nothing where the weight is 0, as the only element."""
    scale = (temperature * cotangent * weights)[..., None]
    return (jnp.where(weights[..., None] > 0, gradient * scale, 0.0).astype(logits.dtype),)
