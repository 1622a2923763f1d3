"""Self-attention on packed rows, with rotary positions where the family has them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

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
        mask_RxLxL: jax.Array,
        tables: jax.Array | None,
        dropout_key: jax.Array | None,
        at_RxK: jax.Array | None = None,
    ) -> tuple[jax.Array, Projections]:
        """The mixed values [T, H], and (query, key, value) [R, L, N, D] before rotation and scaling.

        With columns `at_RxK` of each row, only those have queries: the mixed values are [R * K, H], queries
        [R, K, N, D].
        """
        rows, dtype = mask_RxLxL.shape[0], x_TxH.dtype
        query_tables: Any = tables
        # Split, not sliced: the gradient is then one concatenation, not a sum of three padded arrays.
        if at_RxK is None:
            parts = jnp.split(self.query_key_value(x_TxH), 3, axis=1)
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
        scores_RxNxQxK = jnp.einsum("rqnd,rknd->rnqk", query, key, preferred_element_type=jnp.float32)
        scores_RxNxQxK = jnp.where(mask_RxLxL[:, None], scores_RxNxQxK, jnp.finfo(jnp.float32).min)
        shares_RxNxQxK = jax.nn.softmax(scores_RxNxQxK, axis=-1).astype(dtype)
        shares_RxNxQxK = drop(shares_RxNxQxK, self.config.attention_dropout, dropout_key, 0)
        mixed_RxQxNxD = jnp.einsum("rnqk,rknd->rqnd", shares_RxNxQxK, value)
        return self.output(mixed_RxQxNxD.reshape(-1, self.config.num_heads, self.config.head_dim)), projected


def at_columns(x_TxH: jax.Array, at_RxK: jax.Array) -> jax.Array:
    """The states [R * K, H] at K columns of each of R rows, from states [R * L, H]."""
    rows, hidden = at_RxK.shape[0], x_TxH.shape[-1]
    x_RxLxH = x_TxH.reshape(rows, -1, hidden)
    return jnp.take_along_axis(x_RxLxH, at_RxK[:, :, None], axis=1).reshape(-1, hidden)
