"""Where activations lie on a mesh."""

import jax
from jax.sharding import PartitionSpec

from kd_jax.types import row_axes


def by_rows(x: jax.Array) -> jax.Array:
    """The same activations [R, ...] or [R * L, ...], of which each device that shares out rows holds its own.

    Not said, XLA may lay activations along the parameters' axes, since `fsdp` cuts both rows and parameters; every
    layer then sums activations over the devices, where gathering its parameters would be far less to move.
    """
    axes, _ = row_axes(x.shape[0])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x
