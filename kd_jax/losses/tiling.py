"""Tiles of positions x vocabulary in which kernels compute logits, and the platforms that have such kernels."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax


class Decoder(NamedTuple):
    """Operands of logits = features @ table.T + bias: features [R, K, H] or [P, H], table [V, H], bias [V] or None."""

    features: Any
    table: Any
    bias: Any = None


@dataclass(frozen=True)
class Tiling:
    """Sizes of tiles, and which kernels: on a TPU one kernel has a whole tile row in its memory and visits the grid in
    order; a GPU's kernels are independent, and loop over the vocabulary and the features.

    positions, vocabulary: of a tile. splits: independent parts of the vocabulary. depth: GPU: features per product.
    resident: maximum bytes; TPU: of the features' gradient, which stays on the chip; GPU: of the logits' gradients in
    memory.
    """

    gpu: bool
    positions: int
    vocabulary: int
    splits: int
    resident: int
    depth: int = 0
    interpret: bool = False


# Two parts of the vocabulary, since a device of v4 and v5p has two cores.
TPU = Tiling(False, positions=512, vocabulary=1024, splits=2, resident=2**23)
GPU = Tiling(True, positions=64, vocabulary=128, splits=16, resident=2**27, depth=64)


def has_kernels(mode: str, mesh: jax.sharding.Mesh) -> bool:
    """Whether config.logits selects the kernels on the devices of a mesh, which may be of another machine."""
    device = mesh.devices.flat[0]
    known = device.platform == "tpu" or "NVIDIA" in device.device_kind
    return mode == "fused" or (mode == "auto" and known and mesh.shape["tensor"] == 1)
