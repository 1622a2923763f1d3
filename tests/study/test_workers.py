"""Stages of a study that run at the same time: what they need comes first, and one that fails ends the others."""

import json
import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

from kd_jax.config import to_dict
from kd_jax.main import study
from kd_jax.runtime.cluster import cores
from kd_jax.runtime.files import read_json
from kd_jax.runtime.preemption import Preempted, Preemption
from kd_jax.study.attempts import read_attempt
from kd_jax.study.run import Study
from kd_jax.study.workers import Workers
from kd_jax.types import UserError
from tests.support import pretrained, toy_worker

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = (sys.executable, "-m", "tests.support.toy_worker")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """make(what its stages do instead of working) -> a study with two workers."""
    monkeypatch.chdir(ROOT)

    def make(**actions: str) -> Study:
        monkeypatch.setenv("TOY", json.dumps(actions))
        config = pretrained.get_config()
        config.study.update({"seeds": (0, 1), "tasks": ("dc",), "name": "Toy"})
        about = {"config": to_dict(config), "workdir": str(tmp_path)}
        return Study(to_dict(config), tmp_path, toy_worker.stage, study.KEYS, workers=Workers(PROGRAM, about, 2))

    return make


def processes(workdir) -> dict[str, int]:
    return {file.name: int(file.read_text()) for file in (workdir / "started").iterdir()}


needs_two = pytest.mark.skipif(len(cores()) < 2, reason="this machine has one core")


@needs_two
def test_every_stage_runs_once_after_what_it_needs_and_in_two_processes(toy, tmp_path, capsys):
    opened = toy()
    opened.run(quiet=True)
    stages = [stage for stage in opened.planned() if stage.command != "report"]
    keys = {stage.key: stage for stage in stages}
    assert all(opened.done(stage) for stage in stages)
    for stage in stages:
        before = read_json(opened.folder(stage) / "DONE")["before"]
        assert {keys[need].folder for need in stage.needs} <= set(before)
    ran = processes(tmp_path)
    assert ran.keys() == {stage.folder for stage in stages}
    assert len(set(ran.values()) - {os.getpid()}) == 2
    # Nothing else runs while latency is measured, and a phase of one stage has all cores.
    assert {keys[key].command for key in keys if ran[key] == os.getpid()} >= {"prepare", "latency"}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(stages) and lines[-1].endswith("the report is left")
    log = (tmp_path / "attempts" / f"{stages[-1].folder}.log").read_text()
    assert log == f"details of {stages[-1].command}\n"
    for worker in set(ran.values()) - {os.getpid()}:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


@needs_two
@pytest.mark.parametrize(
    "action, error, message",
    [
        ("fail", UserError, r"^config\.distill: it is wrong$"),
        pytest.param(
            *("crash", RuntimeError, r"(?s)stage distilled-.*, in a worker:.*ZeroDivisionError: a mistake of ours"),
            marks=pytest.mark.long,
        ),
        pytest.param(
            *("die", UserError, r"stage distilled-.*: its worker was killed by SIGKILL; start the study again"),
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_ends_one_stage_ends_the_study_and_a_new_start_goes_on(toy, action, error, message):
    opened = toy(distill=action)
    with pytest.raises(error, match=message):
        opened.run(quiet=True)
    for stage in opened.planned():
        assert not (stage.command == "distill" and opened.done(stage))
    again = toy()
    again.run(quiet=True)
    assert all(again.done(stage) for stage in again.planned() if stage.command != "report")


@needs_two
def test_a_study_that_is_asked_to_stop_asks_its_workers(toy, tmp_path):
    opened = toy(distill="wait")

    def ask(preemption: Preemption) -> None:
        while not list(tmp_path.glob("started/distilled-*")):
            time.sleep(0.02)
        preemption.request()

    with Preemption() as preemption, pytest.raises(Preempted, match="stopped between stages"):
        threading.Thread(target=ask, args=(preemption,), daemon=True).start()
        opened.run(quiet=True)
    stopped = [read_attempt(tmp_path, stage.folder) for stage in opened.planned() if stage.command == "distill"]
    outcomes = [attempt.outcome for attempt in stopped if attempt]
    assert outcomes and set(outcomes) == {"stopped"}


@pytest.mark.long
@needs_two
def test_a_study_with_workers_equals_one_without_on_as_many_cores(tmp_path):
    config = tmp_path / "small.py"
    config.write_text(
        "from tests.support import small_study\n\n\ndef get_config():\n    return small_study.get_config()\n"
    )
    found = {}
    for name, mine, more in (("one", cores()[:1], ()), ("two", cores()[:2], ("--config.study.workers=2",))):
        command = [
            sys.executable,
            "-m",
            "kd_jax.main.study",
            f"--config={config}",
            f"--workdir={tmp_path / name}",
            *more,
        ]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
        pin = f"import os, sys; os.sched_setaffinity(0, {mine}); os.execv(sys.argv[1], sys.argv[1:])"
        pinned = [sys.executable, "-c", pin]
        ended = subprocess.run([*pinned, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        # Their teacher, alone in its phase, had both cores, so the others are compared.
        found[name] = {
            done.parent.name: (read_json(done).get("parameters_fingerprint"), records_of(done.parent))
            for done in sorted((tmp_path / name / "stages").glob("*/DONE"))
            if "mlm-" in done.parent.name or "scratch-" in done.parent.name
        }
    assert len(found["one"]) > 4 and any(records for _, records in found["one"].values())
    assert found["one"] == found["two"]


def records_of(folder: pathlib.Path) -> list[str]:
    return [file.read_text() for file in sorted(folder.glob("records*.jsonl"))]
