"""The device mesh, and the one table that says which dimension of a parameter lies along which of its axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from kd_jax.types import Batch, UserError

AXES = ("data", "fsdp", "tensor")

# Logical name of a parameter's dimension -> mesh axis; None keeps the dimension whole on every device.
RULES: Mapping[str, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "layers": None,
    "positions": None,
}

# A parameter of so many elements (16 MiB in float32) or more must not stay whole because a rule cannot be applied.
LARGE = 2**22


def make_mesh(mesh: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the axes ("data", "fsdp", "tensor") of `config.mesh`; -1 on one axis takes the devices that are left.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: int(mesh[axis]) for axis in AXES}
    written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()) or list(sizes.values()).count(-1) > 1:
        raise UserError(f"config.mesh: {written}; each size is at least 1, or -1 on one axis for the devices left")
    known = math.prod(size for size in sizes.values() if size != -1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes.values())
    if math.prod(shape) != len(devices):
        raise UserError(
            f"config.mesh: {written} do not multiply to the {len(devices)} devices here; change the sizes, or leave "
            "one axis at -1"
        )
    # Auto is stated because the default became Explicit, which would ask for a sharding in every operation.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shardings(mesh: Mesh, logical_axes: Any, abstract: Any, rules: Mapping[str, str | None] = RULES) -> Any:
    """The NamedSharding of every parameter, as a tree like `abstract`.

    logical_axes: the same tree with a tuple of names (or None) for each array, one a dimension. A mesh axis serves only
    one dimension of an array, the first that asks. A dimension that its mesh axis does not divide stays whole, unless
    the parameter has `LARGE` elements or more: then UserError, so that memory is not lost silently. ValueError for a
    logical name without a rule.
    """

    def one(path, names: tuple[str | None, ...], array) -> NamedSharding:
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(names) != len(array.shape):
            raise ValueError(f"{place}: {len(names)} logical axes {names} for the shape {array.shape}")
        spec, used = [], set()
        for name, size in zip(names, array.shape, strict=True):
            if name is not None and name not in rules:
                raise ValueError(f"{place}: no rule for the logical axis {name!r} of {names}")
            axis = None if name is None else rules[name]
            if axis is None or axis in used or mesh.shape[axis] == 1:
                spec.append(None)
            elif size % mesh.shape[axis] == 0:
                spec.append(axis)
                used.add(axis)
            elif math.prod(array.shape) >= LARGE:
                raise UserError(
                    f"config.mesh.{axis}: {mesh.shape[axis]} does not divide dimension {name!r} of {place}, shape "
                    f"{tuple(array.shape)}, which is too large to keep whole everywhere; choose a divisor of {size}"
                )
            else:
                spec.append(None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, logical_axes, abstract, is_leaf=lambda leaf: isinstance(leaf, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def describe_shardings(abstract: Any, tree: Any) -> list[str]:
    """The table printed at the start of a run: a line for each array with its name, shape, spec and MiB a device."""
    rows, total, held = [], 0, 0
    arrays = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, array), sharding in zip(arrays, jax.tree.leaves(tree), strict=True):
        elements, here = math.prod(array.shape), math.prod(sharding.shard_shape(tuple(array.shape)))
        width = np.dtype(array.dtype).itemsize
        total, held = total + elements, held + here * width
        layout = " x ".join(
            f"{size}/{axis}" if axis else str(size)
            for size, axis in zip(array.shape, (*sharding.spec, *[None] * len(array.shape)), strict=False)
        )
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((place, layout, f"{here * width / 2**20:.2f} MiB"))
    rows.append(("total", f"{total:,} elements", f"{held / 2**20:.2f} MiB a device"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return [f"{name:<{widths[0]}}  {layout:<{widths[1]}}  {size}" for name, layout, size in rows]


def row_multiple(mesh: Mesh) -> int:
    """A global batch has a multiple of so many rows."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ("data", "fsdp"); every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def global_batch(mesh: Mesh, local: Batch) -> dict[str, jax.Array]:
    """The global arrays of a batch of which every process gives its own rows, NumPy [rows of this process, ...].

    Raises UserError when the rows of all processes are not a multiple of `row_multiple(mesh)`.
    """
    sharding = batch_sharding(mesh)
    rows = len(next(iter(local.values()))) * jax.process_count()
    if rows % row_multiple(mesh):
        raise UserError(
            f"config.mesh: a batch of {rows} rows do not divide among data x fsdp = {row_multiple(mesh)} devices; give "
            f"a batch_size that is a multiple of {row_multiple(mesh)}"
        )
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(value)) for name, value in local.items()}
