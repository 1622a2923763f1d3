"""What a training job minimizes, apart from how it is minimized."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from kd_jax.types import Array, Batch, Params, Term


@dataclass(frozen=True)
class Objective:
    """Terms of a loss, each divided once by its weight over the whole batch.

    terms: (params, frozen, micro_batch, key) -> name -> (sum, weight); may hold metrics that are not part of the loss.
    weights: batch -> loss term -> float32 scalar, from the masks alone, so that micro-batches share one denominator.
    coefficients: progress in [0, 1] -> loss term -> factor; the names here are the terms of the loss.
    """

    terms: Callable[[Params, Any, Batch, jax.Array], Mapping[str, Term]]
    weights: Callable[[Batch], Mapping[str, Array]]
    coefficients: Callable[[Array], Mapping[str, Array | float]]


def linear(start: float, end: float, progress: Array) -> Array | float:
    """A factor that moves linearly from start to end as progress goes from 0 to 1."""
    return start + (end - start) * progress
