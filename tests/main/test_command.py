"""What a user sees on the command line when something is wrong: one sentence, exit code 2, nothing left behind."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest

from kd_jax.config import base
from kd_jax.main import command

ROOT = pathlib.Path(__file__).parents[2]


def prepare(workdir, *arguments):
    command = [sys.executable, "-m", "kd_jax.main.prepare", *arguments]
    if workdir:
        command.append(f"--workdir={workdir}")
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    environment.pop("KD_JAX_DATA", None)
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


SMOKE = "--config=configs/quickstart.py:smoke"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((SMOKE, "--config.distil.steps=3"), ("distil", "kd_jax/config/base.py declares every key")),
        ((SMOKE, "--config.distill.steps=many"), ("steps", "many")),
        (("--config=configs/nothing.py",), ("configs/nothing.py",)),
        ((), ("--config is missing",)),
        ((SMOKE, "surplus"), ("unexpected argument 'surplus'",)),
        ((SMOKE, "--nothing=1"), ("nothing",)),
        ((SMOKE, "--config.study.seeds=(0,)", "--config.study.seeds=(2,)"), ("--config.study.seeds", "given 2 times")),
        ((SMOKE, "--config.rows.heldout_share=1.5"), ("config.rows.heldout_share", "1.5")),
        (("--config=configs/massive.py",), ("KD_JAX_DATA",)),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(tmp_path, arguments, words):
    workdir = tmp_path / "run"
    result = prepare(workdir, *arguments)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last
    assert not workdir.exists() or not any(workdir.iterdir())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("IoError: No space left on device (28)")]
)
def test_a_full_disk_is_one_sentence_whatever_wrote(tmp_path, capsys, error):
    def write(config, workdir):
        raise error

    assert command.guarded(write, base.get_config(), tmp_path) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: the disk is full or over its quota; free some space")


def test_missing_workdir_is_named():
    result = prepare(None, SMOKE)
    assert result.returncode == 2
    assert "--workdir is missing" in result.stderr
