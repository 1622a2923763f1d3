"""Attention whose scores never reach main memory: splash attention on TPUs, a Pallas kernel on GPUs.

Both attend inside segments, within a window if there is one, and have no dropout. The GPU kernel is our own, since
JAX's has no window; the algorithm is FlashAttention-2 (Dao, arXiv 2307.08691). cuDNN's attention would need a mask of
L x L values for packed texts, and cannot be compiled without a GPU.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from kd_jax.types import UserError, row_axes

# Row lengths must be multiples of these: the kernels' block sizes.
_MULTIPLE = {"splash": 128, "triton": 64}


class Kernel(NamedTuple):
    """How attention is computed.

    required: what the kernel does not support is an error; otherwise plain attention computes it. interpret: the kernel
    runs as plain operations, slowly, on any device.
    """

    name: Literal["plain", "splash", "triton"] = "plain"
    required: bool = False
    interpret: bool = False


PLAIN = Kernel()


def find_kernel(setting: str, mesh: jax.sharding.Mesh) -> Kernel:
    """The kernel that config.attention (auto, plain or fused) selects for the devices of a mesh, real or not."""
    platform = mesh.devices.flat[0].platform
    accelerated = platform in ("tpu", "gpu", "cuda", "rocm")
    if setting == "plain" or (setting == "auto" and not accelerated):
        return PLAIN
    return Kernel("splash" if platform == "tpu" else "triton", setting == "fused", not accelerated)


def computes(kernel: Kernel, length: int, dropout: bool) -> bool:
    """Whether the kernel supports rows of that length. Raises UserError if it does not and is required."""
    problem = ""
    if kernel.name == "plain":
        return False
    if dropout:
        problem = "has no dropout; set attention_dropout of the trained model to 0"
    elif length % _MULTIPLE[kernel.name]:
        problem = f"needs rows of a multiple of {_MULTIPLE[kernel.name]} tokens, not {length}; change rows.length"
    elif jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1 and not kernel.interpret:
        return False  # without a mesh, XLA would have to split the kernel over the devices, and cannot
    if problem and kernel.required:
        raise UserError(f"config.attention: fused attention {problem}, or use auto")
    return not problem


def fused_attention(
    kernel: Kernel,
    query_RxLxNxD: jax.Array,
    key_RxLxNxD: jax.Array,
    value_RxLxNxD: jax.Array,
    segment_ids_RxL: jax.Array,
    local: jax.Array | bool,
    half_window: int,
) -> jax.Array:
    """The mixed values [R, L, N, D] of scaled queries, each over the keys of its segment.

    local: only keys at most `half_window` tokens away; if traced, it chooses between two kernels. On a mesh every
    device attends in its own rows, and in its own heads if they divide along `tensor`.
    """
    run: Any = {"splash": _splash, "triton": _triton}[kernel.name]

    def on_device(query: Any, key: Any, value: Any, segments: Any, traced: Any = None) -> jax.Array:
        def within(window: int | None) -> Callable[..., jax.Array]:
            return lambda *given: run(*given, window, kernel.interpret)

        given = query, key, value, segments
        if isinstance(local, bool):
            return within(half_window if local else None)(*given)
        return jax.lax.cond(traced, within(half_window), within(None), *given)

    arrays = [query_RxLxNxD, key_RxLxNxD, value_RxLxNxD, segment_ids_RxL]
    if not isinstance(local, bool):
        arrays.append(local)
    return _each_on_its_part(on_device, query_RxLxNxD.shape)(*arrays)


def _each_on_its_part(on_device: Callable[..., jax.Array], shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return on_device
    rows, _ = row_axes(shape[0])
    tensor = mesh.shape.get("tensor", 1)
    heads = "tensor" if tensor > 1 and shape[2] % tensor == 0 else None
    whole = PartitionSpec(rows or None, None, heads, None)

    def split(*arrays: jax.Array) -> jax.Array:
        specs = (*(whole,) * 3, PartitionSpec(rows or None, None), *(PartitionSpec(),) * (len(arrays) - 4))
        # Over all axes: a kernel cannot be split along an axis that is left to XLA.
        names = set(mesh.axis_names)
        return jax.shard_map(on_device, in_specs=specs, out_specs=whole, axis_names=names, check_vma=False)(*arrays)

    return split


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, window: int | None, interpret: bool
) -> jax.Array:
    """JAX's kernel for TPUs."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, size = query.shape[1:]
    square = (length, length)
    mask = splash.FullMask(square) if window is None else splash.LocalMask(square, (window, window), 0)
    block = math.gcd(length, 512)
    forward = {"block_q": block, "block_kv": block}
    backward = {"block_q_dkv": block, "block_kv_dkv": block, "use_fused_bwd_kernel": True}
    # Arrays are stored in tiles 128 wide, which smaller heads do not fill.
    layout = splash.QKVLayout.SEQ_MINOR if size % 128 else splash.QKVLayout.HEAD_DIM_MINOR
    layouts = dict.fromkeys(("q_layout", "k_layout", "v_layout"), layout)
    attention: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**forward, **backward, **layouts),
        interpret=interpret,
    )

    def row(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        return attention(query, key, value, splash.SegmentIds(ids, ids))

    query, key, value = (jnp.swapaxes(array, 1, 2) for array in (query, key, value))
    return jnp.swapaxes(jax.vmap(row)(query, key, value, segments), 1, 2)


# The GPU kernel. Scores are in base 2, where exponentials are fastest.

_LOWEST = -1e30  # a masked score; not -inf, whose differences are nan


def _scores(
    query_QxD: jax.Array, key_KxD: jax.Array, segments: Any, first_query: Any, first_key: Any, window: int | None
) -> jax.Array:
    """Masked scores [Q, K] of two blocks of one row, which start at the given columns."""
    queries, keys = query_QxD.shape[0], key_KxD.shape[0]
    scores = _triton_language().dot(query_QxD, key_KxD.T) * math.log2(math.e)
    ids = segments[pl.ds(first_query, queries)][:, None], segments[pl.ds(first_key, keys)][None, :]
    mask = ids[0] == ids[1]
    if window is not None:
        away = (first_query + jnp.arange(queries))[:, None] - (first_key + jnp.arange(keys))[None, :]
        mask = mask & (jnp.abs(away) <= window)
    return jnp.where(mask, scores, _LOWEST)


def _blocks_near(first: Any, block: int, other: int, length: int, window: int | None) -> tuple[Any, Any]:
    """The range of blocks of `other` columns that a block at `first` sees."""
    if window is None:
        return 0, length // other
    lowest = jnp.maximum(first - window, 0)
    return lowest // other, jnp.minimum((first + block + window + other - 1) // other, length // other)


def _forward_kernel(
    query: Any,
    key: Any,
    value: Any,
    segments: Any,
    mixed: Any,
    log_sums: Any,
    *,
    other: int,
    head: int,
    window: int | None,
) -> None:
    """The mixed values of one block of queries, and the log-sum-exp of their scores."""
    language = _triton_language()
    block, length = query.shape[0], key.shape[0]
    first = pl.program_id(0) * block
    inside = (jnp.arange(query.shape[-1]) < head)[None, :]  # heads are padded to a power of 2
    query_QxD = language.load(query, mask=inside, other=0.0)

    def add(number: Any, carry: Any) -> Any:
        mixed_QxD, sums_Q, largest_Q = carry
        columns = pl.ds(number * other, other)
        key_KxD = language.load(key.at[columns, :], mask=inside, other=0.0)
        value_KxD = language.load(value.at[columns, :], mask=inside, other=0.0)
        scores = _scores(query_QxD, key_KxD, segments, first, number * other, window)
        above_Q = jnp.maximum(largest_Q, jnp.max(scores, axis=1))
        shares = jnp.exp2(scores - above_Q[:, None])
        less_Q = jnp.exp2(largest_Q - above_Q)
        added = language.dot(shares.astype(value_KxD.dtype), value_KxD)
        return mixed_QxD * less_Q[:, None] + added, sums_Q * less_Q + jnp.sum(shares, axis=1), above_Q

    start = jnp.zeros(query_QxD.shape, jnp.float32), jnp.zeros(block, jnp.float32), jnp.full(block, -jnp.inf)
    bounds = _blocks_near(first, block, other, length, window)
    mixed_QxD, sums_Q, largest_Q = jax.lax.fori_loop(*bounds, add, start)
    log_sums[...] = largest_Q + jnp.log2(sums_Q)
    language.store(mixed, (mixed_QxD / sums_Q[:, None]).astype(mixed.dtype), mask=inside)


def _backward_kernel(
    query: Any,
    key: Any,
    value: Any,
    segments: Any,
    given: Any,
    log_sums: Any,
    products: Any,
    d_query: Any,
    d_key: Any,
    d_value: Any,
    *,
    head: int,
    window: int | None,
) -> None:
    """Gradients of one block's queries, and of its keys and values. products: sums over D of output times gradient."""
    language = _triton_language()
    length, block = query.shape[0], d_query.shape[0]
    first = pl.program_id(2) * block
    inside = (jnp.arange(query.shape[-1]) < head)[None, :]
    own = pl.ds(first, block)
    blocks = _blocks_near(first, block, block, length, window)
    zeros = jnp.zeros(d_query.shape, jnp.float32)

    def load(array: Any, columns: Any) -> jax.Array:
        return language.load(array.at[columns, :], mask=inside, other=0.0)

    def shares_and_slopes(
        query_QxD: jax.Array,
        key_KxD: jax.Array,
        value_KxD: jax.Array,
        given_QxD: jax.Array,
        first_query: Any,
        first_key: Any,
    ) -> tuple[jax.Array, jax.Array]:
        columns = pl.ds(first_query, block)
        scores = _scores(query_QxD, key_KxD, segments, first_query, first_key, window)
        shares = jnp.exp2(scores - log_sums[columns][:, None])
        return shares, shares * (language.dot(given_QxD, value_KxD.T) - products[columns][:, None])

    key_KxD, value_KxD = load(key, own), load(value, own)

    def add_queries(number: Any, carry: Any) -> Any:
        columns = pl.ds(number * block, block)
        query_QxD, given_QxD = load(query, columns), load(given, columns)
        shares, slopes = shares_and_slopes(query_QxD, key_KxD, value_KxD, given_QxD, number * block, first)
        to_key = language.dot(slopes.astype(query_QxD.dtype).T, query_QxD)
        return carry[0] + to_key, carry[1] + language.dot(shares.astype(given_QxD.dtype).T, given_QxD)

    for array, total in zip((d_key, d_value), jax.lax.fori_loop(*blocks, add_queries, (zeros, zeros)), strict=True):
        language.store(array, total.astype(array.dtype), mask=inside)

    query_QxD, given_QxD = load(query, own), load(given, own)

    def add_keys(number: Any, carry: Any) -> Any:
        columns = pl.ds(number * block, block)
        key_KxD, value_KxD = load(key, columns), load(value, columns)
        _, slopes = shares_and_slopes(query_QxD, key_KxD, value_KxD, given_QxD, first, number * block)
        return carry + language.dot(slopes.astype(key_KxD.dtype), key_KxD)

    total = jax.lax.fori_loop(*blocks, add_keys, zeros)
    language.store(d_query, total.astype(d_query.dtype), mask=inside)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _triton(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, window: int | None, interpret: bool
) -> jax.Array:
    return _triton_forward(query, key, value, segments, window, interpret)[0]


def _triton_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array, window: int | None, interpret: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    rows, length, heads, size = query.shape
    padded = max(pl.next_power_of_2(size), 16)
    block = 128 if length % 128 == 0 and padded <= 64 else 64
    own = pl.BlockSpec((None, block, None, padded), lambda i, r, n: (r, i, n, 0))
    all_of_row = pl.BlockSpec((None, length, None, padded), lambda i, r, n: (r, 0, n, 0))
    kernel = functools.partial(_forward_kernel, other=64, head=size, window=window)
    mixed, log_sums = pl.pallas_call(
        kernel,
        grid=(length // block, rows, heads),
        in_specs=[own, all_of_row, all_of_row, pl.BlockSpec((None, length), lambda i, r, n: (r, 0))],
        out_specs=[own, pl.BlockSpec((None, None, block), lambda i, r, n: (r, n, i))],
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((rows, heads, length), jnp.float32),
        ],
        compiler_params=_parameters(padded),
        interpret=interpret,
        name="attention_forward",
    )(query, key, value, segments)
    return mixed, (query, key, value, segments, mixed, log_sums)


def _triton_backward(
    window: int | None, interpret: bool, kept: tuple[jax.Array, ...], given: jax.Array
) -> tuple[jax.Array | None, ...]:
    query, key, value, segments, mixed, log_sums = kept
    rows, length, heads, size = query.shape
    padded, block = max(pl.next_power_of_2(size), 16), 64
    products = jnp.sum(mixed.astype(jnp.float32) * given.astype(jnp.float32), axis=-1)
    all_of_row = pl.BlockSpec((None, length, None, padded), lambda r, n, i: (r, 0, n, 0))
    by_column = pl.BlockSpec((None, None, length), lambda r, n, i: (r, n, 0))
    own = pl.BlockSpec((None, block, None, padded), lambda r, n, i: (r, i, n, 0))
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, head=size, window=window),
        grid=(rows, heads, length // block),
        in_specs=[
            *(all_of_row, all_of_row, all_of_row, pl.BlockSpec((None, length), lambda r, n, i: (r, 0))),
            *(all_of_row, by_column, by_column),
        ],
        out_specs=[own, own, own],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype)] * 3,
        compiler_params=_parameters(padded),
        interpret=interpret,
        name="attention_backward",
    )(query, key, value, segments, given, log_sums, jnp.swapaxes(products, 1, 2))
    return *gradients, None


_triton.defvjp(_triton_forward, _triton_backward)


def _triton_language() -> Any:
    from jax.experimental.pallas import triton

    return triton


def _parameters(size: int) -> Any:
    return _triton_language().CompilerParams(num_warps=4 if size <= 64 else 8, num_stages=2)
