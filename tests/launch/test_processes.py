"""launch/processes.sh: what it starts, how it ends and starts again; and a study by it, against one process."""

import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from kd_jax.trainer.metrics import TIME
from tests.support.several_processes import ROOT, environment

SCRIPT = str(ROOT / "launch" / "processes.sh")

# A member of a job: member.sh FOLDER WHAT --coordinator=... --processes=... --process=...
MEMBER = """
process=${5#--process=}
echo "here is $process" && echo "$3 $4" >>"$1/places.txt" && echo "trouble of $process" >&2
case $2 in
  twice) turn=$(grep -c . "$1/places.txt"); if ((turn <= 4)); then sleep 0.5; exit 75; fi ;;
  fail) if [[ $process == 1 ]]; then exit 3; fi; sleep 0.5; exit 5 ;;
  wait) trap 'echo "told $process"; exit 75' TERM; touch "$1/up-$process"; while true; do sleep 0.05; done ;;
esac
"""


@pytest.fixture
def member(tmp_path):
    script = tmp_path / "member.sh"
    script.write_text(MEMBER, encoding="utf-8")
    return [str(script), str(tmp_path)]


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", SCRIPT, *arguments], capture_output=True, text=True, timeout=120)


def test_a_dry_run_prints_the_commands_and_runs_none(tmp_path):
    shown = launch("--dry-run", "-n", "2", "--devices", "4", "touch", str(tmp_path / "a file"))
    first, second = shown.stdout.splitlines()
    coordinator = re.search(r"--coordinator=localhost:\d+", first)
    assert coordinator and coordinator.group() in second
    assert "--processes=2 --process=0" in first and "--processes=2 --process=1" in second
    assert "xla_force_host_platform_device_count=4" in first
    assert "a\\ file" in first
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(("-n", "0", "true"), "-n takes a number"), (("--many", "true"), "unknown option '--many'"), ((), "is missing")],
)
def test_mistakes_are_named(arguments, words):
    refused = launch(*arguments)
    assert refused.returncode == 2
    assert words in refused.stderr


def test_every_line_begins_with_its_process(member):
    done = launch("-n", "3", "bash", *member, "end")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"[{number}] here is {number}" for number in range(3)]
    assert sorted(done.stderr.splitlines()) == [f"[{number}] trouble of {number}" for number in range(3)]


def test_a_preempted_job_is_started_again_as_a_whole(member, tmp_path):
    done = launch("-n", "2", "--restarts", "2", "bash", *member, "twice")
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "places.txt").read_text().splitlines()) == 6
    (tmp_path / "places.txt").unlink()
    assert launch("-n", "2", "--restarts", "1", "bash", *member, "twice").returncode == 75


def test_the_first_failure_is_the_exit_code(member):
    assert launch("-n", "3", "bash", *member, "fail").returncode == 3


def test_sigterm_reaches_every_process_and_ends_the_job(member, tmp_path):
    command = ["bash", SCRIPT, "-n", "2", "--restarts", "5", "bash", *member, "wait"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while len(list(tmp_path.glob("up-*"))) < 2:
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 75, "an outer launcher starts it again"
    assert "[0] told 0" in output and "[1] told 1" in output
    assert len((tmp_path / "places.txt").read_text().splitlines()) == 2, "it was not started again here"


@pytest.mark.long
@pytest.mark.slow
def test_an_unchanged_config_gives_the_same_on_1_device_8_devices_and_4_processes(tmp_path):
    """A study of every command, at two steps a job."""
    folders = {name: tmp_path / name for name in ("one", "eight", "four")}
    for name, folder in folders.items():
        command = [
            sys.executable,
            "-m",
            "kd_jax.main.study",
            "--config=tests/support/small_study.py",
            f"--workdir={folder}",
        ]
        if name == "four":
            command = ["bash", SCRIPT, "-n", "4", *command]
        known = environment(8 if name == "eight" else 1, tmp_path / "compiled")
        done = subprocess.run(command, cwd=ROOT, env=known, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        assert f"Report: {folder}" in done.stdout
    one, *others = folders.values()
    for other in others:
        assert_same(one, other)
    runs = [json.loads(file.read_text()) for file in folders["four"].glob("stages/*/run.json")]
    assert len(runs) > 8
    assert all(found["process_count"] == 4 and len(found["starts"]) == 1 for found in runs)


def assert_same(one: pathlib.Path, other: pathlib.Path) -> None:
    """Losses to 1e-5, what was predicted exactly."""
    stages = sorted(folder.name for folder in (one / "stages").iterdir())
    assert stages == sorted(folder.name for folder in (other / "stages").iterdir())
    compared = 0
    for stage in stages:
        rows, same = (read_lines(root / "stages" / stage / "metrics.jsonl") for root in (one, other))
        assert [row.keys() for row in rows] == [row.keys() for row in same]
        for row, its in zip(rows, same, strict=True):
            compared += 1
            for name, value in row.items():
                if not name.startswith(TIME) and value is not None:
                    np.testing.assert_allclose(its[name], value, rtol=1e-5, atol=1e-6, err_msg=f"{stage} {row} {name}")
        records = [root / "stages" / stage / "records.jsonl" for root in (one, other)]
        if records[0].exists():
            assert records[0].read_text() == records[1].read_text()
            compared += 1
    assert compared > 20
    results, same = (read_lines(root / "results.jsonl") for root in (one, other))
    assert len(results) == len(same) > 100
    for row, its in zip(results, same, strict=True):
        value, found = row.pop("value"), its.pop("value")
        assert row == its
        assert found == (value if value is None else pytest.approx(value, rel=1e-5, abs=1e-9)), row


def read_lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
