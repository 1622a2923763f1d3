"""Killing a real command and starting it again: the same parameters, moments, metrics and rows, bit for bit."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import quickstart
from kd_jax.main import prepare

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 14


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepared")
    config = quickstart.get_config("smoke")
    config.progress = False
    prepare.run(config, workdir)
    return workdir


def command(prepared, workdir, *more):
    return [
        *(sys.executable, "-m", "kd_jax.main.pretrain", "--config=configs/quickstart.py:smoke"),
        *(f"--workdir={workdir}", f"--config.prepared={prepared}", f"--config.pretrain.steps={STEPS}"),
        *("--config.pretrain.checkpoint_every=3", "--config.progress=False", "--config.tensorboard=False", *more),
    ]


def environment():
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def run(arguments) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)


def rows_of(workdir, timed=False):
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{name: value for name, value in row.items() if timed or not name.startswith("time/")} for row in rows]


def leaves_of(workdir):
    handlers = {"state": ocp.StandardCheckpointHandler()}
    with ocp.CheckpointManager(workdir / "checkpoints", item_handlers=handlers) as saved:
        assert saved.latest_step() == STEPS
        tree = saved.restore(STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    found = {}

    def walk(node, path):
        if isinstance(node, dict):
            for name, child in node.items():
                walk(child, (*path, name))
        else:
            found[path] = np.asarray(node)

    walk(tree, ())
    return found


def test_kill_and_resume_is_bit_identical(prepared, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    finished = run(command(prepared, straight))
    assert finished.returncode == 0, finished.stderr

    process = subprocess.Popen(command(prepared, killed), cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    metrics = killed / "metrics.jsonl"
    while time.monotonic() < deadline and process.poll() is None:
        if metrics.exists() and len(metrics.read_text(encoding="utf-8").splitlines()) >= 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "DONE").exists()
    assert (killed / "checkpoints").is_dir()

    finished = run(command(prepared, killed))
    assert finished.returncode == 0, finished.stderr
    assert rows_of(straight) == rows_of(killed)
    one, other = leaves_of(straight), leaves_of(killed)
    assert one.keys() == other.keys()
    assert any("opt_state" in path for path in one)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=str(path))


def test_another_config_on_resume_is_refused_with_the_difference(prepared, tmp_path):
    workdir = tmp_path / "run"
    assert run(command(prepared, workdir)).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    refused = run(command(prepared, workdir, "--config.pretrain.learning_rate=0.5"))
    assert refused.returncode == 2
    assert "config.pretrain.learning_rate: 0.002 -> 0.5" in refused.stderr
    assert refused.stderr.startswith("error: ")
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    allowed = run(command(prepared, workdir, "--config.pretrain.log_every=7"))
    assert allowed.returncode == 0, allowed.stderr
