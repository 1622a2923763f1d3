"""The Pallas kernels of `fused_losses`, for the positions of one device.

The first kernel keeps, per position, the statistics of both online softmaxes (Milakov & Gimelshein, arXiv 1805.02867)
and the sum of p_t (l_t - l_s). Then the normalizers are known, and a second kernel recomputes the tiles for the
gradient.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu, triton

from kd_jax.losses.logits import weighted_sum
from kd_jax.losses.tiling import Decoder, Tiling

# The logit of a class that only pads the vocabulary: its exp is 0, and differences of two of them are 0, not NaN.
_ABSENT = -1e30


_TPU_MEMORY = 64 * 2**20  # bytes, of about 128 MiB on most TPUs
_TPU_TILE = 4 * 2**20  # maximum bytes of a tile of features, or of tables, of both models together


def values_and_gradients(
    names: tuple[str, ...],
    tiling: Tiling,
    differentiated: bool,
    student: Decoder,
    teacher: Decoder | None,
    targets_P: jax.Array,
    weights_P: jax.Array,
    numbers: Mapping[str, jax.Array],
) -> tuple[Any, Decoder | None]:
    """((loss, sums), gradients) of positions on one device: features [P, H], table and bias float32, None without."""
    count, (size, width) = targets_P.shape[0], student.table.shape
    models = [student] if teacher is None else [student, teacher]
    plan = _plan(names, tiling, count, size, [one.table.shape[1] for one in models], student.features.dtype.itemsize)
    models = [_padded(model, weights_P, plan) for model in models]
    weights_P = _extended(weights_P.astype(jnp.float32), plan.positions, 0)
    targets_P = _extended(targets_P, plan.positions, 0)
    counts_P, inside_P = weights_P > 0, (targets_P >= 0) & (targets_P < size)
    targets_P = jnp.clip(targets_P, 0, size - 1)
    temperature = numbers["temperature"]
    inverse = 1 / temperature
    known = {"target": targets_P, "inverse": jnp.broadcast_to(inverse, targets_P.shape)}

    found = _statistics(plan, models, _columns(**known), inverse)
    losses = {}
    if "kl" in names:
        # Corresponding quantities of both models are subtracted first, so that equal logits give exactly 0.
        divergence_P = (found["cross"] / found["sum_t"] + found["top_s"] - found["top_t"]) * inverse
        divergence_P += jnp.log(found["sum_s"] / found["sum_t"])
        losses["kl"] = temperature**2 * jnp.where(divergence_P < 0, 0.0, divergence_P)  # a NaN stays
        known["center_s"] = found["top_s"] * inverse + jnp.log(found["sum_s"])
        known["center_t"] = found["top_t"] * inverse + jnp.log(found["sum_t"])
        known["kl"] = jnp.where(counts_P, numbers["kl"] * temperature * weights_P, 0.0)
    if "mlm" in names:
        known["center"] = found["top_s"] + jnp.log(found["sum"])
        losses["mlm"] = known["center"] - found["chosen"]
        known["mlm"] = jnp.where(counts_P, numbers["mlm"] * weights_P, 0.0)
    sums = {name: weighted_sum(value, weights_P) for name, value in losses.items()}
    loss = sum((numbers[name] * value for name, value in sums.items()), start=jnp.float32(0.0))
    hits_P = inside_P & (found["chosen"] >= found["top_s"])
    value = loss, sums | {"accuracy": weighted_sum(hits_P.astype(jnp.float32), weights_P)}
    if not differentiated:
        return value, None
    gradients = _gradients_on_gpu if tiling.gpu else _gradients_on_tpu
    features, table, bias = gradients(plan, models, _columns(**known))
    features = features[:count, :width].astype(student.features.dtype)
    return value, Decoder(features, table[:size, :width], None if student.bias is None else bias[:size])


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The terms, and sizes in whole tiles.

    tiling: adapted to the number of positions. positions: padded. classes: in the tables. parts: of the positions (TPU)
    or the vocabulary (GPU), whose gradients are computed one after the other; size: of such a part.
    """

    names: tuple[str, ...]
    tiling: Tiling
    positions: int
    classes: int
    parts: int
    size: int

    @property
    def rows(self) -> int:
        """Number of tiles of positions."""
        return self.positions // self.tiling.positions

    @property
    def tiles(self) -> int:
        """Number of tiles of the vocabulary, the last of which may extend beyond it."""
        return -(-self.classes // self.tiling.vocabulary)

    @property
    def logits(self) -> int:
        """The number of logits of one model, including padding."""
        return self.positions * self.tiles * self.tiling.vocabulary


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _plan(
    names: tuple[str, ...], tiling: Tiling, positions: int, classes: int, widths: list[int], itemsize: int
) -> _Plan:
    if tiling.gpu:
        positions, classes = _up(positions, tiling.positions), max(classes, tiling.vocabulary)
        parts = -(-positions * classes * itemsize // tiling.resident)
        # At least two if the tiles do not divide evenly: parts are whole tiles and may overlap.
        parts = min(max(parts, 1 + (classes % tiling.vocabulary > 0)), -(-classes // tiling.vocabulary))
        size, rows = _up(-(-classes // parts), tiling.vocabulary), tiling.positions
        parts = -(-classes // size)
    else:
        # Wide models have smaller tiles, since those of both features and both tables are in memory twice.
        most = max(128, _TPU_TILE // (sum(widths) * itemsize) // 128 * 128)
        tiling = dataclasses.replace(
            tiling, positions=min(tiling.positions, most), vocabulary=min(tiling.vocabulary, most)
        )
        most = max(1, tiling.resident // (4 * _up(widths[0], 128) * tiling.positions))  # tiles of positions in a part
        tiles = -(-positions // tiling.positions)
        parts = -(-tiles // most)
        tiles = _up(tiles, parts)
        # Several tiles must be multiples of the 128 lanes, since the transposed features take one lane per position.
        rows = _up(-(-positions // tiles), 128 if tiles > 1 else 16)
        positions = tiles * rows
        size = positions // parts
    tiles = -(-classes // tiling.vocabulary)
    splits = -(-tiles // -(-tiles // tiling.splits))  # so that none is empty
    return _Plan(names, dataclasses.replace(tiling, positions=rows, splits=splits), positions, classes, parts, size)


def _extended(values: jax.Array, size: int, axis: int, fill: float = 0) -> jax.Array:
    """The array padded with `fill` at the end of an axis, up to that size."""
    padding = [(0, size - have if number == axis else 0) for number, have in enumerate(values.shape)]
    return jnp.pad(values, padding, constant_values=fill)


def _padded(model: Decoder, weights_P: jax.Array, plan: _Plan) -> Decoder:
    """Features [P', H], 0 where the weight is 0; bias float32 [1, V'], which excludes the padding classes.

    The table is not padded, since a copy would take longer than its use, unless a GPU's products need a wider one.
    """
    # So even a NaN at a position with weight 0 has no effect.
    features, table = jnp.where(weights_P[:, None] > 0, model.features, 0), model.table
    if plan.tiling.gpu:
        width = _up(table.shape[1], plan.tiling.depth)
        features, table = _extended(features, width, 1), _extended(_extended(table, width, 1), plan.classes, 0)
    bias = jnp.zeros(model.table.shape[0]) if model.bias is None else model.bias
    bias = jnp.maximum(bias.astype(jnp.float32), _ABSENT)
    bias = _extended(bias, plan.tiles * plan.tiling.vocabulary, 0, _ABSENT)
    return Decoder(_extended(features, plan.positions, 0), table, bias[None, :])


_COLUMNS = 8  # float32 numbers per position that go into a kernel or come out of it
_STATISTICS = ("top_s", "sum_s", "top_t", "sum_t", "cross", "sum", "chosen")
_KNOWN = ("target", "inverse", "center_s", "center_t", "center", "kl", "mlm")


def _columns(**known: jax.Array) -> jax.Array:
    """Numbers per position, [P] each, as float32 [P, 8] in the order of `_KNOWN`; indices are exact below 2**24."""
    zeros = jnp.zeros(known["target"].shape, jnp.float32)
    every = [known[name].astype(jnp.float32) if name in known else zeros for name in _KNOWN]
    return jnp.stack([*every, *[zeros] * (_COLUMNS - len(every))], axis=1)


def _read(columns_ref: Any, name: str) -> jax.Array:
    """The column [B, 1] of that name."""
    number = _KNOWN.index(name)
    return columns_ref[:, number : number + 1]


# What the kernels of both platforms compute for a tile of B positions x C classes, starting at class `start`.


def _every_logits(plan: _Plan, inputs: Sequence[Any], start: Any) -> list[jax.Array]:
    """float32 [B, C] of each model; inputs: refs of features, table and bias of each."""
    logits = _logits_on_gpu if plan.tiling.gpu else _logits_on_tpu
    return [logits(plan, Decoder(*inputs[first : first + 3]), start) for first in range(0, len(inputs), 3)]


def _logits_on_tpu(plan: _Plan, model: Decoder, start: Any) -> jax.Array:
    """The logits from refs to the tile."""
    logits = _product(model.features[...], model.table[...]) + model.bias[...]
    return jnp.where(_inside(plan, start, logits.shape, 1), logits, _ABSENT) if _has_rest(plan) else logits


def _logits_on_gpu(plan: _Plan, model: Decoder, start: Any) -> jax.Array:
    """The logits from refs to whole tables, read piece by piece since a tile does not fit in registers."""
    size, depth = plan.tiling.vocabulary, plan.tiling.depth
    at, inside = pl.ds(start, size), _inside(plan, start, (size, depth), 0)

    def body(number: Any, sums: jax.Array) -> jax.Array:
        columns = pl.ds(number * depth, depth)
        table = model.table.at[at, columns]
        values = triton.load(table, mask=inside, other=0) if _has_rest(plan) else table[...]
        return sums + _product(model.features[:, columns], values)

    zeros = jnp.zeros((plan.tiling.positions, size), jnp.float32)
    return jax.lax.fori_loop(0, model.features.shape[1] // depth, body, zeros) + model.bias[:, at]


def _has_rest(plan: _Plan) -> bool:
    """Whether the last tile extends beyond the vocabulary, where memory is undefined."""
    return plan.classes % plan.tiling.vocabulary > 0


def _inside(plan: _Plan, start: Any, shape: tuple[int, int], axis: int) -> jax.Array:
    """Whether each class along an axis of a tile exists."""
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis) < plan.classes - start


def _product(features: jax.Array, table: jax.Array) -> jax.Array:
    return jax.lax.dot_general(features, table, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _is_target(columns_ref: Any, start: Any, shape: tuple[int, ...]) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1) == _read(columns_ref, "target").astype(jnp.int32) - start


def _updated(
    names: tuple[str, ...], old: dict[str, jax.Array], logits: list[jax.Array], columns_ref: Any, start: Any
) -> dict[str, jax.Array]:
    """The statistics [B, 1] updated by one more tile."""
    ours = logits[0]
    is_target = _is_target(columns_ref, start, ours.shape)
    new = {"chosen": old["chosen"] + jnp.sum(jnp.where(is_target, ours, 0.0), axis=1, keepdims=True)}

    def add(top: str, name: str, logits: jax.Array, inverse: Any) -> tuple[jax.Array, jax.Array]:
        """The terms to add to the sum, and the factor for its previous value."""
        terms = jnp.exp((logits - new[top]) * inverse)
        factor = jnp.exp((old[top] - new[top]) * inverse)
        new[name] = old[name] * factor + jnp.sum(terms, axis=1, keepdims=True)
        return terms, factor

    new["top_s"] = jnp.maximum(old["top_s"], jnp.max(ours, axis=1, keepdims=True))
    if "mlm" in names:
        add("top_s", "sum", ours, 1.0)
    if "kl" in names:
        theirs, inverse = logits[1], _read(columns_ref, "inverse")
        add("top_s", "sum_s", ours, inverse)
        new["top_t"] = jnp.maximum(old["top_t"], jnp.max(theirs, axis=1, keepdims=True))
        terms, factor = add("top_t", "sum_t", theirs, inverse)
        new["cross"] = old["cross"] * factor + jnp.sum(terms * (theirs - ours), axis=1, keepdims=True)
    return old | new


def _logits_gradient(names: tuple[str, ...], logits: list[jax.Array], columns_ref: Any, start: Any) -> jax.Array:
    """The gradient float32 [B, C] with respect to the student's logits."""
    ours = logits[0]
    gradient = jnp.zeros_like(ours)
    if "kl" in names:
        inverse = _read(columns_ref, "inverse")
        q = jnp.exp(ours * inverse - _read(columns_ref, "center_s"))
        p = jnp.exp(logits[1] * inverse - _read(columns_ref, "center_t"))
        gradient = (q - p) * _read(columns_ref, "kl")
    if "mlm" in names:
        one_hot = jnp.where(_is_target(columns_ref, start, ours.shape), 1.0, 0.0)
        gradient += (jnp.exp(ours - _read(columns_ref, "center")) - one_hot) * _read(columns_ref, "mlm")
    return gradient


# The first pass.


def _statistics(plan: _Plan, models: list[Decoder], columns_PxC: jax.Array, inverse: jax.Array) -> dict[str, jax.Array]:
    """float32 [P] each: "top_s", "top_t" the largest logits; "sum_s", "sum_t" sums of exp((logit - top) / T); "cross"
    the sum of the teacher's terms times (its logit - the student's); "sum" is "sum_s" at T = 1; "chosen" the logit of
    the target.
    """
    tiling = plan.tiling
    each = -(-plan.tiles // tiling.splits)
    features, tables, widths = [one.features for one in models], [one.table for one in models], _widths(models)
    again = 1 if tiling.gpu else plan.rows  # a TPU reads the tables for each tile of positions
    specs = _specs(plan, models, lambda row, split, tile=0: row, lambda row, split, tile=0: split * each + tile)
    run = _call(
        plan,
        partial(_statistics_on_gpu if tiling.gpu else _statistics_on_tpu, plan, each),
        ("parallel", "parallel", "arbitrary"),
        (plan.logits, 2 * widths, _bytes(*features) + _bytes(*tables) * again),
        grid=(plan.rows, tiling.splits) if tiling.gpu else (plan.rows, tiling.splits, each),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, tiling.positions, _COLUMNS), lambda row, split, *_: (split, row, 0)),
        out_shape=jax.ShapeDtypeStruct((tiling.splits, plan.positions, _COLUMNS), jnp.float32),
    )
    parts_SxPxC = run(columns_PxC, *jax.tree.leaves(models))
    parts = {name: parts_SxPxC[:, :, number] for number, name in enumerate(_STATISTICS)}
    found = {"chosen": jnp.sum(parts["chosen"], axis=0)}
    sums = {"top_s": {"sum": 1.0, "sum_s": inverse}, "top_t": {"sum_t": inverse, "cross": inverse}}
    for top, factors in sums.items():
        found[top] = jnp.max(parts[top], axis=0)
        for name, factor in factors.items():
            found[name] = jnp.sum(parts[name] * jnp.exp((parts[top] - found[top][None]) * factor), axis=0)
    return found


def _statistics_on_tpu(plan: _Plan, each: int, columns_ref: Any, *refs: Any) -> None:
    """Adds a tile to the statistics that earlier grid steps left in the output."""
    *inputs, out_ref = refs
    split, step = pl.program_id(1), pl.program_id(2)
    tile = split * each + step

    @pl.when(step == 0)
    def _():
        _write(out_ref, _nothing(plan))

    @pl.when(tile < plan.tiles)
    def _():
        start = tile * plan.tiling.vocabulary
        old = {name: out_ref[:, number : number + 1] for number, name in enumerate(_STATISTICS)}
        _write(out_ref, _updated(plan.names, old, _every_logits(plan, inputs, start), columns_ref, start))


def _statistics_on_gpu(plan: _Plan, each: int, columns_ref: Any, *refs: Any) -> None:
    """Loops over one part of the vocabulary."""
    *inputs, out_ref = refs
    first = pl.program_id(1) * each

    def body(tile: Any, old: Any) -> Any:
        start = tile * plan.tiling.vocabulary
        return _updated(plan.names, old, _every_logits(plan, inputs, start), columns_ref, start)

    _write(out_ref, jax.lax.fori_loop(first, jnp.minimum(first + each, plan.tiles), body, _nothing(plan)))


def _nothing(plan: _Plan) -> dict[str, jax.Array]:
    """The initial statistics, of no classes."""
    shape = (plan.tiling.positions, 1)
    return {name: jnp.full(shape, _ABSENT if name in ("top_s", "top_t") else 0.0, jnp.float32) for name in _STATISTICS}


def _write(out_ref: Any, values: dict[str, jax.Array]) -> None:
    for number, name in enumerate(_STATISTICS):
        out_ref[:, number : number + 1] = values[name]


# The second pass: float32 gradients with respect to features [P, H], table [V, H] and bias [V].


def _gradients_on_tpu(
    plan: _Plan, models: list[Decoder], columns_PxC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One kernel for each part of the positions. The grid visits all its positions for each tile of the vocabulary, so
    each tile of the table's gradient is written once; the gradient of the features stays on the chip."""
    tiling, parts, width = plan.tiling, plan.parts, models[0].features.shape[1]
    each, several = -(-plan.tiles // tiling.splits), parts > 1
    specs = _specs(plan, models, lambda split, step, row: row, lambda split, step, row: split * each + step)
    transposed = pl.BlockSpec((width, tiling.positions), lambda split, step, row: (0, row))

    def sum_spec(size: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (size, tiling.vocabulary), lambda split, step, row: (0, jnp.minimum(split * each + step, plan.tiles - 1))
        )

    # [H, V], so that no product in the kernel transposes its left operand.
    sums, zeros = [sum_spec(width), sum_spec(1)], [jnp.zeros((size, plan.classes), jnp.float32) for size in (width, 1)]
    features, tables, first = [one.features for one in models], [one.table for one in models], len(specs) + 1
    # The features are read for each tile of the vocabulary.
    moved = _bytes(*features) // parts * plan.tiles + _bytes(*tables) + _bytes(*zeros) * (1 + several)
    run = _call(
        plan,
        partial(_gradients_kernel, plan, each, several),
        ("parallel", "arbitrary", "arbitrary"),
        (plan.logits // parts, 2 * _widths(models) + 4 * width, moved),
        grid=(tiling.splits, each, plan.rows // parts),
        in_specs=[*specs, transposed, *(sums if several else [])],
        out_specs=[pl.BlockSpec((None, plan.size, width), lambda split, step, row: (split, 0, 0)), *sums],
        out_shape=[jax.ShapeDtypeStruct((tiling.splits, plan.size, width), jnp.float32), *map(jax.typeof, zeros)],
        input_output_aliases={first: 1, first + 1: 2} if several else {},
    )

    def body(old: list[jax.Array], part: Any) -> tuple[list[jax.Array], jax.Array]:
        columns, some = part
        inputs = [model._replace(features=one) for model, one in zip(models, some, strict=True)]
        by_features, *new = run(columns, *jax.tree.leaves(inputs), some[0].T, *(old if several else []))
        return new, jnp.sum(by_features, axis=0)

    every = columns_PxC, features
    if several:
        cut = jax.tree.map(lambda leaf: leaf.reshape(parts, plan.size, *leaf.shape[1:]), every)
        (by_table, by_bias), by_features = jax.lax.scan(body, zeros, cut)
    else:
        (by_table, by_bias), by_features = body([], every)
    return by_features.reshape(-1, width), by_table.T, by_bias[0]


def _gradients_kernel(plan: _Plan, each: int, several: bool, columns_ref: Any, *refs: Any) -> None:
    *inputs, features_ref, table_ref, bias_ref = refs
    old_refs = [inputs.pop(-2), inputs.pop()] if several else []
    transposed_ref, row = inputs.pop(), pl.program_id(2)
    step, tile = pl.program_id(1), pl.program_id(0) * each + pl.program_id(1)

    # A tile index beyond the last one maps to the last: its gradient is left as it is.
    @pl.when(tile < plan.tiles)
    def _():
        start = tile * plan.tiling.vocabulary
        gradient = _logits_gradient(plan.names, _every_logits(plan, inputs, start), columns_ref, start)
        narrow, table = gradient.astype(transposed_ref.dtype), inputs[1][...]
        if _has_rest(plan):
            table = jnp.where(_inside(plan, start, table.shape, 0), table, jnp.zeros_like(table))
        by_features = jnp.dot(narrow, table, preferred_element_type=jnp.float32)
        by_table = jnp.dot(transposed_ref[...], narrow, preferred_element_type=jnp.float32)
        by_bias = jnp.sum(gradient, axis=0, keepdims=True)
        size = plan.tiling.positions
        at = pl.ds(pl.multiple_of(row * size, size), size)

        @pl.when(step == 0)
        def _():
            features_ref[at, :] = by_features

        @pl.when(step > 0)
        def _():
            features_ref[at, :] += by_features

        @pl.when(row == 0)
        def _():
            table_ref[...] = by_table + old_refs[0][...] if several else by_table
            bias_ref[...] = by_bias + old_refs[1][...] if several else by_bias

        @pl.when(row > 0)
        def _():
            table_ref[...] += by_table
            bias_ref[...] += by_bias


def _gradients_on_gpu(
    plan: _Plan, models: list[Decoder], columns_PxC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel writes the logits' gradient, in the dtype of the features, for a part of the vocabulary at a time, and
    XLA multiplies it. A tile of the table's gradient does not fit in registers, and if many programs added to it in
    memory, the result would depend on their order."""
    tiling, parts, size = plan.tiling, plan.parts, plan.size
    features, table, _ = models[0]
    moved = _bytes(*(model.features for model in models)) + _bytes(*(model.table for model in models)) // parts
    specs = _specs(plan, models, lambda row, tile: row, lambda row, tile: 0)
    run = _call(
        plan,
        partial(_logits_gradient_kernel, plan),
        (),
        (plan.positions * size, 2 * _widths(models), moved + plan.positions * size * features.dtype.itemsize),
        grid=(plan.rows, size // tiling.vocabulary),
        in_specs=[pl.BlockSpec((1, 1), lambda row, tile: (0, 0)), *specs],
        out_specs=pl.BlockSpec((tiling.positions, tiling.vocabulary), lambda row, tile: (row, tile)),
        out_shape=jax.ShapeDtypeStruct((plan.positions, size), features.dtype),
    )
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    def body(part: Any, sums: Any) -> Any:
        by_features, by_table, by_bias = sums
        # The last part ends with the vocabulary, so it may overlap the one before it. Both compute the same gradient
        # for the shared rows; in the gradient of the features they count once.
        first = jnp.minimum(part * size, plan.classes - size)
        gradient = run(first.reshape(1, 1), columns_PxC, *jax.tree.leaves(models))
        some = jax.lax.dynamic_slice_in_dim(table, first, size)
        some = jnp.where((first + jnp.arange(size) >= part * size)[:, None], some, 0)
        new = product("pv,ph->vh", gradient, features), jnp.sum(gradient, axis=0, dtype=jnp.float32)
        return (
            by_features + product("pv,vh->ph", gradient, some),
            jax.lax.dynamic_update_slice_in_dim(by_table, new[0], first, 0),
            jax.lax.dynamic_update_slice_in_dim(by_bias, new[1], first, 0),
        )

    zeros = jnp.zeros(features.shape, jnp.float32), jnp.zeros(table.shape, jnp.float32), jnp.zeros(plan.classes)
    return jax.lax.fori_loop(0, parts, body, zeros)


def _logits_gradient_kernel(plan: _Plan, first_ref: Any, columns_ref: Any, *refs: Any) -> None:
    *inputs, out_ref = refs
    start = first_ref[0, 0] + pl.program_id(1) * plan.tiling.vocabulary
    logits = _every_logits(plan, inputs, start)
    out_ref[...] = _logits_gradient(plan.names, logits, columns_ref, start).astype(out_ref.dtype)


# Calls of Pallas.


def _specs(plan: _Plan, models: list[Decoder], row: Any, tile: Any) -> list[pl.BlockSpec]:
    """Block specs of the columns, and of features, table (the whole table on a GPU) and bias of each model.

    row, tile: grid indices -> index of the tile of positions and of the vocabulary.
    """
    tiling = plan.tiling

    def of(model: Decoder) -> list[pl.BlockSpec]:
        width, size = model.table.shape[1], model.bias.shape[1]
        features = pl.BlockSpec((tiling.positions, width), lambda *at: (row(*at), 0))
        if tiling.gpu:
            whole = (plan.classes, width), (1, size)
            return [features, *(pl.BlockSpec(shape, lambda *at: (0, 0)) for shape in whole)]

        def last(*at: Any) -> Any:
            return jnp.minimum(tile(*at), plan.tiles - 1)

        table = pl.BlockSpec((tiling.vocabulary, width), lambda *at: (last(*at), 0))
        return [features, table, pl.BlockSpec((1, tiling.vocabulary), lambda *at: (0, last(*at)))]

    columns = pl.BlockSpec((tiling.positions, _COLUMNS), lambda *at: (row(*at), 0))
    return [columns, *(spec for model in models for spec in of(model))]


def _widths(models: list[Decoder]) -> int:
    return sum(model.table.shape[1] for model in models)


def _bytes(*arrays: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _call(
    plan: _Plan,
    kernel: Any,
    semantics: tuple[Any, ...],
    cost: tuple[int, int, int],
    **options: Any,
) -> Callable[..., Any]:
    """A Pallas call. semantics: of the grid's axes on a TPU. cost, for XLA's scheduler and for reports: the number of
    logits, the FLOPs of the products for each, and the bytes read and written."""
    logits, each, moved = cost
    exponentials = ("mlm" in plan.names) + 2 * ("kl" in plan.names)
    estimate = pl.CostEstimate(flops=logits * each, bytes_accessed=moved, transcendentals=logits * exponentials)
    if plan.tiling.gpu:
        parameters: Any = triton.CompilerParams(num_warps=4, num_stages=3)
    else:
        parameters = tpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=_TPU_MEMORY)
    name, interpret = kernel.func.__name__.strip("_"), plan.tiling.interpret
    return pl.pallas_call(
        kernel, compiler_params=parameters, cost_estimate=estimate, name=name, interpret=interpret, **options
    )
