"""The device mesh, and how the dimensions of parameters and batches are split along its axes."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from kd_jax.config import execution
from kd_jax.config.execution import AXES, Rules
from kd_jax.types import ROW_AXES, Batch, UserError

DEFAULT = Rules()

# A parameter of so many elements (16 MiB in float32) or more must not stay whole because a rule cannot be applied.
LARGE = 2**22


def make_mesh(mesh: execution.Mesh, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the axes ("data", "fsdp", "tensor") of `config.mesh`; -1 on one axis takes the devices that are left.

    Devices are ordered so that neighbors on an axis are neighbors in the hardware: `tensor`, which communicates most,
    innermost. Of several slices or nodes (config.mesh.slices, or found from the devices) each holds whole blocks of the
    mesh, and `data`, then `fsdp`, reaches over the slower network between them. Raises UserError when the sizes do not
    multiply to the number of devices, or do not suit the hardware.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(mesh, axis) for axis in AXES}
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
    slices = split_slices(devices, mesh.slices)
    outer = slice_shape(shape, len(slices))
    inner = tuple(size // across for size, across in zip(shape, outer, strict=True))
    blocks = np.empty(len(slices), object)
    for number, members in enumerate(slices):
        blocks[number] = _ordered(inner, members, written)
    order = np.block(blocks.reshape(outer).tolist())
    # Auto is stated because the default became Explicit, which would ask for a sharding in every operation.
    return Mesh(order, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_slices(devices: Sequence[Any], wanted: int = 0) -> list[list[Any]]:
    """The devices of each slice or node: `wanted` many, or as many as the devices report if that is 0.

    Devices that report none are cut into equal parts in the order of their processes. Raises UserError.
    """
    by_index: dict[int, list[Any]] = {}
    for device in devices:
        by_index.setdefault(getattr(device, "slice_index", None) or 0, []).append(device)
    found = [by_index[index] for index in sorted(by_index)]
    if wanted in (0, len(found)):
        return found
    if wanted < 0 or len(found) > 1 or len(devices) % wanted:
        raise UserError(
            f"config.mesh.slices: {wanted} does not suit {len(devices)} devices in {len(found)} slices; leave it at 0"
        )
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    each = len(devices) // wanted
    return [ordered[start : start + each] for start in range(0, len(devices), each)]


def slice_shape(shape: Sequence[int], slices: int) -> tuple[int, int, int]:
    """How many slices each axis of the mesh spans: `data` as many as possible, then `fsdp`.

    Raises UserError if `tensor` would have to span several: it communicates in every layer, which would be slow.
    """
    data = math.gcd(shape[0], slices)
    fsdp = math.gcd(shape[1], slices // data)
    if data * fsdp != slices:
        raise UserError(
            f"config.mesh.data: data={shape[0]} and fsdp={shape[1]} do not divide among {slices} slices, and tensor "
            f"stays inside one; make data a multiple of {slices}"
        )
    return data, fsdp, 1


def _ordered(shape: tuple[int, ...], devices: list[Any], written: str) -> np.ndarray:
    """The devices of one slice in the order of its torus; a torus axis is split among mesh axes only if necessary."""
    try:
        return mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        pass
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except NotImplementedError as error:
        raise UserError(
            f"config.mesh: {written} cannot be laid on these {len(devices)} devices ({error}); choose sizes that are "
            "products of the sides of the torus"
        ) from None


def shardings(mesh: Mesh, logical_axes: Any, abstract: Any, rules: Rules = DEFAULT) -> Any:
    """The NamedSharding of every parameter, as a tree like `abstract`.

    logical_axes: the same tree with a tuple of names (or None) for each array, one a dimension. A mesh axis serves only
    one dimension of an array, the first that asks. A dimension that its mesh axes do not divide stays whole, unless
    the parameter has `LARGE` elements or more: then UserError, so that memory is not lost silently. ValueError for a
    logical name without a rule.
    """

    def one(path, names: tuple[str | None, ...], array) -> NamedSharding:
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        if len(names) != len(array.shape):
            raise ValueError(f"{place}: {len(names)} logical axes {names} for the shape {array.shape}")
        spec, used = [], set()
        for name, size in zip(names, array.shape, strict=True):
            if name is not None and not hasattr(rules, name):
                raise ValueError(f"{place}: no rule for the logical axis {name!r} of {names}")
            wanted = () if name is None else rules.axes(name)
            axes = tuple(axis for axis in wanted if axis not in used and mesh.shape[axis] > 1)
            count = math.prod(mesh.shape[axis] for axis in axes)
            if not axes:
                spec.append(None)
            elif size % count == 0:
                spec.append(axes[0] if len(axes) == 1 else axes)
                used.update(axes)
            elif math.prod(array.shape) >= LARGE:
                raise UserError(
                    f"config.mesh.{axes[0]}: {count} does not divide dimension {name!r} of {place}, shape "
                    f"{tuple(array.shape)}, which is too large to keep whole everywhere; choose a divisor of {size}"
                )
            else:
                spec.append(None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, logical_axes, abstract, is_leaf=lambda leaf: isinstance(leaf, tuple))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def describe_shardings(abstract: Any, tree: Any, title: str = "") -> list[str]:
    """The table printed at the start of a run: a line for each array with its name, shape, spec and MiB a device."""
    rows, total, held = [], 0, 0
    arrays = jax.tree_util.tree_leaves_with_path(abstract)
    for (path, array), sharding in zip(arrays, jax.tree.leaves(tree), strict=True):
        elements, here = math.prod(array.shape), math.prod(sharding.shard_shape(tuple(array.shape)))
        width = np.dtype(array.dtype).itemsize
        total, held = total + elements, held + here * width
        layout = " x ".join(
            f"{size}/{axis if isinstance(axis, str) else '/'.join(axis)}" if axis else str(size)
            for size, axis in zip(array.shape, (*sharding.spec, *[None] * len(array.shape)), strict=False)
        )
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((place, layout, f"{here * width / 2**20:.2f} MiB"))
    rows.append(("total", f"{total:,} elements", f"{held / 2**20:.2f} MiB a device"))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{name:<{widths[0]}}  {layout:<{widths[1]}}  {size}" for name, layout, size in rows]
    return [title, *lines] if title else lines


def row_multiple(mesh: Mesh) -> int:
    """A global batch has a multiple of so many rows."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over ("data", "fsdp"); every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def process_share(mesh: Mesh) -> tuple[int, int]:
    """(number, count): which of the `count` equal parts of a batch's rows this process reads.

    Processes that a tensor axis joins hold the same rows, and read the same part. Raises UserError for a mesh that
    gives a process a part of another's rows.
    """
    held: dict[int, set[int]] = {}
    for (data, fsdp, _), device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(data * mesh.shape["fsdp"] + fsdp)
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if len(parts) * len(parts[0]) != row_multiple(mesh) or len({len(part) for part in parts}) > 1:
        raise UserError(
            f"config.mesh: with {dict(mesh.shape)} some of the {len(held)} processes share a part of their rows only; "
            "let tensor be a multiple of a process's devices, or a divisor"
        )
    return parts.index(tuple(sorted(held[jax.process_index()]))), len(parts)


def gathered(tree: Any) -> Any:
    """The arrays of a tree in NumPy, whole in every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function with the mesh set while it is traced: kernels and losses keep rows on its devices."""

    def stated(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return stated


def placed(values: np.ndarray, sharding: Sharding) -> jax.Array:
    """An array of which every device gets its own part, read from `values`, which may be memory-mapped."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: np.ascontiguousarray(values[index]))


def local_rows(mesh: Mesh, array: jax.Array) -> np.ndarray:
    """The rows that are this process's part, of a global array with a batch's rows on its first dimension."""
    if jax.process_count() == 1:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard.data for shard in _by_rows(mesh)(array).addressable_shards}
    return np.concatenate([np.asarray(shards[first]) for first in sorted(shards)])


@functools.cache
def _by_rows(mesh: Mesh):
    """Brings an array, wherever the compiler left it, to where the rows of a batch lie."""
    return jax.jit(lambda array: array, out_shardings=batch_sharding(mesh))


def global_batch(mesh: Mesh, local: Batch) -> dict[str, jax.Array]:
    """The global arrays of a batch of which every process gives its part, NumPy [rows of `process_share`, ...].

    Raises UserError when the rows of all parts are not a multiple of `row_multiple(mesh)`.
    """
    sharding = batch_sharding(mesh)
    parts = process_share(mesh)[1]
    rows = len(next(iter(local.values()))) * parts
    if rows % row_multiple(mesh):
        raise UserError(
            f"config.mesh: a batch of {rows} rows do not divide among data x fsdp = {row_multiple(mesh)} devices; give "
            f"a batch_size that is a multiple of {row_multiple(mesh)}"
        )
    # The global shape is stated: inferred from a part that several processes read, it would be theirs alone.
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value), (rows, *np.shape(value)[1:]))
        for name, value in local.items()
    }
