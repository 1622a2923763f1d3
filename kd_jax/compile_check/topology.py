"""Devices to compile for without the hardware, as --topology names them."""

import contextlib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from kd_jax.compile_check.roofline import CHIPS, Chip
from kd_jax.types import UserError

FORMS = "v5e:4x4, v5p:4x4x4, v6e:16x16, v4:4x4x4, h100:8, h100:8x8 (nodes x GPUs) or cpu:8"

# Where libtpu's name of a kind is not ours.
_TPU_NAMES = {"v5p": "v5"}

# What XLA needs to know about a GPU that it cannot query: the properties of an H100 SXM with 80 GB, from NVIDIA.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    kind: str
    devices: tuple[Any, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]


def parse(name: str) -> tuple[str, tuple[int, ...]]:
    """("v5e", (4, 4)) of "v5e:4x4". Raises UserError."""
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    sides = tuple(int(side) for side in found.group(2).split("x")) if found else ()
    if found is None or found.group(1) not in CHIPS or min(sides) < 1:
        raise UserError(f"--topology={name}: is not known; use a form like {FORMS}")
    return found.group(1), sides


def find_topology(name: str, slices: int = 1) -> Topology:
    """The devices of a topology, or of several slices of it. UserError if a package is not installed."""
    kind, sides = parse(name)
    if kind == "cpu":
        devices = _cpu_devices(name, sides)
    elif kind == "h100":
        devices = _gpu_devices(name, sides)
    else:
        devices = _tpu_devices(name, kind, sides, slices)
    return Topology(name, kind, tuple(devices))


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is missing too
        return False


def _tpu_devices(name: str, kind: str, sides: tuple[int, ...], slices: int) -> list[Any]:
    if not _installed("libtpu"):
        raise UserError(f"--topology={name}: libtpu is not installed; install it with pip install 'jax[tpu]'")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks for a machine's metadata until it gives up
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is used, so several processes may compile at once
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if kind in ("v4", "v5p"):
        options["chip_config_name"] = "megacore"  # two cores are one device, as JAX uses them
    shape = "x".join(map(str, sides))
    try:
        return topologies.get_topology_desc(f"{_TPU_NAMES.get(kind, kind)}:{shape}", platform="tpu", **options).devices
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--topology={name}: libtpu knows no such slice ({reason}); use a form like {FORMS}") from None


def _gpu_devices(name: str, sides: tuple[int, ...]) -> list[Any]:
    if not _installed("jax_plugins.xla_cuda13"):
        raise UserError(
            f"--topology={name}: the CUDA plugin is not installed; install it with pip install 'jax[cuda13]'"
        )
    if len(sides) > 2:
        raise UserError(f"--topology={name}: has {len(sides)} sides; give the GPUs, or nodes x GPUs per node")
    nodes, each = sides if len(sides) == 2 else (1, *sides)
    shape = f"{nodes}x1x{each}"
    try:
        return topologies.get_topology_desc(name, platform="cuda", target_config=_H100, topology=shape).devices
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--topology={name}: the CUDA plugin makes no devices on this machine ({reason}); use a TPU or cpu topology"
        ) from None


def _cpu_devices(name: str, sides: tuple[int, ...]) -> list[Any]:
    count = math.prod(sides)
    with contextlib.suppress(RuntimeError):  # the backend is running, with a fixed number of devices
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(
            f"--topology={name}: this process has {len(devices)} CPU devices; restart it, or name cpu:{len(devices)}"
        )
    return devices[:count]
