from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from kd_jax.config import base
from kd_jax.config.execution import Mesh, Rules, Sharding
from kd_jax.config.settings import block, read
from kd_jax.trainer.mesh import (
    LARGE,
    describe_shardings,
    global_batch,
    make_mesh,
    process_share,
    row_multiple,
    shardings,
    slice_shape,
    split_slices,
)
from kd_jax.types import UserError


def mesh_of(data, fsdp, tensor):
    return make_mesh(Mesh(data, fsdp, tensor))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def spec_of(mesh, names, abstract):
    return shardings(mesh, {"one": names}, {"one": abstract})["one"].spec


@pytest.mark.parametrize(
    ("sizes", "expected"), [((-1, 1, 1), (8, 1, 1)), ((2, -1, 2), (2, 2, 2)), ((1, 4, 2), (1, 4, 2))]
)
def test_minus_one_takes_the_devices_that_are_left(sizes, expected):
    mesh = mesh_of(*sizes)
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), expected))
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, 16, 1), (2, 2, 1), (-1, -1, 1), (0, 1, -1), (-2, 1, 1)])
def test_sizes_that_do_not_fit_the_devices_are_refused(sizes):
    with pytest.raises(UserError, match=r"^config\.mesh: data="):
        mesh_of(*sizes)


class Device(NamedTuple):
    """What of a device decides on its place."""

    id: int
    process_index: int
    slice_index: int | None = None


def test_devices_that_tell_of_slices_are_split_by_them():
    devices = [Device(number, number // 2, number % 2) for number in range(8)]
    assert [[one.id for one in part] for part in split_slices(devices)] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert split_slices(devices, 2) == split_slices(devices)
    with pytest.raises(UserError, match=r"config\.mesh\.slices: 4 does not suit 8 devices in 2 slices"):
        split_slices(devices, 4)


def test_devices_that_do_not_tell_are_cut_by_process():
    devices = [Device(number, 1 - number // 4) for number in range(8)]
    assert len(split_slices(devices)) == 1
    assert [[one.id for one in part] for part in split_slices(devices, 2)] == [[4, 5, 6, 7], [0, 1, 2, 3]]
    for wanted in (3, -1):
        with pytest.raises(UserError, match=r"config\.mesh\.slices"):
            split_slices(devices, wanted)


def test_the_slower_network_is_crossed_by_data_then_fsdp_and_never_by_tensor():
    assert slice_shape((4, 2, 2), 2) == (2, 1, 1)
    assert slice_shape((2, 4, 2), 8) == (2, 4, 1)
    assert slice_shape((1, 16, 1), 2) == (1, 2, 1)
    with pytest.raises(UserError, match=r"config\.mesh\.data: data=1 and fsdp=1 do not divide among 2 slices"):
        slice_shape((1, 1, 8), 2)


def test_each_slice_holds_a_whole_block_of_the_mesh():
    for sizes, outer in (((4, 1, 2), (2, 1, 1)), ((1, 4, 2), (1, 2, 1)), ((1, 2, 4), (1, 2, 1))):
        mesh = make_mesh(Mesh(*sizes, slices=2))
        assert mesh.devices.shape == sizes
        halves = np.split(mesh.devices, 2, axis=outer.index(2))
        assert [{one.id // 4 for one in half.flat} for half in halves] == [{0}, {1}]


def test_tables_of_the_config_begin_as_the_default_rules():
    sharding = base.get_config().sharding
    assert read(Sharding, sharding, "sharding") == Sharding(Rules(), Rules())


@pytest.mark.parametrize("axes", ["model", "fsdp,fsdp", "tensor,rows"])
def test_an_axis_that_does_not_exist_is_refused(axes):
    with pytest.raises(UserError, match=r"^config\.sharding\.teacher\.embed: "):
        read(Rules, block(Rules, embed=axes), "sharding.teacher")


def test_a_dimension_may_lie_along_several_axes():
    mesh, rules = mesh_of(2, 2, 2), Rules(embed="data, fsdp", mlp="fsdp,tensor")
    layout = shardings(mesh, {"one": ("embed", "mlp")}, {"one": shape(8, 8)}, rules)["one"]
    assert layout.spec == PartitionSpec(("data", "fsdp"), "tensor")
    assert describe_shardings({"one": shape(8, 8)}, {"one": layout}, "teacher:")[:2] == [
        "teacher:",
        "one    8/data/fsdp x 8/tensor  0.00 MiB",
    ]
    with pytest.raises(UserError, match=r"^config\.mesh\.data: 4 does not divide dimension 'embed'"):
        shardings(mesh, {"one": ("embed", None)}, {"one": shape(6, LARGE)}, rules)


def test_rules_place_each_dimension_and_no_mesh_axis_twice():
    mesh = mesh_of(2, 2, 2)
    assert spec_of(mesh, ("vocab", "embed"), shape(100, 8)) == PartitionSpec("tensor", "fsdp")
    assert spec_of(mesh, ("layers", "embed", "heads", None), shape(3, 8, 4, 5)) == PartitionSpec(
        None, "fsdp", "tensor", None
    )
    assert spec_of(mesh, ("mlp", "heads"), shape(8, 8)) == PartitionSpec("tensor", None)
    assert spec_of(mesh_of(8, 1, 1), ("vocab", "embed"), shape(100, 8)) == PartitionSpec(None, None)


def test_a_dimension_that_does_not_divide_stays_whole_only_when_small():
    mesh = mesh_of(2, 2, 2)
    assert spec_of(mesh, ("vocab", "embed"), shape(101, 8)) == PartitionSpec(None, "fsdp")
    large = shape(LARGE + 1, 1)
    with pytest.raises(UserError, match=r"^config\.mesh\.tensor: 2 does not divide dimension 'vocab' of one"):
        spec_of(mesh, ("vocab", None), large)
    assert spec_of(mesh_of(8, 1, 1), ("vocab", None), large) == PartitionSpec(None, None)


def test_a_name_without_a_rule_and_a_wrong_rank_are_bugs():
    with pytest.raises(ValueError, match="no rule for the logical axis 'vocabulary'"):
        spec_of(mesh_of(2, 2, 2), ("vocabulary",), shape(8))
    with pytest.raises(ValueError, match="one: 1 logical axes"):
        spec_of(mesh_of(2, 2, 2), ("vocab",), shape(8, 8))


def test_the_table_counts_what_each_device_holds():
    mesh = mesh_of(2, 2, 2)
    abstract = {"embeddings": shape(1024, 512), "norm": shape(1024)}
    layout = shardings(mesh, {"embeddings": ("vocab", "embed"), "norm": (None,)}, abstract)
    lines = describe_shardings(abstract, layout)
    assert lines[0].split() == ["embeddings", "1024/tensor", "x", "512/fsdp", "0.50", "MiB"]  # a quarter of 2 MiB
    assert lines[1].split() == ["norm", "1024", "0.00", "MiB"]
    assert lines[2].split() == ["total", "525,312", "elements", "0.50", "MiB", "a", "device"]


def test_a_batch_is_dealt_by_rows_over_data_and_fsdp():
    mesh = mesh_of(2, 2, 2)
    local = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "weights": np.ones(8, np.float32)}
    batch = global_batch(mesh, local)
    np.testing.assert_array_equal(np.asarray(batch["tokens"]), local["tokens"])
    assert row_multiple(mesh) == 4
    assert batch["tokens"].sharding.shard_shape((8, 3)) == (2, 3)
    assert batch["weights"].sharding.shard_shape((8,)) == (2,)
    with pytest.raises(UserError, match="a batch of 6 rows"):
        global_batch(mesh, {"tokens": np.zeros((6, 3), np.int32)})


def of_processes(shape, owners):
    """A mesh, as far as `process_share` looks at it, of devices that belong to these processes."""
    devices = np.empty(len(owners), object)
    for number, owner in enumerate(owners):
        devices[number] = SimpleNamespace(process_index=owner)
    return SimpleNamespace(devices=devices.reshape(shape), shape=dict(zip(("data", "fsdp", "tensor"), shape)))


@pytest.mark.parametrize(
    ("shape", "owners", "shares"),
    [
        ((4, 1, 1), (0, 0, 1, 1), [(0, 2), (1, 2)]),
        ((2, 2, 1), (0, 0, 1, 1), [(0, 2), (1, 2)]),
        ((1, 1, 4), (0, 0, 1, 1), [(0, 1), (0, 1)]),  # tensor joins both: each reads all rows
        ((2, 1, 4), (0, 0, 1, 1, 2, 2, 3, 3), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((4, 1, 1), (0, 1, 0, 1), [(0, 2), (1, 2)]),  # rows 0 and 2, 1 and 3: two parts all the same
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch, shape, owners, shares):
    for process, share in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert process_share(of_processes(shape, owners)) == share


def test_processes_that_share_a_part_of_their_rows_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"config\.mesh: .* share a part of their rows only"):
        process_share(of_processes((3, 1, 2), (0, 0, 0, 1, 1, 1)))
