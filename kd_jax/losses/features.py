"""Distances of hidden states and divergence of self-attention relations, each as (sum, weight), reduced in float32.

The teacher's side is never differentiated. Equal states of student and teacher give exactly 0 and a gradient of 0.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd_jax.types import Array, Term, UserError

DISTANCES = ("cosine", "mse")


def hidden_distance(
    student_RxLxH: Array, teacher_RxLxH: Array, weights_RxL: Array, kind: Literal["cosine", "mse"]
) -> Term:
    """Sum of the distances of student and teacher states over the positions whose weight is 1, and their number.

    States of any float dtype, weights 0/1. "cosine" is 1 - cos (as in DistilBERT, Sanh et al., arXiv 1910.01108), in
    [0, 2] and 1/2 from a zero vector; "mse" the mean over H of the squared differences (as in TinyBERT, Jiao et al.,
    arXiv 1909.10351). The sum is a float32 scalar. ValueError for another kind.
    """
    if kind not in DISTANCES:
        raise ValueError(f"the distance {kind!r} is not one of {', '.join(DISTANCES)}")
    weights = jnp.asarray(weights_RxL, jnp.float32)
    # Recomputed for the gradient, so that only the states are kept, in their own dtype, and no float32 copies.
    distances = jax.checkpoint(_cosine_distance if kind == "cosine" else _mean_squared_difference)
    values = distances(jnp.asarray(student_RxLxH), jax.lax.stop_gradient(jnp.asarray(teacher_RxLxH)))
    return jnp.sum(jnp.where(weights > 0, values * weights, 0.0)), jnp.sum(weights)


def _mean_squared_difference(student: jax.Array, teacher: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(student.astype(jnp.float32) - teacher.astype(jnp.float32)), axis=-1)


def _cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cos = |s / |s| - t / |t||**2 / 2."""
    # In terms of s - t, which is exactly 0 for equal states, where 1 - cos would leave rounding errors.
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    difference = student - teacher
    size, teacher_size = _size(student), _size(teacher)
    longer = jnp.sum(difference * (student + teacher), axis=-1, keepdims=True) / (size + teacher_size)
    apart = (difference - teacher / teacher_size * longer) / size
    return 0.5 * jnp.sum(jnp.square(apart), axis=-1)


def _size(x: jax.Array) -> jax.Array:
    """Length of the vectors, bounded away from 0, so that its gradient is finite."""
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-24))


def text_means(states_RxLxH: Array, segment_ids_RxL: Array, texts: int) -> jax.Array:
    """The mean state [R, S, H] of each text of a row, its special tokens included, in the dtype of the states.

    Slot s has the text with segment id s + 1, out of S = `texts`; zeros where there is none. Summed in float32.
    """
    states, segment_ids = jnp.asarray(states_RxLxH), jnp.asarray(segment_ids_RxL)
    inside_RxSxL = segment_ids[:, None, :] == jnp.arange(1, texts + 1)[None, :, None]
    total_RxSxH = jnp.einsum(
        "rsl,rlh->rsh",
        inside_RxSxL.astype(states.dtype),
        states,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    count_RxS = jnp.sum(inside_RxSxL, axis=2, dtype=jnp.float32)
    return (total_RxSxH / jnp.maximum(count_RxS, 1.0)[:, :, None]).astype(states.dtype)


def check_relation_heads(heads: int, student_width: int, teacher_width: int, key: str) -> None:
    """Raises UserError, naming `config.<key>`, if a hidden size does not split into that many heads."""
    for whose, width in (("student", student_width), ("teacher", teacher_width)):
        if heads < 1 or width % heads:
            raise UserError(
                f"config.{key}: {heads} relation heads do not divide the {whose}'s hidden_size {width}; give a number "
                f"that divides {student_width} and {teacher_width}"
            )


def relation_divergence(student_RxLxNxD: Array, teacher_RxLxNxD: Array, segment_ids_RxL: Array, heads: int) -> Term:
    """Sum over the real tokens of the divergence of the student's self-attention relations from the teacher's, averaged
    over the relation heads, and the number of tokens.

    MiniLMv2 (Wang et al., arXiv 2012.15828): the vectors of all N heads (queries, keys or values) are concatenated and
    split again into `heads` of size d; the relation of a text is softmax(A A^T / sqrt(d)), and each row of it counts
    KL(teacher || student). Teacher and student may differ in N and D. Any float dtype; segment_ids int, 0 on padding;
    a token is related to those of its own segment. Memory is that of one relation head. Differentiable in the student
    alone; the sum is a float32 scalar. ValueError when `heads` does not divide a width.
    """
    widths = [vectors.shape[-2] * vectors.shape[-1] for vectors in (student_RxLxNxD, teacher_RxLxNxD)]
    if any(width % heads for width in widths):
        raise ValueError(f"{heads} relation heads do not divide the widths {widths}")
    student, teacher = (_split(jnp.asarray(vectors), heads) for vectors in (student_RxLxNxD, teacher_RxLxNxD))
    segment_ids = jnp.asarray(segment_ids_RxL)
    total: Any = _relation_divergence(student, teacher, segment_ids)
    return total, jnp.sum((segment_ids > 0).astype(jnp.float32))


def _split(vectors_RxLxNxD: jax.Array, heads: int) -> jax.Array:
    """The relation heads, [heads, R, L, d]."""
    rows, length = vectors_RxLxNxD.shape[:2]
    return jnp.moveaxis(vectors_RxLxNxD.reshape(rows, length, heads, -1), 2, 0)


@jax.custom_vjp
def _relation_divergence(student: jax.Array, teacher: jax.Array, segment_ids: jax.Array) -> jax.Array:
    return _over_heads(student, teacher, segment_ids, with_gradient=False)[0]


def _relation_divergence_forward(student: jax.Array, teacher: jax.Array, segment_ids: jax.Array):
    # Computes the gradient with the value, while the relations of a head are in memory; a backward pass would recompute
    # them or keep those of all heads.
    return _over_heads(student, teacher, segment_ids, with_gradient=True)


def _relation_divergence_backward(gradient: jax.Array, cotangent: jax.Array):
    return (gradient.astype(jnp.float32) * cotangent).astype(gradient.dtype), None, None


_relation_divergence.defvjp(_relation_divergence_forward, _relation_divergence_backward)


def _over_heads(
    student: jax.Array, teacher: jax.Array, segment_ids: jax.Array, *, with_gradient: bool
) -> tuple[jax.Array, Any]:
    """(mean over the heads, its gradient [heads, R, L, d] or None), one head after the other."""
    heads = student.shape[0]
    # Padding is a segment of its own, so that no softmax is empty. Its rows get weight 0.
    same_RxLxL = segment_ids[:, :, None] == segment_ids[:, None, :]
    counted = (segment_ids > 0)[:, :, None]

    def one(total: jax.Array, vectors: tuple[jax.Array, jax.Array]):
        student_RxLxD, teacher_RxLxD = vectors
        log_q, log_p = _log_relation(student_RxLxD, same_RxLxL), _log_relation(teacher_RxLxD, same_RxLxL)
        p, q = jnp.exp(log_p), jnp.exp(log_q)
        # As in losses.logits.kl_divergence: each term is at least 0, and rounding errors of the normalizers cancel.
        terms = jnp.where(p > 0, p * (log_p - log_q), 0.0) - p + q
        total += jnp.sum(jnp.where(counted, jnp.maximum(terms, 0.0), 0.0))
        if not with_gradient:
            return total, None
        change = jnp.where(counted, q - p, 0.0) * (student_RxLxD.shape[-1] ** -0.5 / heads)
        # Scores are products of the vectors with themselves, so each vector gets a gradient as query and as key.
        change = (change + jnp.swapaxes(change, 1, 2)).astype(student_RxLxD.dtype)
        gradient = jnp.einsum("rqk,rkd->rqd", change, student_RxLxD, preferred_element_type=jnp.float32)
        return total, gradient.astype(student_RxLxD.dtype)

    total, gradient = jax.lax.scan(one, jnp.float32(0.0), (student, teacher))
    return total / heads, gradient


def _log_relation(vectors_RxLxD: jax.Array, same_RxLxL: jax.Array) -> jax.Array:
    """log softmax(A A^T / sqrt(d)) inside each segment, float32 [R, L, L], -inf outside."""
    scores = jnp.einsum("rqd,rkd->rqk", vectors_RxLxD, vectors_RxLxD, preferred_element_type=jnp.float32)
    scores = scores * vectors_RxLxD.shape[-1] ** -0.5
    return jax.nn.log_softmax(jnp.where(same_RxLxL, scores, -jnp.inf), axis=-1)
