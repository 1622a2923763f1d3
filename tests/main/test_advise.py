"""The advisor as a command: its files, resuming, the budget, and errors; mostly with a stand-in for stages."""

import importlib.util
import json
import re
import types

import pytest

from configs import massive_me5, quickstart
from kd_jax.config import base, to_dict
from kd_jax.config.commands import Advise
from kd_jax.config.settings import read
from kd_jax.main import advise, study
from kd_jax.study import advise as statistics
from kd_jax.study.run import Study
from kd_jax.types import UserError
from tests.support import finished_runs, pretrained, small_study
from tests.support.report_inputs import dc_record

RATES = {"generic": 0.3, "mix50": 0.2, "task": 0.15}
SECONDS = {"prepare": 60.0, "pretrain": 120.0, "cache_teacher": 5.0, "distill": 30.0}  # 10 for others
FILES = ("advice.json", "advice.md", "metrics.csv", "pilots.jsonl", "ratios.csv", "study.py")


class Stages:
    """Runs no stage, but writes what the advisor reads; counts how often each was run."""

    def __init__(self, stop_at: int | None = None, head: bool = True):
        self.ran: list[str] = []
        self.stop_at, self.head = stop_at, head

    def __call__(self, name, values, folder):
        if len(self.ran) == self.stop_at:
            raise KeyboardInterrupt
        self.ran.append(folder.name)
        folder.mkdir(parents=True)
        row = {"kind": "task", "count": 10, "loss": 5.0, "unigram_loss": 6.0}
        self.write(folder, "heldout.json", [row] if self.head else [])
        if name == "distill":
            task = {"tokens_share": values["transfer"]["task_share"]}
            self.write(folder, "run.json", {"realized": {"kinds": {"task": task} if task["tokens_share"] else {}}})
        if name == "evaluate":
            seed = int(re.search(r"seed(\d+)", folder.name)[1])
            rate = next(rate for text, rate in RATES.items() if f"distilled-{text}-" in folder.name)
            rate -= 0.08 * ("-adapted-" in folder.name)
            numbers = [(37 * n + 11 * seed) % 400 / 400 for n in range(400)]
            records = [dc_record(n, "en-US", "music", number > rate) for n, number in enumerate(numbers)]
            lines = [json.dumps({**one, "test_sets": ["dev"]}) for one in records]
            (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
        self.write(folder, "DONE", {"steps_seconds": SECONDS.get(name, 10.0) / 2} if name == "distill" else {})

    @staticmethod
    def write(folder, file, content):
        (folder / file).write_text(json.dumps(content))


class Text:
    """Stand-in for a prepared folder."""

    def __init__(self, folder=None, dev=400):
        self.utterances = [types.SimpleNamespace(partition="dev")] * dev

    def stores(self, split):
        store = types.SimpleNamespace(kind="task", source="task", texts=1000)
        return [store, types.SimpleNamespace(kind="generic", source="generic", texts=5)]


@pytest.fixture
def stand_in(monkeypatch):
    """start(workdir, stages, **changes of config.advise): the command with its stages replaced."""

    def start(workdir, stages, **changes):
        config = pretrained.get_config()
        config.study.update({"tasks": ("dc",), "seeds": (0, 1, 2), "cache": False})
        config.advise.update(changes)

        def opened(config, workdir, **together):
            return Study(to_dict(config), workdir, stages, study.KEYS)

        monkeypatch.setattr(advise, "open_study", opened)
        monkeypatch.setattr(advise, "Prepared", Text)
        monkeypatch.setattr(advise, "transfer_set_of", lambda *_: None)
        monkeypatch.setattr(advise, "product_rate", lambda: 1e15)
        domain = {"domain": "music", "tokens": 5, "jsd": 0.5, "jsd_matched": 0.5, "overlap": 0.5}
        about = {"texts": {"task": 1}, "tokens": {"task": 5}, "jsd": 0.5, "overlap": 0.5, "domains": [domain]}
        monkeypatch.setattr(advise, "data", lambda prepared: about)

        def seconds(folder):
            return next((took for name, took in SECONDS.items() if name in kind(folder)), 10.0)

        def kind(folder):
            first = folder.name.split("-")[0]
            return "distill" if first == "distilled" else "pretrain" if first == "adapt" else first

        monkeypatch.setattr(advise, "read_seconds", seconds)
        advise.run(config, workdir)
        return json.loads((workdir / "advice.json").read_text())

    return start


def test_the_advice_comes_with_all_of_its_files_and_the_same_command_runs_nothing(stand_in, tmp_path, capsys):
    stages = Stages()
    found = stand_in(tmp_path, stages, budget_minutes=600.0)
    assert all((tmp_path / name).is_file() for name in FILES)
    assert found["choice"]["set"] == "task" and found["adapting"]["gain"] > 4
    assert (tmp_path / "advice.md").read_text().startswith("Distill on task text alone.")
    assert "Distill on task text alone." in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "pilots.jsonl").read_text().splitlines()]
    assert len(lines) == found["cost"]["pilots"] > 9
    assert {one["seconds"] for one in lines} == {50.0}, "distillation, finetuning and scoring"
    assert all((tmp_path / "stages" / folder / "DONE").is_file() for one in lines for folder in one["scored"].values())
    count = len(stages.ran)
    assert stand_in(tmp_path, stages, budget_minutes=600.0) == found
    assert len(stages.ran) == count == len(set(stages.ran)), "no stage is run twice"


@pytest.mark.long
@pytest.mark.parametrize("stop_at", [0, 9, 30])
def test_a_killed_search_resumes(stand_in, tmp_path, stop_at):
    whole = Stages()
    wanted = stand_in(tmp_path / "whole", whole, budget_minutes=600.0)
    killed, resumed = Stages(stop_at=stop_at), Stages()
    with pytest.raises(KeyboardInterrupt):
        stand_in(tmp_path / "killed", killed, budget_minutes=600.0)
    found = stand_in(tmp_path / "killed", resumed, budget_minutes=600.0)
    assert killed.ran + resumed.ran == whole.ran
    assert found.pop("command") != wanted.pop("command") and found == wanted


def test_a_rung_starts_only_if_it_fits_and_a_larger_budget_continues(stand_in, tmp_path, capsys):
    stages = Stages()
    found = stand_in(tmp_path, stages, budget_minutes=8.0, margin=0.0, amounts=(), adapt=False)
    assert found["cost"]["stopped"] and 4 < found["cost"]["minutes"] <= 8
    assert "a larger budget continues from here" in " ".join(capsys.readouterr().out.split())
    assert {row["steps"] for row in found["sets"]} == {12}
    first = list(stages.ran)
    more = stand_in(tmp_path, stages, budget_minutes=60.0, margin=0.0, amounts=(), adapt=False)
    assert stages.ran[: len(first)] == first and len(set(stages.ran)) == len(stages.ran)
    assert more["cost"]["minutes"] > found["cost"]["minutes"] and max(row["steps"] for row in more["sets"]) > 12


@pytest.mark.parametrize(
    ("minutes", "words"),
    [
        (0.9, "the text, the teacher and one pilot take about"),
        (4.5, "two transfer sets cannot be compared; one pilot takes 50 s; give at least 6"),
    ],
)
def test_a_budget_below_a_comparison_is_one_sentence_with_the_minutes(stand_in, tmp_path, minutes, words):
    with pytest.raises(UserError, match=re.escape("config.advise.budget_minutes: ")) as error:
        stand_in(tmp_path, Stages(), budget_minutes=minutes)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_two_transfer_sets_are_compared_where_three_do_not_fit(stand_in, tmp_path):
    found = stand_in(tmp_path, Stages(), budget_minutes=5.2)
    assert [row["set"] for row in found["sets"]] == ["generic", "task"] and found["cost"]["untried"] == ["mix50"]


def test_a_teacher_without_a_trained_head_is_not_adapted(stand_in, tmp_path):
    found = stand_in(tmp_path, Stages(head=False), budget_minutes=600.0)
    assert "masked-LM head is not trained" in found["adapting"]["why"]


def test_less_task_text_shares_the_prepared_folder_and_the_full_study_reuses_the_pilots(stand_in, tmp_path):
    stages = Stages()
    found = stand_in(tmp_path, stages, budget_minutes=600.0, steps=(1.0,), seeds=(1,))
    assert sum(name.startswith("prepare-") for name in stages.ran) == 1
    assert sum(name.startswith("distilled-task-generic-seed0-") for name in stages.ran) == 3, "all, 0.1 and 0.3"
    assert found["task_text"]["texts"] == [100, 300, 1000]
    full = loaded(tmp_path / "study.py").get_config()
    assert full.study.transfer_sets.to_dict() == {"generic": 0.0, "task": 1.0}
    assert full.study.seeds == (0, 1, 2, 3, 4) and full.study.adapted_sets == ("task",)
    together = Study(to_dict(full), tmp_path, stages, study.KEYS)
    reused = [one.name for one in together.planned() if together.done(one) and one.name.startswith("distilled-task")]
    assert "distilled-task-generic-seed0" in reused


def loaded(file):
    """A config file as a module."""
    spec = importlib.util.spec_from_file_location("written", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "config", [quickstart.get_config(), massive_me5.get_config("logits"), small_study.get_config()]
)
def test_a_config_written_as_python_reads_as_it_was(tmp_path, config):
    config.study.transfer_sets = {"a b": 0.25, "task": 1.0}
    (tmp_path / "study.py").write_text(advise.config_file(config, "kd-jax study"))
    assert to_dict(loaded(tmp_path / "study.py").get_config()) == to_dict(config)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"shares": (1.0,)}, "shares"),
        ({"shares": (0.0, 1.5)}, "shares"),
        ({"shares": (1.0, 1.0)}, "shares"),
        ({"steps": (0.5, 0.25), "seeds": (1, 1)}, "steps"),
        ({"steps": (0.0, 0.25), "seeds": (1, 1)}, "steps"),
        ({"seeds": (1, 2)}, "seeds"),
        ({"seeds": (0, 1, 2)}, "seeds"),
        ({"budget_minutes": 0.0}, "budget_minutes"),
        ({"drop_below": 1.0}, "drop_below"),
        ({"margin": -0.1}, "margin"),
        ({"amounts": (1.0,)}, "amounts"),
    ],
)
def test_settings_that_make_no_sense_name_their_key(changes, key):
    config = base.get_config()
    config.advise.update(changes)
    with pytest.raises(UserError, match=f"^config.advise.{key}: "):
        read(Advise, config.advise, "advise")


def test_without_one_kind_of_text_there_is_nothing_to_compare(tmp_path):
    config = pretrained.get_config()
    del config.sources["generic"]
    with pytest.raises(UserError, match=r"^config\.sources: there is no generic text; add a source"):
        advise.run(config, tmp_path)


def pilots(config, workdir):
    return advise.Pilots(config, workdir, read(Advise, config.advise, "advise"))


@pytest.mark.parametrize(("dev", "words"), [(0, "there is no dev partition"), (3, "there are 3 dev utterances")])
def test_without_dev_utterances_pilots_cannot_be_compared(tmp_path, monkeypatch, dev, words):
    monkeypatch.setattr(advise, "transfer_set_of", lambda *_: None)
    opened = pilots(pretrained.get_config(), tmp_path)
    with pytest.raises(UserError, match=f"^config.nlu: {words}.*the partition .dev."):
        opened.check(Text(dev=dev))
    opened.check(Text(dev=4))


def test_generic_text_that_lacks_a_language_of_the_task_is_refused_before_the_teacher(tmp_path, monkeypatch):
    whole = finished_runs.small_config

    def in_one_language():
        config = whole()
        config.sources.generic.languages = ("en",)
        return config

    monkeypatch.setattr(finished_runs, "small_config", in_one_language)
    config, prepared = finished_runs.smoke_config(tmp_path / "prepared")
    with pytest.raises(UserError, match=r"^config\.transfer\.language_mix: 'task' needs generic text in 'de'"):
        pilots(config, tmp_path).check(prepared)


@pytest.mark.slow
def test_the_command_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(statistics, "MOST_SEEDS", 1)
    monkeypatch.setattr(statistics, "EXTRA_SEEDS", 1)
    config = small_study.get_config()
    config.finetune.max_train = 30
    config.advise.update({"budget_minutes": 600.0, "shares": (0.0, 1.0), "steps": (1.0,), "seeds": (1,)})
    advise.run(config, tmp_path)
    first = json.loads((tmp_path / "advice.json").read_text())
    assert all((tmp_path / name).is_file() for name in FILES)
    assert first["choice"]["set"] in ("generic", "task") and 0 < first["choice"]["best"] < 1
    assert "gain" in first["adapting"] and first["data"]["jsd"] > 0 and len(first["data"]["domains"]) > 2
    if first["choice"]["share"]:
        assert len(first["task_text"]["texts"]) == 3
    assert "Next: kd-jax study" in capsys.readouterr().out
    stages = {folder.name: (folder / "DONE").stat().st_mtime for folder in (tmp_path / "stages").iterdir()}
    advise.run(config, tmp_path)
    assert {folder.name: (folder / "DONE").stat().st_mtime for folder in (tmp_path / "stages").iterdir()} == stages
    assert json.loads((tmp_path / "advice.json").read_text()) == first
