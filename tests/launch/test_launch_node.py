"""launch/node.sh: one machine, which starts again what was preempted."""

import signal
import subprocess
import sys

import pytest

from tests.support.launchers import COMMAND, LAUNCH, launch, printed, wait_for


def program(tmp_path, codes: list[int]) -> list[str]:
    """A command that ends with one code after the other."""
    file = tmp_path / "starts"
    text = f"""
import pathlib, sys
file = pathlib.Path({str(file)!r})
file.write_text((file.read_text() if file.exists() else "") + "x")
sys.exit({codes!r}[len(file.read_text()) - 1])
"""
    return [sys.executable, "-c", text]


@pytest.mark.parametrize(
    "codes, restarts, code, starts",
    [([0], "5", 0, 1), ([75, 75, 0], "5", 0, 3), ([75, 75, 75], "1", 75, 2), ([75, 2], "5", 2, 2), ([1], "5", 1, 1)],
)
def test_a_node_starts_again_what_was_preempted(tmp_path, codes, restarts, code, starts):
    ran = launch("node.sh", "--restarts", restarts, "--pause", "0", *program(tmp_path, codes))
    assert ran.returncode == code
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert ran.stderr.count("preempted; starting again") == starts - 1


def test_a_node_that_is_told_to_stop_passes_it_on_and_does_not_start_again(tmp_path):
    text = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(75)))
place = pathlib.Path({str(tmp_path)!r})
(place / "starts").write_text(((place / "starts").read_text() if (place / "starts").exists() else "") + "x")
(place / "ready").touch()
time.sleep(60)
"""
    process = subprocess.Popen(["bash", LAUNCH / "node.sh", "--pause", "0", sys.executable, "-c", text])
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "starts").read_text() == "x"


def test_a_node_prints_its_command():
    assert printed("node.sh", *COMMAND) == [COMMAND]
    assert printed("node.sh", "--gpus", "0,1", *COMMAND) == [["env", "CUDA_VISIBLE_DEVICES=0,1", *COMMAND]]
