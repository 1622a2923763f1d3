"""What a user sees on the command line when something is wrong: one sentence, exit code 2, nothing left behind."""

import errno
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from kd_jax.config import base, to_dict
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
        ((), ("--config is missing", "e.g. --config=configs/quickstart.py")),
        (("--config.seed=1",), ("--config is missing",)),
        ((SMOKE, "surplus"), ("unexpected argument 'surplus'",)),
        (("configs/quickstart.py:smoke",), ("did you mean --config=configs/quickstart.py:smoke?",)),
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


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("en-US,de-DE", ("en-US", "de-DE")),
        ("(en-US, de-DE)", ("en-US", "de-DE")),
        ("en-US,", ("en-US",)),
        ("en-US", ("en-US",)),
        ("('en-US','de-DE')", ("en-US", "de-DE")),
        ("0,1", (0, 1)),
        ("()", ()),
    ],
)
def test_tuples_without_quotes(typed, values):
    flag_values, line = flags.FlagValues(), ["command", f"--config.key={typed}"]
    known = ConfigDict({"key": ("a", "b")})
    holder = config_flags.DEFINE_config_dict("config", known, flag_values=flag_values, sys_argv=line)
    flag_values(line)
    assert holder.value.key == values


def test_task_text_follows_the_locales_of_the_command_line():
    for more, languages in (((), ("en-US",)), (("--config.sources.task.languages=en",), ("en",))):
        flag_values = flags.FlagValues()
        line = ["command", f"--config={ROOT / 'configs/quickstart.py'}", "--config.nlu.locales=en-US", *more]
        holder = config_flags.DEFINE_config_file("config", flag_values=flag_values, sys_argv=line)
        flag_values(line)
        values = to_dict(holder.value)
        assert values["sources"]["task"]["languages"] == list(languages)
        assert values["nlu"]["locales"] == ["en-US"]


def test_missing_workdir_is_named():
    result = prepare(None, SMOKE)
    assert result.returncode == 2
    assert "--workdir is missing" in result.stderr
