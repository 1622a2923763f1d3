"""Every experiment in configs/ loads the way --config=FILE.py[:smoke] loads it, and says how to run it."""

import ast
import json
import os
import pathlib
import re
from collections.abc import Iterator

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import massive_mmbert
from kd_jax.config import base
from kd_jax.main import study
from kd_jax.study import overview
from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "base"))
JOBS = ("pretrain", "adapt", "distill", "chain", "finetune")
# Keys under which an experiment names things of its own.
OPEN = ("sources", "study.transfer_sets", "study.selected_sets")
# Experiment -> a block that its own command reads and its own file declares.
OWN = {"benchmark": "benchmark"}


def load(path: pathlib.Path, argument: str | None = None) -> ConfigDict:
    """What --config=PATH[:argument] gives a command."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["command", f"--config={path}:{argument}" if argument else f"--config={path}"])
    return holder.value


def keys(config: ConfigDict, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves, down to what the experiment names itself."""
    for key, value in config.items():
        if isinstance(value, ConfigDict) and prefix + key not in OPEN:
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def docstring_problems(name: str, docstring: str | None) -> list[str]:
    """What the docstring of configs/<name> lacks of Command (which names the file), Hardware, Time and Result."""
    parts = dict(re.findall(r"^(Command|Hardware|Time|Result): +(.+?)(?=\n\S|\Z)", docstring or "", re.M | re.S))
    problems = [
        f"configs/{name}: the docstring has no line '{part}:'"
        for part in ("Command", "Hardware", "Time", "Result")
        if part not in parts
    ]
    if "Command" in parts and f"--config=configs/{name}" not in parts["Command"]:
        problems.append(f"configs/{name}: the command does not name --config=configs/{name}")
    return problems


def test_there_are_experiments():
    assert {"quickstart", "massive"} <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstring_names_command_hardware_time_and_result(path):
    assert not docstring_problems(path.name, ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


def test_docstring_problems_sees_each_gap():
    whole = "One.\n\nCommand:   python --config=configs/a.py\nHardware:  a laptop\nTime:      1 min\nResult:    fine"
    assert docstring_problems("a.py", whole) == []
    assert docstring_problems("b.py", whole) == ["configs/b.py: the command does not name --config=configs/b.py"]
    assert docstring_problems("a.py", whole.replace("Time: ", "When: ")) == [
        "configs/a.py: the docstring has no line 'Time:'"
    ]
    assert len(docstring_problems("a.py", None)) == 4


@pytest.mark.parametrize("argument", [None, "smoke"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_config_has_exactly_the_declared_keys(path, argument):
    config = load(path, argument)
    if path.stem in OWN:
        with config.unlocked():
            del config[OWN[path.stem]]
    assert set(keys(config)) == set(keys(base.get_config()))
    declared = set(base.source("generic", "text", ("de",)))
    assert config.sources and all(set(source) == declared for source in config.sources.values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_smoke_is_the_same_experiment_made_small(path):
    full, smoke = load(path), load(path, "smoke")
    assert set(smoke.sources) == set(full.sources)
    for job in JOBS:
        assert smoke[job].steps < full[job].steps, f"{path.name}:smoke trains {job} as long as the whole experiment"
        assert smoke[job].steps <= 10


@pytest.mark.long
@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in OWN], ids=lambda path: path.stem)
def test_every_config_runs_two_smoke_steps_from_text_to_report(path, tmp_path):
    config = load(path, "smoke")
    if "KD_JAX_DATA" in str(config) and "KD_JAX_DATA" not in os.environ:
        pytest.skip("KD_JAX_DATA names no folder; this config needs the larger data")
    config.study.tasks = ("icner",)
    config.study.transfer_sets = ConfigDict({"task": 1.0})
    config.study.adapted_sets = ()
    config.progress = config.tensorboard = False
    study.run(config, tmp_path)
    assert (tmp_path / "report.md").is_file()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    expected = {"ngrams", "probe", "scratch", "mlm", "distilled"}
    expected |= {"initialized"} if config.distill.init == "teacher" else set()
    if config.study.train_head or not config.study.teacher_import:  # else its masked-LM head is new, and not measured
        expected |= {"teacher"}
    assert {row["student"] for row in rows} == expected


RECIPES = ("massive_mmbert", "massive_xlmr")  # a teacher of the hub, and all languages


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("text, codes", [("", {"nb": "no"}), ("mc4", {"nb": "no", "tl": "fil", "he": "iw"})])
def test_public_recipes_read_all_of_massive_and_the_same_languages(name, text, codes):
    config = load(ROOT / "configs" / f"{name}.py", text or None)
    assert len(set(config.nlu.locales)) == len(config.nlu.locales) == 51
    assert {"zh-CN", "zh-TW", "tl-PH"} < set(config.nlu.locales) and "ca-ES" not in config.nlu.locales
    languages = [one for source in config.sources.values() if source.kind == "generic" for one in source.languages]
    assert sorted(languages) == sorted({locale.split("-")[0] for locale in config.nlu.locales})
    for language, code in codes.items():
        subset = config.sources[f"generic_{language}"].subset
        assert subset.removeprefix("20231101.") == code


@pytest.mark.parametrize("name", [*RECIPES, "massive_wikipedia"])
def test_public_recipes_can_be_run_dry_without_the_network(name, tmp_path, capsys, monkeypatch):
    for variable in ("KD_JAX_MMBERT", "KD_JAX_MASSIVE"):
        monkeypatch.delenv(variable, raising=False)
    config = load(ROOT / "configs" / f"{name}.py")
    overview.show_dry_run(study.open_study(config, tmp_path / "study"))
    lines = capsys.readouterr().out.splitlines()
    first = "import-teacher " if name in RECIPES else "pretrain-teacher "
    assert any(line.startswith(first) for line in lines)
    (total,) = [line.split() for line in lines if line.startswith("all ")]
    stated = re.search(
        r"the (\d\.\de18) FLOPs of --dry-run", " ".join((ROOT / "configs" / f"{name}.py").read_text().split())
    )
    assert stated and total[-1].endswith("E")
    assert float(total[-1][:-1]) == pytest.approx(float(stated[1]) / 1e18, abs=0.06)
    size = re.search(r"the largest stage takes (\d+) GiB", (ROOT / "configs" / f"{name}.py").read_text())
    found = re.search(r"^The largest stage takes ([\d.]+) GiB", "\n".join(lines), re.M)
    assert size and found and float(found[1]) == pytest.approx(float(size[1]), abs=0.5)
    assert not (tmp_path / "study").exists()


def test_a_recipe_tells_what_its_arguments_are():
    with pytest.raises(UserError, match="the argument 'mc5' is unknown; use one of wikipedia, mc4 or smoke"):
        massive_mmbert.get_config("mc5")
