"""What a chip of each kind can do at most, from public sources, for rooflines."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peaks of one device.

    flops: bfloat16 multiply-adds as 2, a second. memory: bytes; usable: of these, what a program gets. bandwidth: bytes
    a second to and from that memory. links: bytes a second that the device sends at most to its neighbors in a slice or
    node. outside: the same to another slice or node. node: devices in a node, 0 for a slice of any size.
    """

    name: str
    flops: float
    memory: float
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

# TPU links are given for a chip in gigabits: all of its links in one direction, as a torus uses them at best. Between
# slices a chip has its share of the host's network. A program gets a little less memory than the chip has.
CHIPS: dict[str, Chip] = {
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 31.75 * GIB, 1228e9, 2400e9 / 8, 6.25e9, 0, _CLOUD),
    "v5e": Chip("TPU v5e", 197e12, 16 * GIB, 15.75 * GIB, 819e9, 1600e9 / 8, 3.125e9, 0, _CLOUD),
    "v5p": Chip("TPU v5p", 459e12, 95 * GIB, 95.74 * GIB, 2765e9, 4800e9 / 8, 6.25e9, 0, _CLOUD),
    "v6e": Chip("TPU v6e", 918e12, 32 * GIB, 31.25 * GIB, 1640e9, 3584e9 / 8, 6.25e9, 0, _CLOUD),
    # Dense bfloat16; NVLink 4 is 900 GB/s in both directions together, and a DGX H100 has one 400 Gb/s port a GPU. XLA
    # takes three quarters of the memory by default, and up to about 95 % with XLA_PYTHON_CLIENT_MEM_FRACTION.
    "h100": Chip(
        "H100 SXM",
        989.4e12,
        80e9,
        0.95 * 79.1 * GIB,
        3.35e12,
        450e9,
        50e9,
        8,
        "NVIDIA H100 Tensor Core GPU data sheet; DGX H100 data sheet",
    ),
    # For trying the command anywhere; the figures are those of no machine.
    "cpu": Chip("CPU device", 0.1e12, 16 * GIB, 16 * GIB, 50e9, 10e9, 10e9, 0, "invented: to try the command"),
}
