import importlib.metadata
import importlib.util
import json
import shlex
import sys

import jax
import pytest

from kd_jax.config.execution import Execution
from kd_jax.jobs import trained
from kd_jax.runtime.files import read_json
from kd_jax.trainer.run_directory import RunDirectory, is_done, mark_done, provenance, run_once
from kd_jax.types import UserError

CONFIG = {"seed": 0, "distill": {"temperature": 2.0, "log_every": 20}, "mesh": {"data": -1}, "sets": ("a", "b")}


def read(path):
    return read_json(path)


def test_a_command_is_told_as_it_can_be_given_again(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", importlib.util.find_spec("kd_jax.main.study"))
    monkeypatch.setattr(sys, "argv", ["/somewhere/kd_jax/main/study.py", "--config=configs/a b.py"])
    assert provenance()["command_line"] == "python -m kd_jax.main.study '--config=configs/a b.py'"


def test_writes_who_ran_what_with_what(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # a script, whoever runs the tests
    run = RunDirectory(tmp_path / "deep" / "run", "distill", CONFIG)
    run.start(data_fingerprint="abc")
    assert read(run.path / "config.json") == {"command": "distill", "config": json.loads(json.dumps(CONFIG))}
    record = read(run.path / "run.json")
    assert record["data_fingerprint"] == "abc"
    assert record["packages"]["orbax-checkpoint"] == importlib.metadata.version("orbax-checkpoint")
    assert record["device_count"] == len(jax.devices()) == 8
    assert record["device_kind"] == jax.devices()[0].device_kind
    assert record["command_line"] == shlex.join(sys.argv)
    run.start(data_fingerprint="abc")
    assert len(read(run.path / "run.json")["starts"]) == 2
    assert not [entry for entry in run.path.iterdir() if entry.name.endswith(".tmp")]


def test_a_command_runs_until_its_work_is_done_and_then_never_again(tmp_path):
    runs = []

    def once(notes):
        def work(directory):
            directory.start()
            runs.append(directory.path)
            return notes

        run_once(tmp_path, "pretrain", CONFIG, Execution(), work)

    once(None)  # more is left to do
    assert not is_done(tmp_path)
    once({"score": 0.5})
    assert RunDirectory(tmp_path, "pretrain", CONFIG).done
    assert read(tmp_path / "DONE")["score"] == 0.5
    once({"score": 0.7})
    assert len(runs) == 2 and read(tmp_path / "DONE")["score"] == 0.5


def test_another_config_or_command_is_refused_with_the_differences(tmp_path):
    RunDirectory(tmp_path, "distill", CONFIG)
    with pytest.raises(UserError, match=r"differs .*\n  config\.distill\.temperature: 2\.0 -> 4\.0$"):
        RunDirectory(tmp_path, "distill", {**CONFIG, "distill": {"temperature": 4.0, "log_every": 20}})
    with pytest.raises(UserError, match="command: 'distill' -> 'pretrain'"):
        RunDirectory(tmp_path, "pretrain", CONFIG)
    assert read(tmp_path / "config.json")["config"]["distill"]["temperature"] == 2.0


def test_execution_keys_may_change_and_the_newest_are_kept(tmp_path):
    RunDirectory(tmp_path, "distill", CONFIG)
    changed = {**CONFIG, "mesh": {"data": 4}, "distill": {"temperature": 2.0, "log_every": 5}}
    RunDirectory(tmp_path, "distill", changed)
    assert read(tmp_path / "config.json")["config"]["mesh"] == {"data": 4}


def test_a_finished_directory_keeps_the_config_it_was_made_with(tmp_path):
    mark_done(RunDirectory(tmp_path, "distill", CONFIG).path)
    RunDirectory(tmp_path, "distill", {**CONFIG, "mesh": {"data": 4}})
    assert read(tmp_path / "config.json")["config"]["mesh"] == {"data": -1}


def test_any_folder_can_be_marked_done(tmp_path):
    assert not is_done(tmp_path)
    mark_done(tmp_path)
    assert is_done(tmp_path)


def test_provenance_outside_a_clone_has_no_commit(monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert provenance()["commit"] is None


def test_a_directory_that_only_process_0_sees_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with pytest.raises(UserError, match=r"process 1 does not see .* on storage that all hosts share"):
        RunDirectory(tmp_path, "distill", CONFIG)


@pytest.mark.parametrize("name", ["heldout.json", "icner/results.jsonl"])
def test_results_are_as_they_were_when_the_run_finished(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text('[{"loss": 2.5}]\n')
    assert trained.whole(file) == file  # not finished yet
    mark_done(tmp_path, note=1)
    assert trained.whole(file) == file
    file.write_text('[{"loss": 1.5}]\n')
    with pytest.raises(UserError, match=rf"{name}: is missing, or was changed or damaged since"):
        trained.whole(file)
    file.unlink()
    with pytest.raises(UserError, match=rf"{name}: is missing"):
        trained.whole(file)
    (tmp_path / "DONE").write_text("{}")  # as an older version wrote it
    assert trained.whole(file) == file
