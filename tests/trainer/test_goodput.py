import json

import pytest

from kd_jax.trainer import goodput as module
from kd_jax.trainer.goodput import Goodput


class Clock:
    """Stands in for the time module: both clocks move together, by hand."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    def monotonic(self):
        return self.now - 900.0


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_every_second_counts_once_and_as_the_innermost_kind(clock):
    goodput = Goodput()
    goodput.start(None, 0)
    clock.now += 5  # start-up
    with goodput.spent("steps"):
        clock.now += 10
        with goodput.spent("data_wait"):
            clock.now += 2
        clock.now += 20
        with goodput.spent("compile"):
            clock.now += 3
    assert goodput.summary() == {
        "goodput": 30 / 40,
        "wall_seconds": 40.0,
        "steps_seconds": 30.0,
        "data_wait_seconds": 2.0,
        "compile_seconds": 3.0,
        "evaluation_seconds": 0.0,
        "checkpoint_seconds": 0.0,
        "other_seconds": 5.0,
        "starts": 1,
        "lost_steps": 0,
        "skipped_steps": [],
    }


def test_what_is_still_going_on_counts(clock):
    goodput = Goodput()
    with goodput.spent("steps"):
        clock.now += 8
        assert goodput.times()["time/goodput"] == 1.0
        clock.now += 2
        assert goodput.saved()["seconds"]["steps"] == 10.0


def test_a_restart_goes_on_from_the_checkpoint_and_counts_what_was_lost(clock, tmp_path):
    first = Goodput(tmp_path)
    first.start(None, 0)
    with first.spent("steps"):
        clock.now += 10
        first.skipped.append(3)
        saved = json.loads(json.dumps(first.saved()))
        clock.now += 7  # these steps are not saved: the process is killed
    clock.now += 3  # and started again
    second = Goodput(tmp_path)
    second.start(saved, 7)
    with second.spent("steps"):
        clock.now += 30
    found = second.summary()
    assert (found["steps_seconds"], found["wall_seconds"], found["goodput"]) == (40.0, 50.0, 0.8)
    assert (found["starts"], found["lost_steps"], found["other_seconds"]) == (2, 7, 10.0)
    assert found["skipped_steps"] == [3]
    third = Goodput(tmp_path)  # killed before its first checkpoint: what was lost before is not forgotten
    third.start(saved, 5)
    assert third.summary()["lost_steps"] == 12


def test_metrics_are_times():
    names = set(Goodput().times())
    assert names == {f"time/{kind}_seconds" for kind in module.KINDS} | {"time/goodput"}
