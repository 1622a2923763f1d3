"""The command kd-jax: help, mistakes, the command line that a run records, and the config that `init` writes."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from docs.examples.own_data import write_data
from kd_jax.__main__ import COMMANDS, main
from kd_jax.config import base, starter

ROOT = pathlib.Path(__file__).resolve().parents[1]


def kd_jax(*arguments: str | pathlib.Path, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What `kd-jax ARGUMENTS` does in a process of its own."""
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "kd_jax", *map(str, arguments)]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def test_the_table_has_every_command():
    files = (ROOT / "kd_jax" / "main").glob("*.py")
    runnable = {file.stem for file in files if 'if __name__ == "__main__"' in file.read_text(encoding="utf-8")}
    assert {*COMMANDS} - {"init"} == runnable


def test_help_has_a_line_for_each_command_and_imports_none():
    code = (
        "import sys, kd_jax.__main__ as it; it.main(['--help']); print({'jax', 'numpy', 'absl'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    *lines, imported = done.stdout.splitlines()
    assert imported == "set()"
    for name, about in COMMANDS.items():
        assert f"  {name:<16}{about}" in lines and len(about) < 84


def test_help_of_a_command():
    for name in ("pretrain", "predict"):
        done = kd_jax(name, "--help")
        assert name in done.stdout and not done.stderr


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["stdy"], "there is no command 'stdy'; did you mean study?"),
        (["finetune-dc"], "there is no command 'finetune-dc'; did you mean finetune_dc?"),
        (["--config=x"], "there is no command '--config=x'; kd-jax --help lists them"),
        ([], "name a command; kd-jax --help lists them"),
        (["init"], "init takes one folder: kd-jax init DIR"),
        (["init", "--help"], "init takes one folder: kd-jax init DIR"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, problem, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.err == f"error: {problem}\n" and not printed.out


def test_a_mistake_in_a_command_has_its_exit_code():
    done = kd_jax("pretrain", "--config=configs/quickstart.py")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --workdir is missing")


def test_the_recorded_command_line_runs_the_same_command(tmp_path):
    """A module that prints its provenance takes the place of a command."""
    code = (
        "import sys, runpy, kd_jax.__main__ as it; run = runpy.run_module\n"
        "runpy.run_module = lambda name, **how: run('tests.support.print_command_line', **how)\n"
        "it.main(['study', '--config=a b.py:smoke', '--config.seed=1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "python -m tests.support.print_command_line '--config=a b.py:smoke' --config.seed=1\n"


def load(path: pathlib.Path, argument: str = "") -> ConfigDict:
    """What --config=PATH:argument gives a command."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["command", f"--config={path}:{argument}"])
    return holder.value


def unknown_keys(config: ConfigDict, known: ConfigDict, prefix: str = "") -> list[str]:
    """Keys of a config that base.py does not declare; sources and transfer sets have names of their own."""
    found = []
    for key, value in config.items():
        if key not in known:
            found.append(prefix + key)
        elif isinstance(value, ConfigDict) and prefix + key not in ("sources", "study.transfer_sets"):
            found += unknown_keys(value, known[key], f"{prefix}{key}.")
    return found


def test_init_writes_a_config_that_loads_wherever_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "mine"]) == 0
    file = pathlib.Path("mine", "config.py")
    assert f"kd-jax study --config={file} --workdir=mine/run" in capsys.readouterr().out
    config = load(file)
    assert config.nlu.path == str(tmp_path / "mine" / "nlu")
    assert unknown_keys(config, base.get_config()) == []
    assert load(file, "smoke").pretrain.steps == 2


def test_unknown_keys_are_found():
    config = starter.get_config()
    config.study.update({"seed": 1, "transfer_sets": {"mine": 0.1}})
    assert unknown_keys(config, base.get_config()) == ["study.seed"]


def test_init_replaces_nothing(tmp_path, capsys):
    (tmp_path / "config.py").write_text("mine")
    assert main(["init", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/config.py exists already")
    assert (tmp_path / "config.py").read_text() == "mine"
    assert main(["init", str(tmp_path / "config.py" / "below")]) == 2
    assert "Not a directory" in capsys.readouterr().err


@pytest.fixture(scope="module")
def own_data(tmp_path_factory) -> pathlib.Path:
    """A folder with the config of `init`, and small data where its comments want them."""
    folder = tmp_path_factory.mktemp("own")
    assert main(["init", str(folder)]) == 0
    write_data.main(folder)
    return folder


# In place of the same model on the hub.
TEACHER = ("--config.tokenizer.path=embedded", "--config.study.teacher_import=embedded")


def test_a_study_of_own_data_is_checked_and_planned(own_data):
    config = f"--config={own_data / 'config.py'}:smoke"
    checked = kd_jax("prepare", config, *TEACHER, "--check", cwd=own_data)
    assert checked.returncode == 0, checked.stderr
    assert "domains in train (2)" in checked.stdout
    planned = kd_jax("study", config, *TEACHER, "--dry-run", cwd=own_data)
    assert planned.returncode == 0, planned.stderr
    assert planned.stdout.startswith("My data: ")


@pytest.mark.long
def test_a_study_of_own_data_runs(own_data):
    run = own_data / "run"
    done = kd_jax("study", f"--config={own_data / 'config.py'}:smoke", *TEACHER, f"--workdir={run}", cwd=own_data)
    assert done.returncode == 0, done.stderr
    assert (run / "report.html").is_file()
    (stage, *_) = sorted(run.glob("**/run.json"))
    assert json.loads(stage.read_text())["command_line"].startswith("python -m kd_jax.main.study --config=")
