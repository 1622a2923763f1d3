"""The examples of docs/library.md run as written and print what is expected."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("*.py"))


def run(name):
    """The lines that an example prints."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-m", f"docs.examples.{name}"]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_short_explained_and_run_here(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) < 80
    command = f"python -m docs.examples.{path.stem}"
    assert command in source
    assert command in (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert f"test_{path.stem}" in globals()


@pytest.mark.slow
def test_losses():
    *steps, memory = run("losses")
    divergences = [float(re.search(r"KL ([\d.]+)", line)[1]) for line in steps]
    assert len(divergences) == 4 and divergences == sorted(divergences, reverse=True)
    assert divergences[0] == pytest.approx(4.7, abs=0.1), "the mean over the positions of all blocks"
    assert divergences[-1] < divergences[0] / 3
    assert memory == "logits at a time: 5 MiB instead of 29 MiB, per model"


@pytest.mark.long
@pytest.mark.slow
def test_distill_step():
    lines = run("distill_step")
    found = [{name: float(value) for name, value in re.findall(r"(kl|mlm) ([\d.]+)", line)} for line in lines]
    assert [line.split(",")[0] for line in lines] == ["teacher", "teacher", "student", "student"]
    assert found[1]["mlm"] < found[0]["mlm"] - 0.3 and found[3]["mlm"] < found[2]["mlm"] - 0.3
    assert found[3]["kl"] < found[2]["kl"] / 3


def test_transfer_set():
    lines = run("transfer_set")
    shares = [float(re.search(r"'task': '([\d.]+)'", line)[1]) for line in lines if line.startswith("after")]
    assert shares[-1] == pytest.approx(0.7, abs=0.001) and shares[0] == pytest.approx(0.7, abs=0.15)
    assert any(
        re.fullmatch(r"global row 123456789: row \d+ of (task|generic)-en in its epoch \d+", line) for line in lines
    )
    assert "is the same: True" in lines[-1]


def test_evaluation():
    lines = run("evaluation")
    exact = [float(re.search(r"'exact_match': '([\d.]+)'", line)[1]) for line in lines if "exact_match'" in line]
    assert len(exact) == 3 and exact[0] < exact[1] < exact[2]
    judged = lines[lines.index("exact_match_error_rate") + 1 :]
    assert judged[0].startswith("  task text against generic text: lower (-")
    assert judged[1].startswith("  task text, adapted teacher against task text: undecided (")
    low, high = map(float, re.search(r"95 % (\S+) to (\S+),", judged[0]).groups())
    assert low < high < 0
