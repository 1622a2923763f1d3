"""Self-attention on packed rows, with rotary positions where the family has them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.models.attention_kernels import Kernel, fused_attention
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.layers import Linear, drop


def rotary_tables(positions_RxL: jax.Array, longest: int, head_dim: int, theta: float) -> jax.Array:
    """Cosines and sines of the rotary angles (Su et al., arXiv 2104.09864), float32 [2, R, L, 1, head_dim / 2].

    Positions are below `longest`.
    """
    # Constants that are looked up: XLA would fuse computed cosines into every loop that rotates queries or keys, and
    # recompute them there, which took half of attention's time on a CPU.
    frequencies = 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim)
    angles = np.arange(longest)[:, None] * frequencies[None, :]
    by_position = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    tables_RxLx2xF = jnp.take(by_position, positions_RxL, axis=0, mode="clip")
    return jnp.moveaxis(tables_RxLx2xF, 2, 0)[:, :, :, None]


def rotate(x_RxLxNxD: jax.Array, tables: jax.Array) -> jax.Array:
    """Rotates each pair (x[i], x[i + D / 2]) by its angle.

    Pairs are halves of a head apart, as in `transformers`; the paper pairs neighbors, so weights would not fit.
    """
    cosine, sine = tables
    first, second = jnp.split(x_RxLxNxD.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x_RxLxNxD.dtype)


Projections = tuple[jax.Array, ...]  # query, key and value, each [R, L, N, D]


class Sight(NamedTuple):
    """What a layer's tokens attend to, and how it is computed."""

    segment_ids_RxL: jax.Array
    mask_RxLxL: jax.Array | None  # None if a kernel makes its own
    tables: jax.Array | None  # of rotary angles
    local: jax.Array | bool  # only inside the window; traced where layers of both kinds share a program
    kernel: Kernel


class Attention(nnx.Module):
    """Self-attention inside each segment, with one merged projection for queries, keys and values."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads = (config.num_heads, config.head_dim)
        std, bias = config.initializer_range, config.use_bias
        self.query_key_value = Linear(
            (config.hidden_size,), (3, *heads), ("embed", None, "heads", None), bias=bias, std=std, rngs=rngs
        )
        self.output = Linear(
            heads, (config.hidden_size,), ("heads", None, "embed"), bias=bias, std=config.output_std, rngs=rngs
        )

    def __call__(
        self,
        x_TxH: jax.Array,
        sight: Sight,
        dropout_key: jax.Array | None,
        at_RxK: jax.Array | None = None,
    ) -> tuple[jax.Array, Projections]:
        """The mixed values [T, H], and (query, key, value) [R, L, N, D] before rotation and scaling.

        With columns `at_RxK` of each row, only those have queries: the mixed values are [R * K, H], queries
        [R, K, N, D]. Their scores are few, so they are computed without a kernel.
        """
        rows, dtype = sight.segment_ids_RxL.shape[0], x_TxH.dtype
        mask_RxLxL, tables = sight.mask_RxLxL, sight.tables
        query_tables: Any = tables
        # Split, not sliced: the gradient is then one concatenation, not a sum of three padded arrays.
        if at_RxK is None:
            parts = jnp.split(self.query_key_value(x_TxH), 3, axis=1)
        else:
            if mask_RxLxL is None:
                half_window = self.config.local_window // 2 if sight.local else None
                mask_RxLxL = mask_at(sight.segment_ids_RxL, at_RxK, half_window)
            else:
                mask_RxLxL = jnp.take_along_axis(mask_RxLxL, at_RxK[:, :, None], axis=1)
            if tables is not None:
                query_tables = jnp.take_along_axis(tables, at_RxK[None, :, :, None, None], axis=2)
            asking = self.query_key_value(at_columns(x_TxH, at_RxK), slice(0, 1))
            parts = [asking, *jnp.split(self.query_key_value(x_TxH, slice(1, 3)), 2, axis=1)]
        projected = query, key, value = tuple(
            part.reshape(rows, -1, self.config.num_heads, self.config.head_dim) for part in parts
        )
        if tables is not None:
            query, key = rotate(query, query_tables), rotate(key, tables)
        # The query is scaled, not the scores: it is smaller by a factor of L / D.
        query = query * jnp.asarray(self.config.head_dim**-0.5, dtype)
        if mask_RxLxL is None:
            half_window = self.config.local_window // 2
            mixed_RxQxNxD = fused_attention(
                sight.kernel, query, key, value, sight.segment_ids_RxL, sight.local, half_window
            )
        else:
            rate = self.config.attention_dropout
            mixed_RxQxNxD = plain_attention(query, key, value, mask_RxLxL, rate, dropout_key)
        return self.output(mixed_RxQxNxD.reshape(-1, self.config.num_heads, self.config.head_dim)), projected


def plain_attention(
    query_RxQxNxD: jax.Array,
    key_RxLxNxD: jax.Array,
    value_RxLxNxD: jax.Array,
    mask_RxQxL: jax.Array,
    dropout: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """The mixed values [R, Q, N, D] of scaled queries, with all scores in memory; softmax in float32."""
    scores_RxNxQxL = jnp.einsum("rqnd,rknd->rnqk", query_RxQxNxD, key_RxLxNxD, preferred_element_type=jnp.float32)
    scores_RxNxQxL = jnp.where(mask_RxQxL[:, None], scores_RxNxQxL, jnp.finfo(jnp.float32).min)
    shares_RxNxQxL = jax.nn.softmax(scores_RxNxQxL, axis=-1).astype(query_RxQxNxD.dtype)
    shares_RxNxQxL = drop(shares_RxNxQxL, dropout, dropout_key, 0)
    return jnp.einsum("rnqk,rknd->rqnd", shares_RxNxQxL, value_RxLxNxD)


def mask_at(segment_ids_RxL: jax.Array, at_RxK: jax.Array, half_window: int | None) -> jax.Array:
    """Which of a row's tokens the tokens at some of its columns attend to, [R, K, L]."""
    same = jnp.take_along_axis(segment_ids_RxL, at_RxK, axis=1)[:, :, None] == segment_ids_RxL[:, None, :]
    if half_window is None:
        return same
    columns = jnp.arange(segment_ids_RxL.shape[1])
    return same & (jnp.abs(at_RxK[:, :, None] - columns[None, None, :]) <= half_window)


def at_columns(x_TxH: jax.Array, at_RxK: jax.Array) -> jax.Array:
    """The states [R * K, H] at K columns of each of R rows, from states [R * L, H]."""
    rows, hidden = at_RxK.shape[0], x_TxH.shape[-1]
    x_RxLxH = x_TxH.reshape(rows, -1, hidden)
    return jnp.take_along_axis(x_RxLxH, at_RxK[:, :, None], axis=1).reshape(-1, hidden)
