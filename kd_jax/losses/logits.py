"""Masked cross entropy and temperature-scaled KL divergence, each as (sum, weight), reduced in float32.

Both carry hand-written gradients: they keep the logits in the dtype they came in as the only large residual, and
equal student and teacher logits give a gradient of exactly zero. `-inf` logits stand for classes that do not exist.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.types import Array, Term


def _log_normalizer(logits: jax.Array, temperature: float) -> jax.Array:
    """log sum exp(logits / temperature) over the last axis, float32 [..., 1]."""
    return jax.nn.logsumexp(logits.astype(jnp.float32) / temperature, axis=-1, keepdims=True)


def _log_softmax(logits: jax.Array, normalizer: jax.Array, temperature: float) -> jax.Array:
    return logits.astype(jnp.float32) / temperature - normalizer


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
def _cross_entropy(smoothing, logits, targets, weights):
    return _cross_entropy_forward(smoothing, logits, targets, weights)[0]


def _cross_entropy_forward(smoothing, logits, targets, weights):
    normalizer = _log_normalizer(logits, 1.0)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1).astype(jnp.float32)
    if smoothing:
        exists = logits > -jnp.inf
        others = jnp.mean(logits, axis=-1, keepdims=True, dtype=jnp.float32, where=exists)
        chosen = (1 - smoothing) * chosen + smoothing * others
    losses = (normalizer - chosen)[..., 0]
    total = jnp.sum(jnp.where(weights > 0, losses * weights, 0.0))
    return total, (logits, targets, weights, normalizer)


def _cross_entropy_backward(smoothing, residuals, cotangent):
    logits, targets, weights, normalizer = residuals
    classes = jnp.arange(logits.shape[-1], dtype=targets.dtype).reshape((1,) * targets.ndim + (-1,))
    target = (classes == targets[..., None]).astype(jnp.float32)
    if smoothing:
        exists = logits > -jnp.inf
        target = (1 - smoothing) * target + smoothing * exists / jnp.sum(exists, axis=-1, keepdims=True)
    gradient = jnp.exp(_log_softmax(logits, normalizer, 1.0)) - target
    gradient = jnp.where(weights[..., None] > 0, gradient * (cotangent * weights)[..., None], 0.0)
    return gradient.astype(logits.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def kl_divergence(student_logits: Array, teacher_logits: Array, weights: Array, temperature: float) -> Term:
    """Sum of T**2 * KL(softmax(teacher / T) || softmax(student / T)) over the positions whose weight is 1, and their
    number.

    Logits [..., V] of any float dtype, weights 0/1 [...], temperature T > 0 (Hinton et al., arXiv 1503.02531; T**2
    keeps the size of the gradient when T changes). Never negative; exactly zero, gradient included, where the logits
    are equal. Classes may be -inf for the teacher, or for both. Differentiable in the student's logits alone; the sum
    is a float32 scalar.
    """
    weights = jnp.asarray(weights, jnp.float32)
    total: Any = _kl_divergence(temperature, jnp.asarray(student_logits), jnp.asarray(teacher_logits), weights)
    return total, jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl_divergence(temperature, student, teacher, weights):
    return _kl_divergence_forward(temperature, student, teacher, weights)[0]


def _kl_divergence_forward(temperature, student, teacher, weights):
    student_normalizer = _log_normalizer(student, temperature)
    teacher_normalizer = _log_normalizer(teacher, temperature)
    log_q = _log_softmax(student, student_normalizer, temperature)
    log_p = _log_softmax(teacher, teacher_normalizer, temperature)
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    # p log(p / q) - p + q is at least 0 for each class, sums to the divergence since p and q sum to 1, and cancels
    # the rounding error of the two normalizers; the maximum removes what rounding leaves below 0 in a single class.
    terms = jnp.where(p > 0, p * (log_p - log_q), 0.0) - p + q
    losses = temperature**2 * jnp.sum(jnp.maximum(terms, 0.0), axis=-1)
    total = jnp.sum(jnp.where(weights > 0, losses * weights, 0.0))
    return total, (student, teacher, weights, student_normalizer, teacher_normalizer)


def _kl_divergence_backward(temperature, residuals, cotangent):
    student, teacher, weights, student_normalizer, teacher_normalizer = residuals
    q = jnp.exp(_log_softmax(student, student_normalizer, temperature))
    p = jnp.exp(_log_softmax(teacher, teacher_normalizer, temperature))
    scale = (temperature * cotangent * weights)[..., None]
    gradient = jnp.where(weights[..., None] > 0, (q - p) * scale, 0.0)
    return gradient.astype(student.dtype), None, None


_kl_divergence.defvjp(_kl_divergence_forward, _kl_divergence_backward)
