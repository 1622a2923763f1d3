"""A checkpoint goes on in another layout of processes and devices; kill -9 at any moment loses nothing before it."""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kd_jax.config.execution import Mesh
from kd_jax.runtime.files import read_json_lines
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.metrics import TIME
from tests.support.elastic_training import SAVED_AT, STEPS, goes_on
from tests.support.several_processes import ended, environment, run, start
from tests.support.toy_training import ROWS

pytestmark = pytest.mark.slow

HERE = pathlib.Path(__file__).parents[1] / "support"
WIDE = {"data": -1, "fsdp": 1, "tensor": 1}
MIXED = {"data": 2, "fsdp": 1, "tensor": 2}


def arguments(workdir, mesh, stop_at=None) -> list[str]:
    options = json.dumps({"workdir": str(workdir), "mesh": mesh, "stop_at": stop_at})
    return [str(HERE / "elastic_training.py"), options]


def losses(workdir) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_json_lines(workdir / "metrics.jsonl", growing=True)]


def rows_without_time(workdir) -> list[dict]:
    rows = read_json_lines(workdir / "metrics.jsonl", growing=True)
    return [{name: value for name, value in row.items() if not name.startswith(TIME)} for row in rows]


def saved_state(workdir, step) -> list[np.ndarray]:
    """In NumPy, whatever devices it was saved from."""
    handlers = {"state": ocp.PyTreeCheckpointHandler()}
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handlers) as manager:
        tree = manager.item_metadata(step)["state"].tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restore = ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=plain))
        return jax.tree.leaves(manager.restore(step, args=restore)["state"])


def rows_read(workdir, processes) -> list[list[list[int]]]:
    """For each process the [step, first row, row after the last] that it read."""
    notes = [(workdir / f"rows-{process}.jsonl").read_text().splitlines() for process in range(processes)]
    return [[json.loads(line) for line in lines] for lines in notes]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, compiled):
    """A run of 2 processes with 2 devices each, stopped after its checkpoint of step 10."""
    workdir = tmp_path_factory.mktemp("stopped")
    found = ended(start(2, arguments(workdir, MIXED, stop_at=SAVED_AT + 2), devices=2, compiled=compiled))
    for code, _, errors in found:
        assert code == 2 and f"step {SAVED_AT + 2}: stopped here" in errors
    return workdir


@pytest.fixture(scope="module")
def straight(tmp_path_factory, compiled):
    """The same without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    run(2, arguments(workdir, MIXED), devices=2, compiled=compiled)
    return workdir


def test_each_process_reads_its_own_rows(straight):
    first, second = rows_read(straight, 2)
    assert first == [[step, 0, ROWS // 2] for step in range(STEPS)]
    assert second == [[step, ROWS // 2, ROWS] for step in range(STEPS)]


def test_only_one_process_writes_the_metrics(straight):
    assert [row["step"] for row in rows_without_time(straight)] == list(range(1, STEPS + 1))
    # A second process would replace the file of the first, and the rows would look the same.
    assert [int((straight / f"written-{process}.txt").read_text()) for process in range(2)] == [STEPS, 0]


def test_the_same_layout_goes_on_bit_for_bit(stopped, straight, compiled, tmp_path):
    shutil.copytree(stopped, tmp_path / "on")
    run(2, arguments(tmp_path / "on", MIXED), devices=2, compiled=compiled)
    assert rows_without_time(tmp_path / "on") == rows_without_time(straight)
    states = saved_state(tmp_path / "on", STEPS), saved_state(straight, STEPS)
    assert len(states[0]) > 6
    for mine, other in zip(*states, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        pytest.param(1, 1, WIDE, marks=pytest.mark.long),
        pytest.param(1, 4, {"data": 1, "fsdp": 2, "tensor": 2}, marks=pytest.mark.long),
        pytest.param(4, 1, WIDE, marks=pytest.mark.long),
        (4, 1, {"data": 1, "fsdp": 2, "tensor": 2}),
    ],
)
def test_another_layout_goes_on_with_the_same_rows_and_losses(
    stopped, straight, compiled, tmp_path, processes, devices, mesh
):
    workdir = tmp_path / "on"
    shutil.copytree(stopped, workdir, ignore=shutil.ignore_patterns("rows-*"))
    if processes == 1:
        goes_on(workdir, make_mesh(Mesh(**mesh), devices=jax.devices()[:devices]))
    else:
        run(processes, arguments(workdir, mesh), devices=devices, compiled=compiled)
    new, old = losses(workdir), losses(straight)
    assert [step for step, _ in new] == [step for step, _ in old]
    assert len(new) - SAVED_AT == 20
    np.testing.assert_allclose([loss for _, loss in new], [loss for _, loss in old], rtol=1e-5)
    parts = rows_read(workdir, processes)
    steps = range(SAVED_AT, STEPS)
    assert [step for step, _, _ in parts[0]] == list(steps), "it goes on where the checkpoint was"
    for step in steps:
        of_step = sorted({(first, last) for part in parts for at, first, last in part if at == step})
        assert of_step[0][0] == 0 and of_step[-1][1] == ROWS
        assert all(one[1] == other[0] for one, other in itertools.pairwise(of_step)), "no row twice"
    state = saved_state(workdir, STEPS)
    for mine, other in zip(state, saved_state(straight, STEPS), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "times"), [(1, 20), (2, 6)])
def test_kill_9_at_any_moment_loses_nothing_before_the_last_checkpoint(tmp_path, compiled, processes, times):
    """Every start reads what the last whole checkpoint held, whatever lies beside it half written."""
    program = [sys.executable, str(HERE / "killed_training.py"), str(tmp_path), str(processes), str(times), "7"]
    done = subprocess.run(program, env=environment(2, compiled), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    kills = json.loads((tmp_path / "kills.json").read_text())
    starts = [json.loads(line) for line in (tmp_path / "run" / "starts.jsonl").read_text().splitlines()]
    reference = json.loads((tmp_path / "reference.json").read_text())
    assert len(kills) == len(starts) == times
    for kill, start_after in zip(kills, starts, strict=True):
        assert all(code != 0 for code in kill["codes"]), "one killed process is the end of the others"
        assert start_after["step"] >= kill["seen"], "nothing lost but the steps since the last checkpoint"
        assert start_after["digest"] == reference[str(start_after["step"])], "a whole checkpoint was read"
    assert sum(bool(kill["half written"]) for kill in kills) >= times // 4, "some kills came while one was written"
    assert rows_without_time(tmp_path / "run") == rows_without_time(tmp_path / "straight")
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))
