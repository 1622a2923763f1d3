"""The distillation loss in kernels that compute the logits tile by tile and never write them to memory.

A tile is a few hundred positions times a part of the vocabulary. Two passes over the tiles give the loss and then its
gradient with respect to features and table, as in "cut cross entropy" (Wijmans et al., arXiv 2411.09009), here for two
models.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.losses.blocked import on_own_rows, own_table, sum_over_devices
from kd_jax.losses.tiling import GPU, TPU, Decoder, Tiling
from kd_jax.types import Array, row_axes


def fused_losses(
    student: Decoder,
    teacher: Decoder | None,
    targets_RxK: Array,
    weights_RxK: Array,
    temperature: Array | float,
    scales: Mapping[str, Array],
    tiling: Tiling | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The result of `blocked_losses` of `logits.distill_loss`, without logits in memory.

    (loss, {"kl", "mlm", "accuracy"}): scales["kl"] * KL to the teacher + scales["mlm"] * cross entropy, and the float32
    sums over the positions whose weight is 1. A term that is not in `scales` is not computed; "kl" alone needs the
    teacher. Features are float32 or bfloat16, and tables are cast to their dtype; sums are float32. The KL of equal
    logits is exactly 0, as is its gradient. Differentiable in the student's features, table and bias; the gradient is
    computed with the value.

    tiling: None takes that of the target platform; if it is neither a TPU nor an NVIDIA GPU, the TPU's kernels run in
    Pallas' interpreter, which is slow. On a mesh (see `row_axes`) every device takes its own rows; all axes except
    those of rows must have size 1 (`serves_mesh`). The student's table may have a copy for each of these devices,
    [D, V, H], and then so has its gradient.
    """
    axes, _ = row_axes(student.features.shape[0])
    names = tuple(name for name in ("kl", "mlm") if name in scales)
    numbers = {"temperature": jnp.float32(temperature), **{name: jnp.float32(scales[name]) for name in names}}
    fixed = jax.tree.map(jnp.asarray, (teacher if "kl" in names else None, targets_RxK, weights_RxK, numbers))
    return _fused((names, axes, tiling), Decoder(*jax.tree.map(jnp.asarray, tuple(student))), fixed)


def serves_mesh(rows: int) -> bool:
    """Whether that many rows can be split over the devices of the mesh set by `use_abstract_mesh`."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.values()) == row_axes(rows)[1]


_Static = tuple[tuple[str, ...], tuple[str, ...], Tiling | None]  # terms, mesh axes of rows, tiling


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: _Static, student: Decoder, fixed: Any) -> Any:
    return _run(static, student, fixed, False)[0]


def _fused_forward(static: _Static, student: Decoder, fixed: Any) -> Any:
    value, gradients = _run(static, student, fixed, True)
    cast = jax.tree.map(lambda gradient, leaf: gradient.astype(leaf.dtype), gradients, student)
    return value, cast


def _fused_backward(static: _Static, gradients: Decoder, cotangents: Any) -> Any:
    del static
    return jax.tree.map(lambda leaf: (leaf * cotangents[0]).astype(leaf.dtype), gradients), None


_fused.defvjp(_fused_forward, _fused_backward)


def _run(static: _Static, student: Decoder, fixed: Any, differentiated: bool) -> Any:
    """(loss and sums, gradients or None); each device computes those of its own rows."""
    from kd_jax.losses.fused_kernels import values_and_gradients  # Pallas takes a fifth of a second to import

    names, axes, tiling = static

    def of_rows(student: Decoder, teacher: Decoder | None, targets: Any, weights: Any, numbers: Any) -> Any:
        size = student.features.shape[2]
        flat = student._replace(features=student.features.reshape(-1, size), table=own_table(student.table))
        if teacher is not None:
            teacher = teacher._replace(features=teacher.features.reshape(-1, teacher.features.shape[2]))
        operands = flat, teacher, targets.reshape(-1), weights.reshape(-1), numbers

        def with_tiling(one: Tiling) -> Callable[..., Any]:
            return partial(values_and_gradients, names, one, differentiated)

        if tiling is not None:
            value, gradients = with_tiling(tiling)(*operands)
        else:
            value, gradients = jax.lax.platform_dependent(
                *operands,
                tpu=with_tiling(TPU),
                cuda=with_tiling(GPU),
                default=with_tiling(dataclasses.replace(TPU, interpret=True)),
            )
        if not differentiated:
            return sum_over_devices(value, axes), None
        own = gradients.features.reshape(student.features.shape)
        if student.table.ndim == 3:
            value, bias = sum_over_devices((value, gradients.bias), axes)
            return value, Decoder(own, gradients.table[None], bias)
        value, table, bias = sum_over_devices((value, gradients.table, gradients.bias), axes)
        return value, Decoder(own, table, bias)

    # Cast here, so that a sharded table is gathered in the narrower dtype.
    def narrow(one: Decoder | None) -> Decoder | None:
        return None if one is None else one._replace(table=one.table.astype(one.features.dtype))

    teacher, targets, weights, numbers = fixed
    theirs, mine = Decoder(True, False, False), Decoder(True, student.table.ndim == 3, False)
    outputs = (False, mine if differentiated else False)
    run = on_own_rows(of_rows, axes, (mine, theirs if teacher else False, True, True, False), outputs)
    return run(narrow(student), narrow(teacher), targets, weights, numbers)
