"""What all launchers have in common: --help, mistakes, missing programs, and the commands that docs/launch.md gives."""

import re
import shlex
import subprocess
import sys

import pytest

from tests.support.launchers import COMMAND, GKE, LAUNCH, ROOT, SCRIPTS, TPU, Tools, launch, planned_study


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_the_top(script):
    for option in ("-h", "--help"):
        ran = launch(script, option)
        assert ran.returncode == 0 and "Usage: bash launch/" in ran.stdout and not ran.stderr
        assert not ran.stdout.startswith("#")
        options = set(re.findall(r"^ {4,}(--[a-z-]+)\)", (LAUNCH / script).read_text(), re.M)) - {"--dry-run"}
        assert options <= set(re.findall(r"--[a-z-]+", ran.stdout))


@pytest.mark.parametrize(
    "script, arguments, problem",
    [
        ("slurm.sh", [], "the command is missing"),
        ("slurm.sh", ["--nodes", "0", "python"], "--nodes takes a number of at least 1, not '0'"),
        ("slurm.sh", ["--nodes"], "--nodes has no value"),
        ("slurm.sh", ["--nod", "2", "python"], "unknown option '--nod'"),
        ("slurm.sh", ["--per-gpu", "python"], "--per-gpu: there are no GPUs"),
        ("slurm_study.sh", ["--workdir=x"], "--config=configs/FILE.py is missing"),
        ("slurm_study.sh", ["--config=x"], "--workdir=DIR is missing"),
        ("slurm_study.sh", ["--config=x", "--workdir=gs://x"], "--workdir is a folder on a filesystem"),
        ("slurm_study.sh", ["--config=x", "--plan"], "--plan is given by this script"),
        ("slurm_study.sh", ["python"], "unknown option 'python'"),
        ("node.sh", [], "the command is missing"),
        ("node.sh", ["--gpus", "all", "python"], "--gpus takes numbers joined by commas, not 'all'"),
        ("node.sh", ["--restarts", "-1", "python"], "--restarts takes a number, not '-1'"),
        ("tpu_pod.sh", TPU, "the command is missing"),
        ("tpu_pod.sh", [*TPU[:-2], "python"], "--runtime is missing"),
        ("gke.sh", [*GKE, "--tpu", "tpu-v5-lite-podslice", "python"], "--topology is missing"),
        ("gke.sh", [*GKE, "python"], "give one of --tpu and --gpu"),
        ("gke.sh", [*GKE, "--tpu", "a", "--gpu", "b", "python"], "give one of --tpu and --gpu"),
        ("gke.sh", ["--name", "Kd_1", "--gpu", "b", "python"], "lower-case letters, digits and hyphens, not 'Kd_1'"),
        ("gke.sh", [*GKE, "--gpu", "b", "--volume", "data", "python"], "--volume is CLAIM:DIR, not 'data'"),
    ],
)
def test_mistakes_are_told_in_one_line(script, arguments, problem):
    ran = launch(script, *arguments)
    assert ran.returncode == 2
    assert not ran.stdout
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"launch/{script}: ") and problem in line and line.endswith("see --help")


@pytest.mark.parametrize(
    "script, tool, arguments",
    [
        ("slurm.sh", "sbatch", COMMAND),
        ("tpu_pod.sh", "gcloud", [*TPU, *COMMAND]),
        ("gke.sh", "kubectl", [*GKE, "--gpu", "b", *COMMAND]),
    ],
)
def test_a_missing_program_is_named(script, tool, arguments, tmp_path):
    for name in ("bash", "dirname", "printf", "sed", "mkdir", "mktemp", "rm"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    ran = launch(script, *arguments, PATH=str(tmp_path))
    assert ran.returncode == 2
    assert f"there is no {tool} here" in ran.stderr


def test_flags_that_launchers_add_are_known_to_every_command():
    ran = subprocess.run(
        [sys.executable, "-m", "kd_jax.main.prepare", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    for flag in ("--coordinator", "--processes", "--process"):
        assert flag in ran.stdout + ran.stderr


def commands_in_docs() -> list[list[str]]:
    """The calls of launchers in the code blocks of docs/launch.md."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "launch.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("bash launch/")]


@pytest.mark.parametrize("words", commands_in_docs(), ids=lambda words: words[0])
def test_the_commands_of_the_docs_can_be_given(words, tools, tmp_path):
    script = words[0].removeprefix("launch/")
    if script == "slurm_study.sh":
        words = [*[word for word in words if not word.startswith("--workdir")], *planned_study(tools, tmp_path)]
    ran = launch(script, "--dry-run", *words[1:], **tools.environment)
    assert ran.returncode == 0, ran.stderr


def test_the_docs_call_every_launcher():
    assert {words[0].removeprefix("launch/") for words in commands_in_docs()} == set(SCRIPTS)
