import sys
import types

import pytest

from kd_jax.config.execution import Wandb
from kd_jax.trainer import weights_and_biases as module
from kd_jax.trainer.metrics import MetricsWriter
from kd_jax.trainer.weights_and_biases import Tracker, tracker
from kd_jax.types import UserError


def settings(**changes):
    return Wandb(**({"project": "students"} | changes))


class FakeRun:
    def __init__(self, arguments):
        self.arguments, self.rows, self.metrics, self.finished = arguments, [], [], False

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, row):
        assert not self.finished
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """A package `wandb` that keeps what it is told; gives its runs."""
    found = []

    def init(**arguments):
        found.append(FakeRun(arguments))
        return found[-1]

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return found


def test_rows_go_to_one_run_that_a_restart_goes_on_with(runs, tmp_path):
    folder = tmp_path / "distill"
    for step in (0, 5):
        writer = MetricsWriter(folder, False, Tracker(settings(group="study"), folder, {"seed": 1}))
        writer.start(step)
        writer.write(step + 5, {"loss": 0.5, "kl": None})
        writer.close()
    first, second = runs
    assert first.arguments["id"] == second.arguments["id"] and len(first.arguments["id"]) == 32
    wanted = {"project": "students", "entity": None, "group": "study", "mode": "online", "resume": "allow"}
    wanted |= {"name": "distill", "dir": str(folder), "config": {"seed": 1}}
    assert {name: first.arguments[name] for name in wanted} == wanted
    assert [one.rows for one in runs] == [[{"step": 5, "loss": 0.5}], [{"step": 10, "loss": 0.5}]]
    assert ("*", "step") in first.metrics  # the axis, so that repeated steps are taken
    assert first.finished and second.finished


def test_two_runs_have_two_ids(runs, tmp_path):
    for name in ("one", "other"):
        Tracker(settings(), tmp_path / name, {}).start()
    assert runs[0].arguments["id"] != runs[1].arguments["id"]


def test_without_a_project_the_package_is_not_even_looked_for(monkeypatch, tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr(module.importlib, "import_module", refuse)
    assert tracker(settings(project=""), tmp_path, {}) is None


def test_a_missing_package_is_one_sentence_before_anything_is_written(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config\.wandb\.project: it is set, and the package wandb is not installed; "):
        tracker(settings(), tmp_path / "run", {})
    assert not list(tmp_path.iterdir())


def test_a_folder_of_that_name_is_no_package(monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="not installed"):
        tracker(settings(), tmp_path, {})
    sys.modules.pop("wandb", None)


def test_only_process_0_has_one(runs, monkeypatch, tmp_path):
    assert isinstance(tracker(settings(), tmp_path, {}), Tracker)
    monkeypatch.setattr("kd_jax.trainer.weights_and_biases.jax.process_index", lambda: 1)
    assert tracker(settings(), tmp_path, {}) is None
