"""The whole quickstart finds what the README says it finds."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def declared(report: str) -> dict[tuple[str, str], str]:
    """(error, what the student on task text is compared with) -> reading."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines() if line.startswith("| ")]
    return {(row[0], row[2]): row[-1] for row in rows if row[0] in ("DC, error", "ICNER, intent error")}


@pytest.mark.long
@pytest.mark.slow
def test_the_student_on_task_text_wins_its_declared_comparisons(tmp_path):
    command = [sys.executable, "-m", "kd_jax.main.study", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    # In its own process: these tests compile without optimization, and the teacher would take an hour.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = declared((tmp_path / "report.md").read_text(encoding="utf-8"))
    others = ("distilled, generic only", "from scratch", "from the teacher, not distilled", "n-grams")
    for error in ("DC, error", "ICNER, intent error"):
        for other in others:
            assert found[error, other] == "lower", (error, other, found)
    assert "Domains (DC): use task text and distill" in done.stdout
