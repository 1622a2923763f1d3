"""The token table, which a model uses twice: to look up its tokens, and to turn features into logits.

XLA would sum the gradients of both over the devices separately. With a copy of the table for each device, they are
added on each device first, over all micro-batches too, and their sum crosses the network once.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kd_jax.types import Params, row_axes

_PATH = ("encoder", "embeddings", "tokens")


def on_each_device(params: Params, rows: int) -> Params:
    """The parameters with a table [D, V, H]: one copy for each of the D devices over which that many rows are split.

    Unchanged without a mesh, or if the mesh splits more than rows. The table should be replicated: a sharded one would
    be gathered.
    """
    axes, devices = row_axes(rows)
    if not axes or devices != math.prod(jax.sharding.get_abstract_mesh().shape.values()):
        return params
    copies = jax.shard_map(lambda table: table[None], in_specs=PartitionSpec(), out_specs=PartitionSpec(axes))
    return _changed(params, copies)


def summed(gradients: Params) -> Params:
    """The gradients of the parameters, from those of `on_each_device(parameters)`."""
    return _changed(gradients, lambda table: jnp.sum(table, axis=0) if table.ndim == 3 else table)


def _changed(params: Params, change: Callable[[jax.Array], jax.Array]) -> Params:
    first, second, last = _PATH
    encoder = params[first]
    embeddings = encoder[second]
    return {**params, first: {**encoder, second: {**embeddings, last: change(embeddings[last])}}}


def look_up(table: jax.Array, tokens_RxL: jax.Array) -> jax.Array:
    """The rows [R * L, H] of a table [V, H], or, on each device, of its copy in [D, V, H]."""
    if table.ndim == 2:
        return jnp.take(table, tokens_RxL.reshape(-1), axis=0)
    rows = PartitionSpec(row_axes(tokens_RxL.shape[0])[0])
    local = jax.shard_map(lambda own, tokens: look_up(own[0], tokens), in_specs=(rows, rows), out_specs=rows)
    return local(table, tokens_RxL)
