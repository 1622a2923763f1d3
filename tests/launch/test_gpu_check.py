"""launch/gpu_check.sh without a GPU: its errors, and the measurement at tiny sizes with the interpreted kernel."""

import json
import subprocess
import sys

import pytest

from tests.support.launchers import LAUNCH, launch

PYTHON = f"--python={sys.executable}"


def test_a_machine_without_a_gpu_is_an_error():
    ran = launch("gpu_check.sh", PYTHON)
    assert ran.returncode == 2 and "finds no GPU; install jax[cuda13]" in ran.stderr.splitlines()[-1]


def test_help_is_the_comment_at_the_top_and_an_unknown_argument_is_refused():
    ran = launch("gpu_check.sh", "--help")
    assert ran.returncode == 0 and "Usage: bash launch/gpu_check.sh" in ran.stdout and not ran.stdout.startswith("#")
    ran = launch("gpu_check.sh", "--tpu")
    assert ran.returncode == 2 and "unknown argument --tpu" in ran.stderr


@pytest.mark.long
def test_the_measurement_at_tiny_sizes(tmp_path):
    command = ["bash", LAUNCH / "gpu_check.sh", PYTHON, f"--workdir={tmp_path}", "--cpu"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + (tmp_path / "distill.log").read_text()
    result = json.loads((tmp_path / "gpu.json").read_text())
    fused, plain = (result["variants"][name] for name in ("fused", "plain"))
    assert fused["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert fused["losses"][0] != fused["losses"][2]  # the student is trained
    for one in (fused, plain):
        assert one["tokens_per_second"] == pytest.approx(2 * 64 / one["seconds"])
        assert one["share"] > 0 and one["bytes"] > 0
    for word in ("fused", "plain", "tokens/s"):
        assert word in (tmp_path / "summary.txt").read_text()
