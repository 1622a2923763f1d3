"""A few kills, and the other faults: each run ends like an undisturbed one. docs/long-runs.md has more kills."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.faults import forks, kills, resources

ROOT = pathlib.Path(__file__).parents[2]


def program(name, *arguments):
    """Runs a script of this folder in its own process, since it forks and so must have no JAX backend."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"tests.faults.{name}", *map(str, arguments)]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3000)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def test_times_are_left_out_of_a_comparison_and_nothing_else_is(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, second, key in ((one, 1, ""), (other, 2, " --config.watchdog_seconds=15.0")):
        (folder / "empty").mkdir(parents=True)
        (folder / "DONE").write_text(json.dumps({"finished": second, "best_step": 3}))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, "time/goodput": second}) + "\n")
        (folder / "seconds.json").write_text(str(second))
        text = f"An error of 5, by kd-jax study{key} --workdir=run\n\n{forks.TIME_TABLE.decode()}\n| all | {second} |\n"
        (folder / "report.md").write_text(text)
        (folder / "other.json").write_text('{"finished": 1}')
    assert forks.differences(forks.contents(one), forks.contents(other)) == []
    for name, text in (
        ("DONE", '{"finished": 2, "best_step": 4}'),
        ("metrics.jsonl", '{"step": 1, "loss": 0.6, "time/goodput": 1}\n'),
        ("report.md", "An error of 6\n"),
        ("other.json", '{"finished": 2}'),
    ):
        (other / name).write_text(text)
    (other / "empty").rmdir()
    (other / ".DONE.1.tmp").write_text("")
    (one / "seconds.json").unlink()
    assert forks.differences(forks.contents(one), forks.contents(other)) == [
        *("differs: DONE", "differs: metrics.jsonl", "differs: other.json", "differs: report.md"),
        *("missing: empty/", "stray: .DONE.1.tmp", "stray: seconds.json"),
    ]


def test_a_time_below_zero_is_found(tmp_path):
    (tmp_path / "DONE").write_text(json.dumps({"goodput": 1.5, "wall_seconds": 3.0, "other_seconds": -1.0}))
    (tmp_path / "metrics.jsonl").write_text('{"step": -1, "time/steps_seconds": -0.5}\n')
    assert sorted(kills.impossible_times(tmp_path)) == [
        "DONE: goodput is 1.5",
        "DONE: other_seconds is -1.0",
        "metrics.jsonl: time/steps_seconds is -0.5",
    ]


@pytest.mark.slow
def test_ten_kills(tmp_path):
    print(program("kills", "--count=10", f"--workdir={tmp_path}", "--commands=prepare,pretrain,cache_states"))
    found = kills.records(tmp_path / "kill.jsonl")
    assert sum(len(one["kills"]) for one in found) >= 10


@pytest.mark.long
@pytest.mark.parametrize(
    "fault", ["--fault=kill", "--fault=term", "--fault=stop --seconds=20", "--fault=clock", "--fault=store"]
)
def test_every_fault(tmp_path_factory, fault):
    """All in one folder, so that they share undisturbed runs and compiled programs."""
    workdir = tmp_path_factory.getbasetemp() / "faults"
    print(program("kills", "--count=20", f"--workdir={workdir}", *fault.split()))


@pytest.mark.long
def test_memory_does_not_grow_with_the_text(tmp_path):
    print(program("resources", "--only=text", f"--workdir={tmp_path}"))
    found = json.loads((tmp_path / "resources.json").read_text())["memory"]
    assert [name for name, *_ in found] == [name for name, *_ in resources.COMMANDS]
    assert {name: round(ten / one, 2) for name, one, ten in found if ten > 1.2 * one} == {}


@pytest.mark.long
def test_a_study_of_nine_students_holds_as_much_as_one_of_three(tmp_path):
    print(program("resources", "--only=study", "--seeds=1,3", f"--workdir={tmp_path}"))
    few, more = json.loads((tmp_path / "resources.json").read_text())["study"]
    for name in ("files", "threads", "children"):
        assert max(one[name] for one in more["stages"]) <= max(one[name] for one in few["stages"]) + 2, name
    assert set(more["checkpoints"].values()) <= {0, 1, 2}  # keep_checkpoints
