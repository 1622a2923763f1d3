"""What a training job minimizes, apart from how it is minimized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.types import Array, Batch, Params, Term

Frozen = Mapping[str, Any]  # what a step reads and never changes: a teacher, class masks
Key = jax.Array | None  # of dropout; None is deterministic
Scales = Mapping[str, Array]  # a float32 scalar for each term
Loss = tuple[Array, Mapping[str, Term]]  # the loss, and (sum, weight) of each term and metric


@dataclass(frozen=True)
class Objective:
    """A loss made of terms, each divided once by its weight over the whole batch.

    weights: batch -> loss term -> float32 scalar, from the masks alone, so that micro-batches share one denominator.
    coefficients: progress in [0, 1] -> loss term -> factor; the names here are the terms of the loss.
    loss: (params, frozen, micro_batch, key, scales, progress) -> (loss, name -> (sum, weight)); scales holds factor /
    weight of each term, so the loss is the sum of scales[name] * sum of that term. The pairs may hold metrics that are
    no part of the loss. before: (frozen, batch) -> fields that join the batch of a step before it is split into
    micro-batches, not differentiated; None has none.
    """

    weights: Callable[[Batch], Scales]
    coefficients: Callable[[Array], Mapping[str, Array | float]]
    loss: Callable[[Params, Frozen, Batch, Key, Scales, Array], Loss]
    before: Callable[[Frozen, Batch], Mapping[str, Array]] | None = None


def scaled_sum(terms: Mapping[str, Term], scales: Scales) -> Loss:
    """The loss of terms that were all formed by themselves, and the terms."""
    total = jnp.float32(0.0)
    for name, scale in scales.items():
        total += scale * terms[name][0]
    return total, terms


def linear(start: float, end: float, progress: Array, begin: float = 0.0, finish: float = 1.0) -> Array | float:
    """A factor: `start` until progress `begin`, `end` from `finish` on, linear in between; a switch where they meet."""
    if start == end:
        return start
    if begin == finish:
        return jnp.where(progress < begin, start, end)
    return start + (end - start) * jnp.clip((progress - begin) / (finish - begin), 0.0, 1.0)
