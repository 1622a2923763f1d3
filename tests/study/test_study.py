"""The whole path at two steps a job: every stage, what it leaves behind, and what happens when it is started again."""

import json
import math
import pathlib
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kd_jax.config.execution import Mesh
from kd_jax.data.prepared import Prepared
from kd_jax.jobs import trained
from kd_jax.jobs.masked_lm import encoder_model
from kd_jax.main import evaluate, study
from kd_jax.study import run as study_run
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError
from tests.support import pretrained

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(workdir, config) of a finished smoke study with every kind of row."""
    workdir = tmp_path_factory.mktemp("study")
    config = pretrained.get_config("smoke")
    config.progress = False
    config.tensorboard = False
    config.distill.init = "teacher"  # so that there are rows that start there too
    config.finetune.max_train = 100
    config.study.update({"finetune_teacher": True, "teacher_epochs": 0, "label_unlabeled": True})
    study.run(config, workdir)
    return workdir, config


def test_report_and_results_are_written(finished):
    workdir, config = finished
    report = (workdir / "report.md").read_text(encoding="utf-8")
    assert config.study.name in report
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = {"student", "transfer_set", "teacher", "seed", "task", "scope", "locale", "domain", "test_set", "metric"}
    assert all(set(row) == wanted | {"value", "count"} for row in rows)
    compared = {(row["student"], row["transfer_set"], row["teacher"]) for row in rows}
    assert {("scratch", "", ""), ("mlm", "task", ""), ("distilled", "task", "adapted")} <= compared
    assert {("initialized", "", ""), ("mlm", "task", "initialized"), ("finetuned", "", "")} <= compared
    assert {("ngrams", "", ""), ("ngrams", "", "labeled"), ("probe", "", ""), ("scratch", "", "labeled")} <= compared
    assert {("teacher", "", "generic"), ("teacher", "", "adapted")} <= compared
    assert {row["test_set"] for row in rows if row["task"] == "icner"} == {"test", "test_unseen", "tail"}
    assert {row["test_set"] for row in rows if row["task"] == "mlm"} == {"heldout_task", "heldout_generic"}


def test_every_row_is_in_the_result_table(finished):
    workdir, _ = finished
    report = (workdir / "report.md").read_text(encoding="utf-8")
    table = report.split("| Student | DC error")[1].split("\n\n")[0].splitlines()[2:]
    cells = {name.strip("|* "): rest for name, *rest in (line.split(" | ") for line in table)}
    assert list(cells) == [
        "n-grams",
        "n-grams, labels by the teacher",
        "teacher, frozen, linear probe",
        "teacher, finetuned",
        "from scratch",
        "from scratch, labels by the teacher",
        "from the teacher, not distilled",
        "MLM only, task 100 %",
        "MLM only from the teacher, task 100 %",
        *("distilled, generic only", "distilled, task 50 %", "distilled, task 100 %"),
        "distilled, task 100 %, adapted teacher",
    ]
    for name, (dc, intent, *slots) in cells.items():
        assert dc[0].isdigit() and intent[0].isdigit(), name
        assert all(cell.startswith("–") for cell in slots) == (name == "teacher, frozen, linear probe"), name
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["seed"] for row in rows if row["student"] in ("ngrams", "probe")} == {None}
    assert "C = 10" in report and "Trials of each row and task" in report


def test_a_student_that_is_not_distilled_is_what_distillation_starts_from(finished):
    workdir, _ = finished
    (start,) = (workdir / "stages").glob("initialized-seed0-*")
    (teacher,) = (workdir / "stages").glob("pretrain-teacher-*")
    assert json.loads((start / "heldout.json").read_text()) == []
    config = trained.run_config(start, "x")
    prepared = Prepared(config.prepared)
    student, original = (
        encoder_model(trained.encoder_block(folder, "x"), prepared, "float32", "student") for folder in (start, teacher)
    )
    ours, theirs = (
        trained.trained_params(folder, model, make_mesh(Mesh()))
        for folder, model in ((start, student), (teacher, original))
    )
    ours, theirs = ours["encoder"], theirs["encoder"]
    assert np.array_equal(ours["embeddings"]["tokens"], theirs["embeddings"]["tokens"])
    for part in ("attention", "mlp"):  # of one shape here, so all layers are there, in their order
        jax.tree.map(np.testing.assert_array_equal, ours["layers"][part], theirs["layers"][part])


def test_the_teachers_labels_are_those_that_others_learn_from(finished):
    workdir, _ = finished
    (labels,) = (workdir / "stages").glob("label-dc-finetuned-seed0-*")
    records = [json.loads(line) for line in (labels / evaluate.RECORDS).read_text(encoding="utf-8").splitlines()]
    assert len(records) == 4 * (200 - 100) and {record["partition"] for record in records} == {"train"}
    (student,) = (workdir / "stages").glob("dc-scratch-labeled-seed0-*")
    run = json.loads((student / "run.json").read_text())
    assert (run["train_utterances"], run["predicted_labels"]) == (4 * 200, 4 * 100)
    (fitted,) = (workdir / "stages").glob("ngrams-labeled-dc-*")
    assert json.loads((fitted / "baseline.json").read_text())["dc"]["train_utterances"] == 4 * 200


def test_every_stage_says_how_it_was_run_and_that_it_is_whole(finished):
    workdir, _ = finished
    for folder in (workdir / "stages").iterdir():
        assert (folder / "DONE").is_file(), folder
        if not folder.name.startswith("prepare"):
            assert json.loads((folder / "config.json").read_text())["config"]
            assert json.loads((folder / "run.json").read_text())["packages"]["jax"]


def test_the_same_command_again_runs_no_stage(finished, capsys):
    workdir, config = finished
    before = {path: path.stat().st_mtime_ns for path in (workdir / "stages").rglob("*") if path.is_file()}
    capsys.readouterr()
    study.run(config, workdir)
    said = capsys.readouterr().out
    assert not re.findall(r"^\[\d+/\d+\]", said, re.MULTILINE)  # the line of a running stage
    assert re.findall(r"predict --model=(\S+) TEXT", said) == [str(workdir)]
    models = json.loads((workdir / "models.json").read_text())
    assert [pathlib.Path(one).name.split("-")[:2] for one in models] == [["dc", "distilled"], ["icner", "distilled"]]
    assert all((workdir / one / "DONE").is_file() for one in models)
    took = sum(json.loads(file.read_text()) for file in workdir.glob("stages/*/seconds.json"))
    (told,) = re.findall(r"all stages together (\d+) s", said)
    assert abs(float(told) - took) <= 0.51
    after = {path: path.stat().st_mtime_ns for path in (workdir / "stages").rglob("*") if path.is_file()}
    assert before == after


def test_checkpoints_of_students_hold_no_teacher(finished):
    workdir, _ = finished
    (folder,) = (workdir / "stages").glob("distilled-task-generic-seed0-*")
    config = trained.run_config(folder, "x")
    student = encoder_model(config.student, Prepared(config.prepared), "float32", "student").abstract()
    with ocp.CheckpointManager(
        folder / "checkpoints", item_handlers={"state": ocp.PyTreeCheckpointHandler()}
    ) as manager:
        saved = manager.item_metadata(manager.latest_step())["state"].tree
    assert saved.keys() == {"step", "params", "opt_state"}
    shapes = [[tuple(leaf.shape) for leaf in jax.tree.leaves(tree)] for tree in (saved["params"], student)]
    assert sorted(shapes[0]) == sorted(shapes[1])
    # Only Adam's two moments of each parameter, and counts: no entry is large enough to hide a teacher.
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(student))
    moments = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(saved["opt_state"]) if leaf.shape)
    assert moments == 2 * size


def test_teacher_files_are_as_the_teacher_run_left_them(finished):
    workdir, _ = finished
    (teacher,) = (workdir / "stages").glob("pretrain-teacher-*")
    done = (teacher / "DONE").stat().st_mtime_ns
    assert all(path.stat().st_mtime_ns <= done for path in (teacher / "checkpoints").rglob("*") if path.is_file())


def test_records_cover_every_test_utterance_once(finished):
    workdir, _ = finished
    (prepared,) = (workdir / "stages").glob("prepare-*")
    test = set()
    for file in (prepared / "utterances").glob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            if one["partition"] == "test":
                test.add((one["locale"], one["id"]))
    folders = list((workdir / "stages").glob("test-*"))
    folders += [
        file.parent for name in ("ngrams", "probe") for file in (workdir / "stages").glob(f"{name}-*/*/dev.json")
    ]
    assert len([folder for folder in folders if folder.name in ("dc", "icner")]) == 6
    for folder in folders:
        records = [json.loads(line) for line in (folder / evaluate.RECORDS).read_text(encoding="utf-8").splitlines()]
        assert len(records) == len(test)
        assert {(record["locale"], record["id"]) for record in records} == test


def test_a_teacher_no_better_than_a_unigram_stops_the_study(finished):
    workdir, config = finished
    strict = config.copy_and_resolve_references()
    strict.study.require_teacher_better_than_unigram = True
    with pytest.raises(UserError, match=r"no better than a unigram.*config\.pretrain\.steps"):
        study.run(strict, workdir)
    strict.distill.kl.weight = 0.0  # its states may be worth something all the same
    opened = study.open_study(strict, workdir)
    opened.check_teachers()
    assert not opened.notes


def test_stage_references_become_directories():
    values = {"prepared": "stage:prepare-123", "deeper": {"teacher": "stage:a-1,stage:b-2", "other": ("x", 1)}}
    assert study_run.resolve_stages(values, pathlib.Path("runs/x/stages")) == {
        "prepared": "runs/x/stages/prepare-123",
        "deeper": {"teacher": "runs/x/stages/a-1,runs/x/stages/b-2", "other": ("x", 1)},
    }
