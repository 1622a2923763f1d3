"""Parameters in int8: how a served model is stored.

Symmetric, one scale per output channel (as in Jacob et al., arXiv 1712.05877, section 3, without zero points): a linear
layer has a scale per output, a table one per row, which is the unit that is read and, in a tied decoder, an output too.
Norms and biases stay float32; they are less than a hundredth of the bytes.
"""

import math
from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from kd_jax.types import Array, Params

SCALE = ".scale_int8"  # suffix of the name of a matrix's scales
_LARGEST = 127  # -128 is left out, so that the range is symmetric
_TABLES = ("tokens", "positions", "types")


def flat_names(params: Params) -> dict[str, Any]:
    """{"encoder.layers.mlp.input.kernel": array, ...}."""
    return cast(Any, flatten_dict(params, sep="."))  # flax's own types are a union of everything it might hold


def input_axes(name: str, ndim: int) -> tuple[int, ...] | None:
    """The axes of a parameter that one scale covers, or None for what stays float32.

    Kernels are [inputs..., outputs...], in stacked layers after the layer's axis; tables are [rows, hidden].
    """
    *parents, last = name.split(".")
    if last in _TABLES and parents[-1] == "embeddings":
        return (1,)
    if last != "kernel":
        return None
    first = 1 if parents[:2] == ["encoder", "layers"] else 0
    count = 2 if parents[-2:] == ["attention", "output"] else 1  # heads and their size
    assert first + count < ndim, name
    return tuple(range(first, first + count))


def quantized(params: Params) -> dict[str, np.ndarray]:
    """{"encoder.layers.mlp.input.kernel": int8 matrix, "<name>.scale_int8": its float32 scales, which broadcast, ...},
    and the rest in float32. The error of a weight is at most half its scale.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, leaf in flat_names(params).items():
        values = np.asarray(leaf, np.float32)
        axes = input_axes(name, values.ndim)
        if axes is None:
            tensors[name] = values
            continue
        largest = np.max(np.abs(values), axis=axes, keepdims=True)
        scales = np.where(largest > 0, largest / _LARGEST, 1.0).astype(np.float32)
        tensors[name] = np.clip(np.rint(values / scales), -_LARGEST, _LARGEST).astype(np.int8)
        tensors[name + SCALE] = scales
    return tensors


def dequantized(tensors: Mapping[str, Array]) -> Params:
    """Float32 parameters from the tensors of `quantized`; float32 tensors stay as they are. May be traced."""
    flat = {
        name: values.astype(jnp.float32) * tensors[name + SCALE] if name + SCALE in tensors else values
        for name, values in tensors.items()
        if not name.endswith(SCALE)
    }
    return unflatten_dict(flat, sep=".")


def weight_bytes(abstract: Params) -> dict[str, int]:
    """{"float32": bytes of all parameters, "int8": the same with matrices in int8, scales included}."""
    whole = small = 0
    for name, leaf in flat_names(abstract).items():
        size, axes = math.prod(leaf.shape), input_axes(name, len(leaf.shape))
        whole += 4 * size
        scales = 0 if axes is None else size // math.prod(leaf.shape[axis] for axis in axes)
        small += 4 * size if axes is None else size + 4 * scales
    return {"float32": whole, "int8": small}
