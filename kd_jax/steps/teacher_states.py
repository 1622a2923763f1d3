"""The teacher's states of unmasked text, as cache_states keeps them."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kd_jax.losses.features import text_means
from kd_jax.models.functional import Functional
from kd_jax.steps.distill import with_output
from kd_jax.types import Batch, Params


def make_states_step(teacher: Functional, layers: Sequence[int], texts: int, dtype: str, relations: Sequence[int] = ()):
    """(params, batch) -> (states [R, L, H] after each of `layers`, then queries, keys and values [R, L, H] of each of
    `relations`; means [R, S, H] of up to S = `texts` texts per row).

    The same states as those of a teacher in the loop, in `dtype`; see losses.features.text_means.
    """

    def step(params: Params, batch: Batch) -> tuple[list[jax.Array], jax.Array]:
        inner = teacher.capture(params, batch, layers=tuple(layers), projections=tuple(relations))
        captured = with_output(inner, teacher)
        means = text_means(captured.hidden, batch["segment_ids"], texts)
        vectors = [captured.layers[layer] for layer in layers]
        vectors += [heads.reshape(*heads.shape[:2], -1) for layer in relations for heads in captured.projections[layer]]
        return [one.astype(jnp.dtype(dtype)) for one in vectors], means.astype(jnp.dtype(dtype))

    return step
