"""What a training job minimizes, apart from how it is minimized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.types import Array, Batch, Params, Term


@dataclass(frozen=True)
class Objective:
    """A loss made of terms, each divided once by its weight over the whole batch.

    weights: batch -> loss term -> float32 scalar, from the masks alone, so that micro-batches share one denominator.
    coefficients: progress in [0, 1] -> loss term -> factor; the names here are the terms of the loss.
    loss: (params, frozen, micro_batch, key, scales, progress) -> (loss, name -> (sum, weight)); scales holds factor /
    weight of each term, so the loss is the sum of scales[name] * sum of that term. The pairs may hold metrics that are
    no part of the loss. before: (frozen, batch) -> fields that join the batch of a step before it is cut into
    micro-batches, not differentiated; None has none.
    """

    weights: Callable[[Batch], Mapping[str, Array]]
    coefficients: Callable[[Array], Mapping[str, Array | float]]
    loss: Callable[[Params, Any, Batch, jax.Array, Mapping[str, Array], Array], tuple[Array, Mapping[str, Term]]]
    before: Callable[[Any, Batch], Mapping[str, Array]] | None = None


def scaled_sum(terms: Mapping[str, Term], scales: Mapping[str, Array]) -> tuple[Array, Mapping[str, Term]]:
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
