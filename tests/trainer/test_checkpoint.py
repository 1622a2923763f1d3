import errno
import itertools
import logging
import shutil
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.config.execution import Mesh
from kd_jax.trainer import checkpoint
from kd_jax.trainer.checkpoint import FOLDER, Checkpoints, load_params
from kd_jax.trainer.mesh import make_mesh, shardings
from kd_jax.trainer.optimizer import make_optimizer
from kd_jax.trainer.state import abstract_state, state_shardings, with_shardings
from kd_jax.types import UserError
from tests.support.small_disk import grow, small_disk
from tests.support.toy_training import ABSTRACT, AXES, create_state, toy_job


def parts(data=2, fsdp=2, tensor=2):
    """(state, abstract state) of the toy on a mesh."""
    mesh = make_mesh(Mesh(data, fsdp, tensor), devices=jax.devices()[: data * fsdp * tensor])
    optimizer = make_optimizer(toy_job())
    layout = state_shardings(ABSTRACT, optimizer, shardings(mesh, AXES, ABSTRACT))
    return create_state(optimizer, layout), abstract_state(ABSTRACT, optimizer, layout)


def values(tree):
    return jax.tree.map(np.array, tree)


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, values(left), values(right))


def test_restores_exactly_and_onto_another_mesh(tmp_path):
    state, abstract = parts(2, 2, 2)
    _, other = parts(1, 1, 1)
    meta = {"identity": {"data": "abc"}, "window": {"loss": [0.1 + 0.2, 3.0]}}
    with Checkpoints(tmp_path / FOLDER, keep=2) as checkpoints:
        assert checkpoints.restore(abstract) is None
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state, meta)
        checkpoints.wait()
    with Checkpoints(tmp_path / FOLDER, keep=2) as checkpoints:
        for wanted in (abstract, other):
            found = checkpoints.restore(wanted)
            assert found is not None
            restored, restored_meta = found
            assert restored_meta == meta
            assert_equal(restored, state)
            for leaf, target in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted)):
                assert leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_state_may_be_donated_while_it_is_being_written(tmp_path, devices):
    """The next step overwrites the buffers in place; 8 MB, so that writing takes longer than the step."""
    mesh = make_mesh(Mesh(devices, 1, 1), devices=jax.devices()[:devices])
    layout = shardings(mesh, {"w": (None,)}, {"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32)})["w"]
    negate = jax.jit(lambda tree: jax.tree.map(jnp.negative, tree), donate_argnums=0)
    state = {"w": jax.device_put(jnp.arange(2_000_000.0), layout)}
    with Checkpoints(tmp_path / FOLDER, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state, {})
            state = jax.block_until_ready(negate(state))
        checkpoints.wait()
        found = checkpoints.restore({"w": jax.ShapeDtypeStruct((2_000_000,), jnp.float32, sharding=layout)})
    assert found is not None
    np.testing.assert_array_equal(np.asarray(found[0]["w"]), np.arange(2_000_000.0, dtype=np.float32))


def test_keeps_the_newest_and_never_saves_a_step_twice(tmp_path):
    state, _ = parts(1, 1, 1)
    with Checkpoints(tmp_path / FOLDER, keep=2) as checkpoints:
        for step in (1, 2, 3, 3):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
        assert checkpoints.latest_step() == 3
    assert sorted(entry.name for entry in (tmp_path / FOLDER).iterdir() if entry.name.isdigit()) == ["2", "3"]


def test_a_clock_that_jumps_while_a_checkpoint_is_written_does_not_end_the_run(tmp_path, monkeypatch):
    real, days = time.time, itertools.cycle((0, 1))
    monkeypatch.setattr(time, "time", lambda: real() + 86400 * next(days))
    state, _ = parts(1, 1, 1)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state, {})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 4


def test_a_half_written_checkpoint_is_never_read_and_is_cleared_away(tmp_path):
    state, abstract = parts(1, 1, 1)
    with Checkpoints(tmp_path / FOLDER, keep=2) as checkpoints:
        checkpoints.save(1, state, {"step": 1})
    torn = tmp_path / FOLDER / "2.orbax-checkpoint-tmp-7"
    torn.mkdir()
    (torn / "state").mkdir()
    with Checkpoints(tmp_path / FOLDER, keep=2) as checkpoints:
        assert checkpoints.restore(abstract)[1] == {"step": 1}
    assert not torn.exists()


def test_an_old_checkpoint_that_a_kill_left_half_removed_is_removed(tmp_path):
    state, abstract = parts(1, 1, 1)
    with Checkpoints(tmp_path / FOLDER, keep=2) as checkpoints:
        for step in (2, 4):
            checkpoints.save(step, state, {"step": step})
    shutil.rmtree(tmp_path / FOLDER / "2" / "state")
    with Checkpoints(tmp_path / FOLDER, keep=1) as checkpoints:
        assert checkpoints.restore(abstract)[1] == {"step": 4}
    assert [one.name for one in (tmp_path / FOLDER).iterdir()] == ["4"]


def test_another_identity_is_refused_with_the_differences(tmp_path):
    state, _ = parts(1, 1, 1)
    old = {"config": {"seed": 0, "sets": ("a", "b")}, "data": "abc"}
    with Checkpoints(tmp_path / FOLDER, keep=1) as checkpoints:
        checkpoints.check(old)
        checkpoints.save(4, state, {"identity": old})
        checkpoints.wait()
        checkpoints.check({"config": {"seed": 0, "sets": ["a", "b"]}, "data": "abc"})
        with pytest.raises(UserError, match=r"step 4 .*\n  config\.seed: 0 -> 1\n  data: 'abc' -> 'xyz'$"):
            checkpoints.check({"config": {"seed": 1, "sets": ("a", "b")}, "data": "xyz"})


def saved_run(tmp_path):
    params = {
        "encoder": {"kernel": jnp.arange(12.0).reshape(4, 3), "bias": jnp.ones(3)},
        "head": {"kernel": jnp.ones((3, 2))},
    }
    state = {"step": jnp.int32(9), "params": params, "opt_state": {"adam": {"mu": params}}}
    with Checkpoints(tmp_path / FOLDER, keep=1) as checkpoints:
        checkpoints.save(9, state, {})
    return params


def wanted(params):
    mesh = make_mesh(Mesh(-1, 2, 1))
    abstract = jax.eval_shape(lambda: params)
    axes = jax.tree.map(lambda leaf: ("embed",) + (None,) * (len(leaf.shape) - 1), abstract)
    return with_shardings(abstract, shardings(mesh, axes, abstract))


def test_loads_the_parameters_of_another_run_whole_or_in_part(tmp_path):
    params = saved_run(tmp_path)
    assert_equal(load_params(tmp_path, wanted(params)), params)
    encoder = load_params(str(tmp_path), wanted({"encoder": params["encoder"]}))
    assert_equal(encoder, {"encoder": params["encoder"]})
    assert encoder["encoder"]["kernel"].sharding.shard_shape((4, 3)) == (2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p["encoder"].update(kernel=jnp.ones((5, 3))),
            r"parameter encoder/kernel has shape \(4, 3\), here \(5, 3\)",
        ),
        (
            lambda p: p["encoder"].update(scale=jnp.ones(3)),
            r"has no parameter encoder/scale, which has shape \(3,\) here",
        ),
        (lambda p: p["encoder"].pop("bias"), r"its parameter encoder/bias \(3,\) does not exist here"),
        (lambda p: p.update(pooler={"bias": jnp.ones(3)}), r"has no parameter pooler/bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change, message):
    params = saved_run(tmp_path)
    change(params)
    with pytest.raises(UserError, match=f"a checkpoint of another model: .*{message}"):
        load_params(tmp_path, wanted(params))


def test_a_directory_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_params(tmp_path, {})
    Checkpoints(tmp_path / FOLDER, keep=1).close()
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_params(tmp_path, {})


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), ValueError("INTERNAL: writing: No space left on device [os_error_code='28']")],
)
def test_a_full_disk_is_the_users_to_mend(tmp_path, monkeypatch, error):
    state, _ = parts(1, 1, 1)
    checkpoints = Checkpoints(tmp_path / FOLDER, keep=1)

    def full(*_, **__):
        raise error

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(UserError, match="the disk is full or over its quota; free some space"):
        checkpoints.save(1, state, {})


def test_a_full_disk_leaves_no_partial_checkpoint_and_the_run_resumes_with_more_room(tmp_path, caplog):
    state, abstract = parts(1, 1, 1)
    ballast = jnp.asarray(np.random.default_rng(0).normal(size=2**18), jnp.float32)  # 1 MiB, which compresses badly
    state = {**state, "ballast": ballast}
    abstract = {**abstract, "ballast": jax.ShapeDtypeStruct((2**18,), jnp.float32)}
    with small_disk(tmp_path / "disk", 2**18) as disk:
        full = pytest.raises(UserError, match=r"checkpoints: the disk is full or over its quota; free some space")
        with full, Checkpoints(disk / FOLDER, keep=1) as checkpoints:
            checkpoints.save(1, state, {})
        assert not [record for record in caplog.records if record.name == "absl"], "one sentence, not the threads' too"
        with pytest.raises(UserError, match="holds no checkpoint"):
            load_params(disk, {})
        grow(disk, 2**24)
        with Checkpoints(disk / FOLDER, keep=1) as checkpoints:
            assert checkpoints.restore(abstract) is None
            checkpoints.save(1, state, {})
            checkpoints.wait()
            found = checkpoints.restore(abstract)
            assert found is not None
            np.testing.assert_array_equal(found[0]["ballast"], state["ballast"])
        assert [one.name for one in (disk / FOLDER).iterdir()] == ["1"]


def test_orbax_says_nothing_below_an_error(tmp_path, caplog):
    params = saved_run(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="absl"):
        load_params(tmp_path, wanted(params))
    assert [record for record in caplog.records if record.levelno < logging.ERROR and record.name == "absl"] == []


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    state, abstract = parts(1, 1, 1)
    with Checkpoints(tmp_path / FOLDER, keep=1) as checkpoints:
        checkpoints.save(3, state, {"identity": {"data": "abc"}})
        checkpoints.wait()
    folder = tmp_path / FOLDER / "3"
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.stat().st_size)
    refused = set()
    for file in files:
        data = file.read_bytes()
        for damaged in (b"", data[: len(data) // 2], data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]):
            file.write_bytes(damaged)
            with Checkpoints(tmp_path / FOLDER, keep=1) as checkpoints:
                try:
                    checkpoints.check({"data": "abc"})
                    found = checkpoints.restore(abstract)
                    assert found is not None
                    restored, meta = found
                except UserError as error:
                    assert str(folder) in str(error) and "damaged" in str(error)
                    refused.add(file.name)
                    continue
            assert meta == {"identity": {"data": "abc"}}
            assert_equal(restored, state)
        file.write_bytes(data)
    assert {"manifest.ocdbt", "_METADATA", "metadata"} <= refused


def test_other_values_than_those_that_were_saved_are_refused(tmp_path, monkeypatch):
    state, abstract = parts(1, 1, 1)
    with monkeypatch.context() as patch, Checkpoints(tmp_path / FOLDER, keep=1) as checkpoints:
        patch.setattr(checkpoint, "params_fingerprint", lambda state: "another")
        checkpoints.save(3, state, {"identity": {}})
        checkpoints.wait()
    with (
        Checkpoints(tmp_path / FOLDER, keep=1) as checkpoints,
        pytest.raises(UserError, match="are not those that were"),
    ):
        checkpoints.restore(abstract)


def test_reads_of_a_damaged_checkpoint_that_are_cut_short_print_nothing(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    checkpoint._hide_late_callbacks.__wrapped__()
    code = "async def read():\n  try: await never\n  except BaseException: raise ValueError('again')"
    for folder, shown in (("orbax", False), ("elsewhere", True)):
        scope: dict[str, Any] = {"never": Never()}
        exec(compile(code, f"/{folder}/serialization.py", "exec"), scope)
        reading = scope["read"]()
        reading.send(None)
        del reading  # a coroutine that is not awaited to its end is closed
        assert ("again" in capsys.readouterr().err) == shown


def test_a_callback_that_comes_before_the_failure_is_handled_prints_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    checkpoint._hide_late_callbacks.cache_clear()
    with pytest.raises(UserError, match="damaged"), checkpoint.reading(tmp_path, "remove it"):
        Late("Event loop is closed")
        Late("something else")
        raise ValueError("truncated")
    said = capsys.readouterr().err
    assert "Event loop" not in said and "something else" in said


class Late:
    def __init__(self, message: str):
        self.message = message

    def __del__(self):
        raise RuntimeError(self.message)


class Never:
    def __await__(self):
        yield
