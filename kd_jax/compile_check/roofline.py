"""How fast a compiled step can be at best on a chip, and what bounds it; peaks are from public sources."""

from collections import Counter
from dataclasses import dataclass

from kd_jax.compile_check.hlo import Collective, Program
from kd_jax.compile_check.traffic import memory_traffic


@dataclass(frozen=True)
class Chip:
    """Peaks of one device.

    flops: bfloat16, per second, a multiply-add counting 2. usable: bytes of its memory that a program gets. bandwidth:
    bytes per second to and from that memory. links: bytes per second that it sends at most to its neighbors in a slice
    or node; outside: to another slice or node. node: devices in a node, 0 for a slice of any size.
    """

    name: str
    flops: float
    usable: float
    bandwidth: float
    links: float
    outside: float
    node: int
    source: str


GIB = 2.0**30
_CLOUD = (
    "Google Cloud TPU documentation, page of the version: peak compute, HBM capacity and bandwidth, interchip links"
)
_NVIDIA = "NVIDIA H100 Tensor Core GPU data sheet; DGX H100 data sheet"

# TPU links are given per chip in gigabits: all of its links in one direction, as a torus uses them at best. Between
# slices a chip has its share of the host's network. A program gets a little less memory than the chip has.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 275e12, 31.75 * GIB, 1228e9, 2400e9 / 8, 6.25e9, 0, _CLOUD),
    "v5e": Chip("TPU v5e", 197e12, 15.75 * GIB, 819e9, 1600e9 / 8, 3.125e9, 0, _CLOUD),
    "v5p": Chip("TPU v5p", 459e12, 95.74 * GIB, 2765e9, 4800e9 / 8, 6.25e9, 0, _CLOUD),
    "v6e": Chip("TPU v6e", 918e12, 31.25 * GIB, 1640e9, 3584e9 / 8, 6.25e9, 0, _CLOUD),
    # Dense bfloat16; NVLink 4 is 900 GB/s for both directions together, and a DGX H100 has a 400 Gb/s port per GPU. XLA
    # takes three quarters of the memory by default, and up to about 95% with XLA_PYTHON_CLIENT_MEM_FRACTION.
    "h100": Chip("H100 SXM", 989.4e12, 0.95 * 79.1 * GIB, 3.35e12, 450e9, 50e9, 8, _NVIDIA),
    # For trying the command anywhere; these are no machine's numbers.
    "cpu": Chip("CPU device", 0.1e12, 16 * GIB, 50e9, 10e9, 10e9, 0, "invented: to try the command"),
}


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at the peak of each resource. At best they overlap, so the longest is the step's.

    flops: of the matrix products on one device. traffic: bytes to and from its memory. sent: bytes that it sends.
    """

    flops: float
    traffic: float
    sent: float
    compute: float
    memory: float
    network: float

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def bound(self) -> str:
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


def roofline(program: Program, flops: float, chip: Chip, slice_size: int) -> Roofline:
    """Of a program on one device. slice_size: devices that the faster network joins."""
    collectives, traffic = program.collectives(), memory_traffic(program)
    network = sum(one.sent / bandwidth(one, chip, slice_size) for one in collectives)
    sent = sum(one.sent for one in collectives)
    return Roofline(flops, traffic, sent, flops / chip.flops, traffic / chip.bandwidth, network)


def bandwidth(one: Collective, chip: Chip, slice_size: int) -> float:
    """Bytes per second that a device can send for a collective."""
    in_slice = Counter(member // slice_size for member in one.members)
    if len(in_slice) <= 1:
        return chip.links
    # A ring enters and leaves each slice or node once, so all members inside share what leaves it.
    return min(chip.links, chip.outside * min(in_slice.values()))
