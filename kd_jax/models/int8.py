"""Parameters under flat names, and their matrices in int8: what a served model is stored as.

Symmetric, a scale for each output channel (as in Jacob et al., arXiv 1712.05877, section 3, without zero points): a
linear layer's scales are per output, a table's per row, which is what reads it and, in a tied decoder, an output too.
Norms and biases stay float32; they are less than a hundredth of the bytes.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.types import Array, Params

SCALE = ".scale_int8"  # what the name of a matrix's scales ends in
_LARGEST = 127
_TABLES = ("tokens", "positions", "types")


def flat_names(params: Params) -> dict[str, Any]:
    """{"encoder.layers.mlp.input.kernel": array, ...} of a nested dict."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(entry.key for entry in path): leaf for path, leaf in leaves}


def nested(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flat_names`."""
    params: Params = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def input_axes(name: str, ndim: int) -> tuple[int, ...] | None:
    """The axes of a parameter that one scale covers, or None for what stays float32.

    Kernels are [inputs..., outputs...], those of layers with the layer before; tables are [rows, hidden].
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
    """Flat names to int8 matrices, their float32 scales (`<name>.scale_int8`, which broadcast), and the float32 rest.

    The error of a weight is at most half its scale.
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
    """Float32 parameters of what `quantized` gave, and of float32 tensors as they are; may be traced."""
    return nested(
        {
            name: values.astype(jnp.float32) * tensors[name + SCALE] if name + SCALE in tensors else values
            for name, values in tensors.items()
            if not name.endswith(SCALE)
        }
    )


def weight_bytes(abstract: Params) -> dict[str, int]:
    """{"float32": bytes of all parameters, "int8": the same with matrices in int8, scales included}."""
    whole = small = 0
    for name, leaf in flat_names(abstract).items():
        size, axes = math.prod(leaf.shape), input_axes(name, len(leaf.shape))
        whole += 4 * size
        scales = 0 if axes is None else size // math.prod(leaf.shape[axis] for axis in axes)
        small += 4 * size if axes is None else size + 4 * scales
    return {"float32": whole, "int8": small}
