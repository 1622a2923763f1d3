"""Rooflines: of numbers small enough to divide by hand."""

from kd_jax.compile_check.hlo import Collective, Program
from kd_jax.compile_check.roofline import CHIPS, Chip, bandwidth, roofline

CHIP = Chip("small", 100.0, 9.0, 50.0, 20.0, 2.0, 4, "a test")
TEXT = """HloModule step

ENTRY %main (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  ROOT %sum = f32[100]{0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%none
}
"""


def collective(members) -> Collective:
    return Collective("all-reduce", 100, 1, len(members), tuple(members), 150.0, "")


def test_a_step_takes_as_long_as_the_slowest_of_compute_memory_and_network():
    roof = roofline(Program(TEXT), 3000.0, CHIP, 4)
    assert (roof.compute, roof.memory, roof.network) == (30.0, 16.0, 30.0)
    assert roof.step == 30.0 and roof.bound == "compute"
    assert roofline(Program(TEXT), 2999.0, CHIP, 4).bound == "network"


def test_what_leaves_a_node_is_carried_by_its_members_together():
    assert bandwidth(collective(range(4)), CHIP, 4) == 20.0
    assert bandwidth(collective(range(8)), CHIP, 4) == 8.0  # four members of each node, 2 bytes a second each
    assert bandwidth(collective([0, 4, 8, 12]), CHIP, 4) == 2.0
    assert bandwidth(collective(range(64)), CHIP, 32) == 20.0  # never more than the links inside


def test_every_chip_names_its_source():
    assert all(chip.source for chip in CHIPS.values())
