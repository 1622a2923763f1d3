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

from kd_jax.config.execution import Mesh
from kd_jax.data.prepared import Prepared
from kd_jax.jobs import finetune, trained
from kd_jax.main import prepare
from kd_jax.runtime.files import read_json_lines
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.state import params_fingerprint
from tests.support import pretrained, several_processes

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 14


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("prepared")
    config = pretrained.get_config("smoke")
    config.progress = False
    prepare.run(config, workdir)
    return workdir


def command(prepared, workdir, *more):
    return [
        *(sys.executable, "-m", "kd_jax.main.pretrain", "--config=tests/support/pretrained.py:smoke"),
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


def saved_in(workdir):
    """The steps of the checkpoints that are whole."""
    return sorted(int(one.name) for one in workdir.glob("checkpoints/*") if one.name.isdigit())


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
        # Not before a checkpoint is whole, or there would be nothing to resume from.
        if saved_in(killed) and len(metrics.read_text(encoding="utf-8").splitlines()) >= 5:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "DONE").exists()
    done, saved = read_json_lines(metrics, growing=True)[-1]["step"], saved_in(killed)
    assert saved and 0 < saved[-1] < STEPS

    finished = run(command(prepared, killed))
    assert finished.returncode == 0, finished.stderr
    summary = json.loads((killed / "DONE").read_text(encoding="utf-8"))
    assert (summary["starts"], summary["lost_steps"]) == (2, done - saved[-1]), "it went on from there"
    assert rows_of(straight) == rows_of(killed)
    one, other = leaves_of(straight), leaves_of(killed)
    assert one.keys() == other.keys()
    assert any("opt_state" in path for path in one)
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=str(path))


@pytest.mark.long
def test_early_stopping_is_the_same_across_a_kill(prepared, tmp_path):
    """With a learning rate so high that dev soon stops improving, the run stops early, whether killed before or not."""

    def start(workdir):
        values = {"epochs": 0, "steps": 60, "patience": 20, "evaluate_every": 1, "checkpoint_every": 3, "log_every": 1}
        values |= {"learning_rate": 0.5, "pooling": "mean", "encoder_rate": 0.5, "max_dev": 5}
        return [
            *(sys.executable, "-m", "kd_jax.main.finetune_dc", "--config=tests/support/pretrained.py:smoke"),
            *(f"--workdir={workdir}", f"--config.prepared={prepared}", "--config.progress=False"),
            *("--config.tensorboard=False", *(f"--config.finetune.{name}={value}" for name, value in values.items())),
        ]

    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finished = run(start(straight))
    assert finished.returncode == 0, finished.stderr
    done = json.loads((straight / "DONE").read_text(encoding="utf-8"))
    assert done["best_step"] < done["stopped_at"] < 60 and "stopped at step" in finished.stderr

    process = subprocess.Popen(start(broken), cwd=ROOT, env=environment(), stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if saved_in(broken):  # else there would be nothing to resume from
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "DONE").exists() and saved_in(broken)
    finished = run(start(broken))
    assert finished.returncode == 0, finished.stderr
    again = json.loads((broken / "DONE").read_text(encoding="utf-8"))
    assert again["starts"] == 2
    for name in ("parameters_fingerprint", "best_step", "stopped_at"):
        assert again[name] == done[name], name
    assert rows_of(straight) == rows_of(broken)
    scores = [row["dev/score"] for row in rows_of(straight) if "dev/score" in row]
    assert json.loads((broken / "dev.json").read_text())["score"] == max(scores)
    one, other = (what_is_read(folder) for folder in (straight, broken))
    assert one == other == done["parameters_fingerprint"]


def what_is_read(workdir):
    """Fingerprint of the parameters that evaluate, predict and export read."""
    config = trained.run_config(workdir, "x")
    found = finetune.load_finetuned(workdir, Prepared(config.prepared), make_mesh(Mesh()), "float32", "x")
    return params_fingerprint(found.params)


@pytest.mark.long
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


def terminated(arguments, stage):
    """(exit code, standard error) of a study that gets SIGTERM once a stage's folder exists."""
    process = subprocess.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while not any(stage()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    return process.returncode, errors


@pytest.mark.long
def test_a_study_that_is_preempted_in_every_kind_of_stage_ends_with_75_each_time_and_finishes(tmp_path):
    workdir = tmp_path / "study"
    arguments = [
        *(sys.executable, "-m", "kd_jax.main.study", "--config=tests/support/pretrained.py:smoke"),
        *(f"--workdir={workdir}", "--config.progress=False", "--config.tensorboard=False"),
        *("--config.study.tasks=('dc',)", "--config.study.adapted_sets=()", "--config.study.latency=False"),
    ]
    for kind in ("prepare", "pretrain-teacher", "cache-generic", "distilled-task", "dc-scratch", "test-dc-scratch"):
        # A stage may end before the signal arrives; the study then stops in the next one.
        code, errors = terminated(arguments, lambda kind=kind: workdir.glob(f"stages/{kind}-*"))
        assert code == 75, (kind, errors)
        assert errors.strip().splitlines()[-1].endswith("the same command resumes the run"), errors
    assert run(arguments).returncode == 0
    assert (workdir / "report.md").is_file()
    assert all((folder / "DONE").is_file() for folder in (workdir / "stages").iterdir())


@pytest.mark.long
def test_sigterm_to_one_of_two_processes_is_saved_by_both_and_the_run_is_the_same(prepared, tmp_path):
    """Stopped together at some step, and then exactly the run that was never stopped."""

    def start(workdir):
        settings = command(prepared, workdir, "--config.pretrain.log_every=1", "--config.pretrain.evaluate_every=2")
        return several_processes.start(2, settings[1:])

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    assert [code for code, *_ in several_processes.ended(start(straight))] == [0, 0]
    processes = start(stopped)
    metrics = stopped / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    found = several_processes.ended(processes)
    assert [code for code, *_ in found] == [75, 75], found
    assert not (stopped / "DONE").exists() and "is saved" in found[0][2] + found[1][2]
    assert [code for code, *_ in several_processes.ended(start(stopped))] == [0, 0]
    assert rows_of(straight) == rows_of(stopped)
    summary, wanted = (json.loads((one / "DONE").read_text(encoding="utf-8")) for one in (stopped, straight))
    assert summary["parameters_fingerprint"] == wanted["parameters_fingerprint"]
    assert summary["starts"] == 2 and summary["lost_steps"] == 0 and 0 < summary["goodput"] < 1


@pytest.mark.long
def test_skipping_may_be_allowed_when_a_run_is_started_again(prepared, tmp_path):
    """A key that may change on resume, and with it the compiled step, which computes the same."""
    straight, changed = tmp_path / "straight", tmp_path / "changed"
    assert run(command(prepared, straight)).returncode == 0
    assert run(command(prepared, changed, "--config.pretrain.skip_non_finite=2")).returncode == 0
    again = run(command(prepared, changed))
    assert again.returncode == 0, again.stderr
    for path, leaf in leaves_of(straight).items():
        np.testing.assert_array_equal(leaf, leaves_of(changed)[path], err_msg=str(path))
    assert {row["skipped_steps"] for row in rows_of(changed) if "loss" in row} == {0}
