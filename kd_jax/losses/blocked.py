"""Losses of logits that are never in memory at once: computed, used and dropped one block of positions at a time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kd_jax.types import Array, row_axes

# Adding a block's gradient to the table's takes about as long as this many more positions in a block.
_POSITIONS_PER_BLOCK = 16


Loss = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]  # (logits, per position, constants) -> (loss, sums)


class Layout(NamedTuple):
    """The number of parts that rows and slots are cut into, and the mesh axes that share out the rows."""

    parts: tuple[int, int]
    axes: tuple[str, ...]


def blocked_losses(
    loss_of_logits: Loss,
    features_RxKxH: Array,
    table_VxH: Array,
    bias_V: Array | None,
    per_position: Any,
    constants: Any,
    *,
    block: int,
) -> tuple[jax.Array, Any]:
    """The losses of logits = features @ table.T + bias, of which only about `block` positions exist at a time.

    loss_of_logits(logits_BxV, per_position_B, constants) -> (float32 loss, pytree of float32 sums) is called once per
    block; its results are summed. logits are float32. per_position: pytree of arrays [R, K, ...], passed as [B, ...].
    Where K is padded to make equal blocks, features and per_position are 0, so a weight of 0 must exclude a position.
    constants: pytree of all other arrays; loss_of_logits must not close over traced values. features and table may be
    bfloat16: products accumulate in float32, and reductions are in float32.

    Differentiable in features, table and bias. The gradient of each block is computed together with its value, as in
    "cut cross entropy" (Wijmans et al., arXiv 2411.09009), and only gradients of the size of features and table are
    kept: memory does not grow with the number of positions times the vocabulary.

    On a mesh (see `row_axes`) every device takes blocks of its own rows, `block` positions each, and sums are reduced
    over the devices once, at the end. A table [D, V, H] has a copy for each of these devices, and so has its gradient.
    """
    features_RxKxH, table_VxH = jnp.asarray(features_RxKxH), jnp.asarray(table_VxH)
    rows, slots, _ = features_RxKxH.shape
    axes, devices = row_axes(rows)
    layout = Layout(block_parts(rows // devices, slots, block), axes)
    per_position, constants = jax.tree.map(jnp.asarray, (per_position, constants))
    return _blocked(loss_of_logits, layout, (features_RxKxH, table_VxH, bias_V, per_position, constants))


def on_own_rows(
    local: Callable[..., Any], axes: tuple[str, ...], by_row: tuple[Any, ...], outputs: Any
) -> Callable[..., Any]:
    """Applies `local` to each device's own rows.

    by_row, outputs: pytree prefixes of the arguments and the result, True where they have rows.
    """
    # Without shard_map XLA would sum the table's gradient over all devices after every block.
    if not axes:
        return local

    def spec(has_rows: bool) -> PartitionSpec:
        return PartitionSpec(axes) if has_rows else PartitionSpec()

    specs = jax.tree.map(spec, by_row), jax.tree.map(spec, outputs)
    # Axes of size 1 too: Pallas kernels compile only where XLA has nothing left to partition.
    names = {*axes, *(name for name, size in jax.sharding.get_abstract_mesh().shape.items() if size == 1)}
    return jax.shard_map(local, in_specs=specs[0], out_specs=specs[1], axis_names=names, check_vma=False)


def sum_over_devices(tree: Any, axes: tuple[str, ...]) -> Any:
    """The sum over the devices that share out the rows."""
    return jax.lax.psum(tree, axes) if axes else tree


def block_for(vocab_size: int) -> int:
    """The default number of positions per block: 64 MiB of float32 logits."""
    return max(128, 2**24 // vocab_size)


def with_bias_inside(
    features: jax.Array, table_VxH: jax.Array, bias_V: Array | None
) -> tuple[jax.Array, jax.Array, Array | None]:
    """Features [..., H], table and bias with the same logits; in float32 the bias becomes a column of the table."""
    # A separate addition costs a pass over the logits, and on a CPU a copy of them; its gradient costs another pass. In
    # bfloat16 the bias would be rounded, and the hardware that computes in it prefers even sizes.
    if bias_V is None or features.dtype != jnp.float32:
        return features, table_VxH, bias_V
    table_VxI = jnp.concatenate([table_VxH.astype(jnp.float32), jnp.asarray(bias_V, jnp.float32)[:, None]], axis=1)
    ones = jnp.ones((*features.shape[:-1], 1), jnp.float32)
    return jnp.concatenate([features, ones], axis=-1), table_VxI, None


def logits_of(features_BxH: jax.Array, table_VxH: jax.Array, bias_V: Array | None) -> jax.Array:
    """features @ table.T + bias, float32 [B, V]."""
    table_VxH = table_VxH.astype(features_BxH.dtype)
    logits_BxV = jnp.einsum("bh,vh->bv", features_BxH, table_VxH, preferred_element_type=jnp.float32)
    return logits_BxV if bias_V is None else logits_BxV + jnp.asarray(bias_V, jnp.float32)[None, :]


def block_parts(rows: int, slots: int, block: int) -> tuple[int, int]:
    """The number of parts that rows and slots are cut into, (n, m), so that rows / n * ceil(slots / m) <= block.

    n divides `rows`; `slots` may be padded. Of all choices the one with the least work, then the one that cuts the
    fewest rows, so that rows stay on their devices. ValueError for a `block` below 1.
    """
    if block < 1:
        raise ValueError(f"block: {block} positions; give at least 1")

    def work(parts: tuple[int, int]) -> tuple[int, int]:
        row_parts, slot_parts = parts
        return rows * slot_parts * math.ceil(
            slots / slot_parts
        ) + _POSITIONS_PER_BLOCK * row_parts * slot_parts, row_parts

    choices: list[tuple[int, int]] = []
    for row_parts in (n for n in range(1, rows + 1) if rows % n == 0):
        most = block // (rows // row_parts)  # slots of these rows that fit a block
        if most:
            choices.append((row_parts, math.ceil(slots / min(most, slots))))
    return min(choices, key=work)


def _split(values: jax.Array, parts: tuple[int, int]) -> jax.Array:
    """[R, K, ...] -> [blocks, B, ...]. A block takes every n-th row, so that each device has a part of every block."""
    row_parts, slot_parts = parts
    rows, slots, *rest = values.shape
    size = math.ceil(slots / slot_parts)
    padding = [(0, 0), (0, size * slot_parts - slots)] + [(0, 0)] * len(rest)
    cut = jnp.pad(values, padding).reshape(rows // row_parts, row_parts, slot_parts, size, *rest)
    return jnp.moveaxis(cut, 0, 2).reshape(row_parts * slot_parts, rows // row_parts * size, *rest)


def _join(blocks: jax.Array, parts: tuple[int, int], rows: int, slots: int) -> jax.Array:
    """The inverse of `_split`: [blocks, B, ...] -> [R, K, ...]."""
    row_parts, slot_parts = parts
    rest = blocks.shape[2:]
    cut = blocks.reshape(row_parts, slot_parts, rows // row_parts, -1, *rest)
    return jnp.moveaxis(cut, 2, 0).reshape(rows, -1, *rest)[:, :slots]


def _sum_over_blocks(of_block: Callable[[Any], tuple[Any, Any]], blocks: Any) -> tuple[Any, Any]:
    """(sums over blocks of the first result, stacked second results); without a loop when there is one block."""
    count = jax.tree.leaves(blocks)[0].shape[0]
    if count == 1:
        sums, stacked = of_block(jax.tree.map(lambda leaf: leaf[0], blocks))
        return sums, jax.tree.map(lambda leaf: leaf[None], stacked)
    shapes, _ = jax.eval_shape(of_block, jax.tree.map(lambda leaf: leaf[0], blocks))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def body(total: Any, block: Any):
        sums, stacked = of_block(block)
        return jax.tree.map(jnp.add, total, sums), stacked

    return jax.lax.scan(body, zeros, blocks)


# Features [R, K, H], table [V, H] or [D, V, H], bias [V] or None, per position, constants.
_Operands = tuple[jax.Array, jax.Array, Array | None, Any, Any]


def _by_row(operands: _Operands) -> tuple[bool, ...]:
    """Which operands differ between devices."""
    return True, operands[1].ndim == 3, False, True, False


def own_table(table: jax.Array) -> jax.Array:
    """The table [V, H] of one device, from its part of [D, V, H] or the shared table."""
    return table[0] if table.ndim == 3 else table


def _narrow(operands: _Operands) -> _Operands:
    """With the table in the dtype of the features: devices then gather it in the dtype that it is multiplied in."""
    features_RxKxH, table_VxH, bias_V, per_position, constants = operands
    return features_RxKxH, table_VxH.astype(features_RxKxH.dtype), bias_V, per_position, constants


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _blocked(loss_of_logits: Loss, layout: Layout, operands: _Operands) -> tuple[jax.Array, Any]:
    def local(*operands: Any) -> Any:
        features_RxKxH, table, bias_V, per_position, constants = operands
        features_RxKxI, table_VxI, bias_V = with_bias_inside(features_RxKxH, own_table(table), bias_V)

        def of_block(block: Any) -> tuple[Any, None]:
            features_BxI, per_position_B = block
            return loss_of_logits(logits_of(features_BxI, table_VxI, bias_V), per_position_B, constants), None

        blocks = jax.tree.map(lambda leaf: _split(leaf, layout.parts), (features_RxKxI, per_position))
        return sum_over_devices(_sum_over_blocks(of_block, blocks)[0], layout.axes)

    return on_own_rows(local, layout.axes, _by_row(operands), False)(*_narrow(operands))


def _blocked_forward(loss_of_logits: Loss, layout: Layout, operands: _Operands):
    def local(*operands: Any) -> Any:
        return _values_and_gradients(loss_of_logits, layout, *operands)

    by_row = _by_row(operands)
    run = on_own_rows(local, layout.axes, by_row, (False, by_row[:3]))
    value, (by_features, by_table_VxH, by_bias_V) = run(*_narrow(operands))
    _, table_VxH, bias_V, _, _ = operands
    if bias_V is not None:
        by_bias_V = by_bias_V.astype(bias_V.dtype)
    return value, (by_features, by_table_VxH.astype(table_VxH.dtype), by_bias_V)


def _values_and_gradients(
    loss_of_logits: Loss,
    layout: Layout,
    features_RxKxH: Any,
    table: Any,
    bias_V: Any,
    per_position: Any,
    constants: Any,
) -> tuple[Any, tuple[Any, ...]]:
    """(losses, gradients of features, table and bias), the latter two float32, summed over the devices except for the
    gradient of a device's own table."""
    parts, table_VxH = layout.parts, own_table(table)
    hidden, dtype = features_RxKxH.shape[2], features_RxKxH.dtype
    features_RxKxI, table_VxI, outer_bias_V = with_bias_inside(features_RxKxH, table_VxH, bias_V)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def of_block(block: Any) -> tuple[Any, jax.Array]:
        features_BxI, per_position_B = block
        logits_BxV = logits_of(features_BxI, table_VxI, outer_bias_V)
        value, gradient_BxV = jax.value_and_grad(loss_of_logits, has_aux=True)(logits_BxV, per_position_B, constants)
        narrow_BxV = gradient_BxV.astype(dtype)
        by_features_BxH = product("bv,vh->bh", narrow_BxV, table_VxH.astype(dtype)).astype(dtype)
        # [I, V], so that the small factor is the one that is transposed; the barrier keeps XLA from swapping them.
        by_table_IxV = jax.lax.optimization_barrier(product("bi,bv->iv", features_BxI, narrow_BxV))
        by_bias_V = None if outer_bias_V is None else jnp.sum(gradient_BxV, axis=0)
        return (value, by_table_IxV, by_bias_V), by_features_BxH

    blocks = jax.tree.map(lambda leaf: _split(leaf, parts), (features_RxKxI, per_position))
    sums, by_features = _sum_over_blocks(of_block, blocks)
    if table.ndim == 2:
        sums = sum_over_devices(sums, layout.axes)
    value, by_table_IxV, by_bias_V = sums
    if bias_V is not None and by_bias_V is None:
        by_bias_V = by_table_IxV[hidden]
    by_table = by_table_IxV[:hidden].T
    if table.ndim == 3:
        by_table, (value, by_bias_V) = by_table[None], sum_over_devices((value, by_bias_V), layout.axes)
    return value, (_join(by_features, parts, *features_RxKxH.shape[:2]), by_table, by_bias_V)


def _blocked_backward(loss_of_logits: Loss, layout: Layout, gradients: Any, cotangents: Any):
    del loss_of_logits, layout
    scaled = jax.tree.map(lambda leaf: (leaf * cotangents[0]).astype(leaf.dtype), gradients)
    return ((*scaled, None, None),)


_blocked.defvjp(_blocked_forward, _blocked_backward)
