"""Programs read back: against text whose numbers are known, and against what JAX compiles here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.compile_check.hlo import Program, arrays_of, replica_groups
from kd_jax.compile_check.traffic import memory_traffic

# A loop of 5 that gathers; a scatter as TPUs write it; one collective spread over a fusion and its end.
TEXT = """HloModule step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (state: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  %part = f32[2,16]{1,0:T(8,128)} constant({...})
  %gathered = f32[8,16]{1,0} all-gather(%part), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}, METADATA
  ROOT %next = (s32[], f32[8,16]{1,0}) tuple(%count, %gathered)
}

%condition (state: (s32[], f32[8,16])) -> pred[] {
  %limit = s32[] constant(5)
  %state = (s32[], f32[8,16]{1,0}) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}

%all-reduce-scatter.1 (whole: f32[64]) -> f32[8] {
  %whole = f32[64]{0} parameter(0)
  %reduced = f32[64]{0} all-reduce(%whole), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %place = s32[] constant(0)
  ROOT %slice = f32[8]{0} dynamic-slice(%reduced, %place), dynamic_slice_sizes={8}
}

%beside (part: bf16[4]) -> bf16[8] {
  %part = bf16[4]{0} parameter(0)
  ROOT %same = bf16[8]{0} all-gather(%part), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (x: f32[64], y: bf16[4]) -> f32[8] {
  %x = f32[64]{0} parameter(0)
  %y = bf16[4]{0} parameter(1)
  %zero = s32[] constant(0)
  %none = f32[8,16]{1,0} constant({...})
  %start = (s32[], f32[8,16]{1,0}) tuple(%zero, %none)
  %loop = (s32[], f32[8,16]{1,0}) while(%start), condition=%condition, body=%body
  %began = bf16[8]{0} fusion(%y), kind=kCustom, calls=%beside
  %ended = bf16[8]{0} all-gather(%y), channel_id=3, replica_groups={{0,1},{2,3}}, dimensions={0}
  ROOT %out = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
""".replace("METADATA", 'metadata={op_name="jit(step)/while/body/dot"}')


def test_collectives_are_counted_as_often_as_their_loop_runs():
    found = {one.kind: one for one in Program(TEXT).collectives()}
    gathers = [one for one in Program(TEXT).collectives() if one.kind == "all-gather"]
    assert [(one.count, one.size, one.group) for one in gathers] == [(5, 8 * 16 * 4, 4), (1, 16, 2)]
    assert gathers[0].sent == 5 * 512 * 3 / 4
    assert gathers[0].members == (0, 1, 2, 3) and gathers[0].source == "jit(step)/while/body/dot"
    scatter = found["reduce-scatter"]
    assert (scatter.count, scatter.size, scatter.group, scatter.sent) == (1, 256, 8, 256 * 7 / 8)
    assert "all-reduce" not in found


def test_a_known_trip_count_is_believed():
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert Program(text).collectives()[0].count == 7


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ("f32[2,3]{1,0}", [24]),
        ("(bf16[4]{0:T(1024)(128)(2,1)S(1)}, pred[3], s32[])", [8, 3, 4]),
        ("f8e4m3fn[10]", [10]),
        ("token[]", [0]),
    ],
)
def test_bytes_of_shapes(shape, sizes):
    assert arrays_of(shape) == sizes


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [(0, 2), (1, 3)]),
        ("replica_groups=[2,4]<=[8], x", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}, x", [(0, 1, 2, 3), (4, 5, 6, 7)]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'a','b'}, x", [(0, 1, 2, 3)]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
        ("nothing", []),
    ],
)
def test_replica_groups_in_every_notation(written, groups):
    assert replica_groups(written) == groups


def test_a_program_of_jax_has_the_collectives_that_it_was_told_to_have():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))

    @jax.shard_map(mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec(), check_vma=False)
    def total(x):
        def body(carry, _):
            return jax.lax.psum(jnp.tanh(carry), "data"), None

        return jax.lax.scan(body, x, None, length=6)[0]

    shape = jax.ShapeDtypeStruct((8, 1024), np.float32, sharding=rows)
    (one,) = Program(jax.jit(total).lower(shape).compile().as_text()).collectives()
    assert (one.kind, one.count, one.size, one.group) == ("all-reduce", 6, 4096, 8)
    assert one.sent == 6 * 4096 * 2 * 7 / 8


def test_arrays_as_a_tpu_stores_them():
    shape = (
        "(bf16[512,64]{1,0:T(8,128)(2,1)S(1)}, bf16[64,512]{0,1:T(8,128)(2,1)}, f32[3,100]{1,0}, s32[100]{0:T(128)})"
    )
    assert arrays_of(shape) == [65536, 65536, 1200, 400]
    assert arrays_of(shape, stored=True) == [131072, 65536 * 2, 1200, 512]


BRANCHES = """HloModule step

%near (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  ROOT %sum = f32[10]{0} add(%x, %x)
}

%far (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  ROOT %product = f32[10]{0} multiply(%x, %x)
}

%other (x: f32[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  ROOT %copy = f32[10]{0} copy(%x)
}

ENTRY %main (which: pred[], number: s32[], x: f32[10]) -> f32[10] {
  %which = pred[] parameter(0)
  %number = s32[] parameter(1)
  %x = f32[10]{0} parameter(2)
  %first = f32[10]{0} conditional(%which, %x, %x), true_computation=%near, false_computation=%far
  ROOT %second = f32[10]{0} conditional(%number, %first, %first), branch_computations={%near, %other}
}
"""


def test_each_branch_of_a_conditional_counts_its_share():
    program = Program(BRANCHES)
    assert [program.runs[name] for name in ("near", "far", "other")] == [1, 0.5, 0.5]
    assert memory_traffic(program) == 120 + 60 + 40
