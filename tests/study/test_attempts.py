import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from kd_jax.runtime.preemption import Preempted
from kd_jax.study.attempts import (
    FAILED,
    FINISHED,
    RUNNING,
    STOPPED,
    attempt,
    make_up,
    path_of,
    read_attempt,
)
from kd_jax.types import UserError


def test_an_attempt_is_running_inside_and_finished_after(tmp_path):
    assert read_attempt(tmp_path, "prepare-1") is None
    with attempt(tmp_path, "prepare-1"):
        inside = read_attempt(tmp_path, "prepare-1")
        assert (inside.outcome, inside.pid, inside.ended) == (RUNNING, os.getpid(), 0.0)
    after = read_attempt(tmp_path, "prepare-1")
    assert after.outcome == FINISHED
    assert after.started == inside.started <= after.ended <= time.time()


@pytest.mark.parametrize(
    "error, outcome",
    [(ValueError("no"), FAILED), (UserError("no"), FAILED), (Preempted("no"), STOPPED), (KeyboardInterrupt(), STOPPED)],
)
def test_how_an_attempt_ended_is_noted(tmp_path, error, outcome):
    with pytest.raises(type(error)), attempt(tmp_path, "prepare-1"):
        raise error
    found = read_attempt(tmp_path, "prepare-1")
    assert found.outcome == outcome
    assert type(error).__name__ in found.message


def test_a_process_that_only_helps_notes_nothing(tmp_path):
    with attempt(tmp_path, "prepare-1", writes=False):
        assert not path_of(tmp_path, "prepare-1").exists()


PROGRAM = """
import pathlib, sys, time
from kd_jax.study.attempts import attempt
with attempt(pathlib.Path(sys.argv[1]), "prepare-1"):
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path)], stdout=subprocess.PIPE, cwd=root)
    try:
        assert process.stdout is not None and process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_stage_that_another_process_runs_is_refused_and_free_when_it_was_killed(tmp_path, other_process):
    assert read_attempt(tmp_path, "prepare-1").outcome == RUNNING
    refusal = pytest.raises(UserError, match=rf"process {other_process.pid} on .* is running it")
    with refusal, attempt(tmp_path, "prepare-1"):
        raise AssertionError("it was let in")
    assert read_attempt(tmp_path, "prepare-1").pid == other_process.pid  # the note is as it was

    other_process.send_signal(signal.SIGKILL)
    other_process.wait()
    gone = read_attempt(tmp_path, "prepare-1")
    assert (gone.outcome, gone.message) == (STOPPED, "its process is gone")
    with attempt(tmp_path, "prepare-1"):
        assert read_attempt(tmp_path, "prepare-1").pid == os.getpid()


def test_an_attempt_that_was_killed_after_the_end_of_its_stage_is_recorded_as_finished(tmp_path, other_process):
    assert make_up(tmp_path, "prepare-1", lambda: 0.0) is None  # it runs
    started = read_attempt(tmp_path, "prepare-1").started
    other_process.kill()
    other_process.wait()
    assert make_up(tmp_path, "prepare-1", lambda: started + 5) == pytest.approx(5)
    found = read_attempt(tmp_path, "prepare-1")
    assert (found.outcome, found.ended, found.message) == (FINISHED, started + 5, "")
    assert make_up(tmp_path, "prepare-1", lambda: 0.0) is None  # once


def test_a_shorter_record_leaves_nothing_of_the_longer_one_before_it(tmp_path, monkeypatch):
    with pytest.raises(ValueError), attempt(tmp_path, "prepare-1"):
        raise ValueError("a long message " * 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", lambda *_: None)  # as if a kill came before it
        with attempt(tmp_path, "prepare-1"):
            assert read_attempt(tmp_path, "prepare-1").outcome == RUNNING
    with attempt(tmp_path, "prepare-1"):
        pass
    assert path_of(tmp_path, "prepare-1").read_text().endswith('"\n}\n')


def test_another_machines_note_is_believed(tmp_path):
    with attempt(tmp_path, "prepare-1"):
        values = json.loads(path_of(tmp_path, "prepare-1").read_text())
    path_of(tmp_path, "prepare-1").write_text(json.dumps({**values, "host": "elsewhere", "outcome": RUNNING}))
    assert read_attempt(tmp_path, "prepare-1").outcome == RUNNING


def test_a_note_that_is_being_written_is_none(tmp_path):
    with attempt(tmp_path, "prepare-1"):
        pass
    path_of(tmp_path, "prepare-1").write_text('{"outcome": "runn')
    assert read_attempt(tmp_path, "prepare-1") is None
