"""Checkpoints on a store: whole or not there, on s3:// through the mirror and on gs:// by orbax itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.runtime import copies, mirror
from kd_jax.runtime.paths import as_path, names_in
from kd_jax.trainer.checkpoint import Checkpoints, load_params
from kd_jax.types import UserError
from tests.support import fake_store

RUN = "s3://bucket/run"
ABSTRACT = {"step": jax.ShapeDtypeStruct((), jnp.int32), "params": {"a": jax.ShapeDtypeStruct((6,), jnp.float32)}}


@pytest.fixture(autouse=True)
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "local"))
    fake_store.install(tmp_path)
    with fake_store.serving(tmp_path):
        yield tmp_path / "buckets/bucket/run/checkpoints"


def state(step):
    return {"step": jnp.int32(step), "params": {"a": jnp.arange(6.0) + step}, "opt_state": ()}


def abstract():
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with_sharding = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one), ABSTRACT)
    return {**with_sharding, "opt_state": ()}


def save(run, *steps, keep=2):
    with Checkpoints(f"{run}/checkpoints", keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"identity": {"a": 1}, "rows": step})


def newest(run):
    with Checkpoints(f"{run}/checkpoints", 2) as checkpoints:
        found = checkpoints.restore(abstract())
        return None if found is None else (int(found[0]["step"]), found[1]["rows"])


@pytest.mark.parametrize("run", ["gs://bucket/run", RUN])
def test_the_newest_checkpoints_are_kept_and_come_back(run, store, tmp_path, monkeypatch):
    assert newest(run) is None
    save(run, 1, 2)
    save(run, 3)
    assert {name for name in names_in(as_path(run) / "checkpoints") if name.isdecimal()} == {"2", "3"}
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "another-host"))
    assert newest(run) == (3, 3)
    np.testing.assert_array_equal(load_params(run, abstract()["params"])["a"], np.arange(6) + 3)
    with Checkpoints(f"{run}/checkpoints", 2) as checkpoints, pytest.raises(UserError, match=r"a: 1 -> 2"):
        checkpoints.check({"a": 2})


@pytest.mark.parametrize("run", ["gs://bucket/run", RUN])
def test_a_checkpoint_that_is_not_whole_is_not_there(run, store):
    save(run, 1, 2)
    last = store / "2.json" if run == RUN else store / "2/commit_success.txt"
    last.unlink()  # what is written last
    assert newest(run) == (1, 1)
    save(run, 2)
    assert newest(run) == (2, 2)


@pytest.mark.parametrize("run", ["gs://bucket/none", "s3://bucket/none"])
def test_a_run_without_a_checkpoint(run):
    with pytest.raises(UserError, match=rf"^{run}: holds no checkpoint"):
        load_params(run, abstract()["params"])


def test_a_damaged_checkpoint_is_named(store):
    save(RUN, 1)
    file = sorted((store / "1/state").rglob("d/*"))[0]
    file.write_bytes(file.read_bytes()[:-1])
    for read in (newest, lambda run: load_params(run, abstract()["params"])):
        with pytest.raises(UserError, match=rf"^{RUN}/checkpoints/1/state/\S+: is damaged"):
            read(RUN)


def test_what_an_earlier_start_left_on_this_host_does_not_count(store):
    save(RUN, 1, 2)
    for name in ("2.json", "1.json"):
        (store / name).unlink()
    assert newest(RUN) is None


def test_a_store_that_refuses_a_checkpoint_stops_the_run(store, monkeypatch):
    def refuses(*_):
        raise PermissionError("no")

    with Checkpoints(f"{RUN}/checkpoints", 2) as checkpoints:
        monkeypatch.setattr(mirror, "put", refuses)
        checkpoints.save(1, state(1), {})
        with pytest.raises(UserError, match=rf"^{RUN}/checkpoints: the store cannot be reached .*PermissionError: no"):
            checkpoints.wait()
    assert newest(RUN) is None


def test_several_processes_are_refused_where_each_would_write_a_part(monkeypatch):
    monkeypatch.setattr(mirror.jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"2 processes cannot write one checkpoint to s3://; use gs://"):
        mirror.Mirror(as_path(f"{RUN}/checkpoints"))


def test_a_checkpoint_that_vanishes_while_it_is_looked_for(store, monkeypatch):
    save(RUN, 1)
    monkeypatch.setattr(mirror, "steps_in", lambda remote: [1, 2])
    found = mirror.fetch_newest(as_path(f"{RUN}/checkpoints"))
    assert found is not None and (found / "1").is_dir()
