"""How fast a compiled step can be at best, and what bounds it."""

from dataclasses import dataclass

from kd_jax.compile_check.chips import Chip
from kd_jax.compile_check.hlo import Collective, Program
from kd_jax.compile_check.traffic import memory_traffic


@dataclass(frozen=True)
class Roofline:
    """Seconds that a step takes at the peak of each resource; used all at once, the longest is the step's.

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
    collectives = program.collectives()
    traffic = memory_traffic(program)
    network = sum(one.sent / bandwidth(one, chip, slice_size) for one in collectives)
    return Roofline(
        flops,
        traffic,
        sum(one.sent for one in collectives),
        flops / chip.flops,
        traffic / chip.bandwidth,
        network,
    )


def bandwidth(one: Collective, chip: Chip, slice_size: int) -> float:
    """Bytes a second that a device can send for a collective.

    Where the group reaches over several slices or nodes, what leaves one is carried by all of its members together: a
    ring enters and leaves each node once.
    """
    places: dict[int, int] = {}
    for member in one.members:
        places[member // slice_size] = places.get(member // slice_size, 0) + 1
    if len(places) <= 1:
        return chip.links
    return min(chip.links, chip.outside * min(places.values()))
