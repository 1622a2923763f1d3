import json
import pathlib
import shlex

import pytest

from kd_jax.config import to_dict
from kd_jax.main import study
from kd_jax.study import job_plan
from kd_jax.study.plan import REPORT, Student
from kd_jax.study.run import Study
from kd_jax.types import UserError
from tests.support import pretrained

ARGUMENTS = ["python", "-m", "kd_jax.main.study", "--config=configs/quickstart.py", "--workdir=runs/a b"]


def make(workdir: pathlib.Path, change=lambda config: None) -> tuple[Study, list[str]]:
    """A study of two seeds and one task whose stages leave behind only what is read of them, and those it ran."""
    config = pretrained.get_config()
    config.study.update({"seeds": (0, 1), "tasks": ("dc",)})
    change(config)
    ran = []

    def run_stage(command, stage_config, folder):
        ran.append(folder.name)
        folder.mkdir(parents=True)
        if command.startswith("finetune_"):
            score = 1.0 - stage_config["finetune"]["learning_rate"]  # the smaller one is the better one
            (folder / "dev.json").write_text(json.dumps({"score": score}))
        loss = {"kind": "task", "loss": 1.0, "unigram_loss": 2.0, "count": 1}
        (folder / "heldout.json").write_text(json.dumps([loss]))
        (folder / "DONE").write_text("{}")

    return Study(to_dict(config), workdir, run_stage, study.KEYS), ran


def test_stages_stand_after_what_they_need_and_the_report_is_last(tmp_path):
    opened, _ = make(tmp_path)
    stages = opened.planned()
    seen = set()
    for one in stages:
        assert set(one.needs) <= seen, one.key
        assert one.key not in seen
        seen.add(one.key)
    assert stages[-1].key == REPORT
    assert all(stage.startswith(("test-", "ngrams-", "probe-", "latency-")) for stage in stages[-1].needs)


@pytest.mark.long
def test_running_every_key_in_order_is_the_whole_study(tmp_path):
    """As the arrays of one plan do it, each by a process that knows of the others only what is on disk."""
    opened, ran = make(tmp_path / "by_stage")
    for array in job_plan.plan(opened, ARGUMENTS)["arrays"]:
        anew, _ = make(tmp_path / "by_stage")
        for key in array["stages"]:
            anew.run_stage(key)
    whole, _ = make(tmp_path / "whole")
    whole.run()
    folders = [{place.name for place in (tmp_path / name / "stages").iterdir()} for name in ("by_stage", "whole")]
    assert folders[0] == folders[1]
    assert not ran


def test_a_finished_plan_has_nothing_but_the_report_left(tmp_path):
    opened, ran = make(tmp_path)
    opened.run()
    values = job_plan.plan(opened, ARGUMENTS)
    assert values["recipes_chosen"]
    assert [one["key"] for one in values["stages"] if not one["done"]] == [REPORT]
    assert [(one["stages"], one["needs"]) for one in values["arrays"]] == [([REPORT], [])]
    count = len(ran)
    opened.run_stage(values["stages"][3]["key"])  # done already
    assert len(ran) == count


def test_stages_after_the_search_choose_their_recipe_when_they_start(tmp_path):
    opened, ran = make(tmp_path)
    values = job_plan.plan(opened, ARGUMENTS)
    assert not values["recipes_chosen"]
    deferred = {one["key"]: one for one in values["stages"] if one["folder"] is None}
    assert "dc-scratch-seed1" in deferred and "test-dc-scratch-seed0" in deferred and "dc-scratch-seed0" not in deferred
    searched = [
        one["key"] for one in values["stages"] if one["phase"] == "recipes" and one["name"] == "dc-scratch-seed0"
    ]
    assert len(searched) == 2
    assert set(searched) <= set(deferred["dc-scratch-seed1"]["needs"])

    (prepare,) = (one["key"] for one in values["stages"] if one["name"] == "prepare")
    opened.run_stage(prepare)
    opened.run_stage(searched[0])
    with pytest.raises(UserError, match=f"it needs {searched[1]}, not finished"):
        opened.run_stage("dc-scratch-seed1")
    opened.run_stage(searched[1])
    opened.run_stage("dc-scratch-seed1")
    (best,) = (stage for stage in opened.planned() if stage.folder == searched[0])
    assert best.config["finetune"]["learning_rate"] == 1e-3
    chosen = opened.planner.finetune(Student("scratch"), 1, "dc", opened.planner.recipes[0])
    assert ran[-1] == chosen.folder
    # The plan made now knows the folder, and the old key still finds it.
    again = {one["key"] for one in job_plan.plan(opened, ARGUMENTS)["stages"]}
    assert chosen.folder in again and "dc-scratch-seed1" not in again
    opened.run_stage("test-dc-scratch-seed1")
    assert ran[-1].startswith("test-dc-scratch-seed1-")


def test_the_choice_is_that_of_the_whole_study(tmp_path):
    opened, _ = make(tmp_path)
    opened.run()
    anew, _ = make(tmp_path)
    anew.choose()
    assert anew.chosen == opened.chosen
    assert {recipe.learning_rate for recipe in anew.chosen.values()} == {1e-3}
    students = {one.name for one in opened.planner.students} - {"ngrams", "probe"}  # these choose C themselves
    assert set(anew.chosen) == {(name, "dc") for name in students}


def test_a_stage_whose_needs_are_missing_or_that_is_unknown_is_refused(tmp_path):
    opened, ran = make(tmp_path)
    keys = {one.name: one.key for one in opened.planned()}
    with pytest.raises(UserError, match=f"it needs {keys['prepare']}, not finished .no DONE under .*stages"):
        opened.run_stage(keys["pretrain-teacher"])
    with pytest.raises(UserError, match=r"has no stage pretrain-teacher-0123.*plan again"):
        opened.run_stage("pretrain-teacher-0123")
    with pytest.raises(UserError, match=r"it needs .* more, not finished"):
        opened.run_stage(REPORT)
    assert not ran


def test_a_teacher_with_nothing_to_teach_stops_the_stages_that_follow(tmp_path):
    opened, ran = make(tmp_path, lambda config: config.study.update({"require_teacher_better_than_unigram": True}))
    keys = {one.name: one.key for one in opened.planned()}
    for name in ("prepare", "pretrain-teacher"):
        opened.run_stage(keys[name])
    poor = [{"kind": "task", "loss": 2.0, "unigram_loss": 2.0, "count": 1}]
    (tmp_path / "stages" / keys["pretrain-teacher"] / "heldout.json").write_text(json.dumps(poor))
    with pytest.raises(UserError, match="no better than a unigram"):
        opened.run_stage(keys["cache-generic"])
    assert ran == [keys["prepare"], keys["pretrain-teacher"]]


def test_arrays_wait_for_what_their_stages_need_and_for_nothing_else(tmp_path):
    opened, _ = make(tmp_path)
    values = job_plan.plan(opened, ARGUMENTS)
    array_of = {key: one["name"] for one in values["arrays"] for key in one["stages"]}
    before: dict[str, set[str]] = {}
    for one in values["arrays"]:
        before[one["name"]] = set(one["needs"]).union(*(before[need] for need in one["needs"]))
    for stage in values["stages"]:
        needs = {array_of[need] for need in stage["needs"]}
        assert needs <= before[array_of[stage["key"]]], stage["key"]
    by_name = {one["name"]: one for one in values["arrays"]}
    baselines = by_name[array_of[next(key for key in array_of if key.startswith("mlm-task"))]]
    assert baselines["needs"] == [array_of[next(key for key in array_of if key.startswith("prepare"))]]
    students = by_name[array_of[next(key for key in array_of if key.startswith("distilled-task-generic"))]]
    assert len(students["stages"]) == 6  # three transfer sets, two seeds
    ngrams = array_of[next(key for key in array_of if key.startswith("ngrams"))]
    assert [one["name"] for one in values["arrays"] if not one["accelerator"]] == [
        "01-teachers-prepare",
        ngrams,
        values["arrays"][-1]["name"],
    ]
    assert by_name[ngrams]["needs"] == ["01-teachers-prepare"]


def test_an_array_too_long_for_a_scheduler_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(job_plan, "_MOST_IN_ARRAY", 4)
    opened, _ = make(tmp_path)
    values = job_plan.plan(opened, ARGUMENTS)
    assert max(len(one["stages"]) for one in values["arrays"]) == 4
    parts = [one["name"] for one in values["arrays"] if one["name"].endswith("-2")]
    assert parts
    for part in parts:
        assert all(part in one["needs"] for one in values["arrays"] if f"{part[:-1]}1" in one["needs"])


def test_without_a_search_every_folder_is_known_at_once(tmp_path):
    opened, _ = make(tmp_path, lambda config: config.study.update({"recipe_learning_rates": (1e-3,)}))
    values = job_plan.plan(opened, ARGUMENTS)
    assert values["recipes_chosen"]
    assert all(one["folder"] for one in values["stages"] if one["key"] != REPORT)
    assert not [one for one in values["stages"] if one["phase"] == "recipes"]


def test_the_plan_on_disk_is_json_and_a_table_for_launchers(tmp_path):
    opened, _ = make(tmp_path)
    values = job_plan.plan(opened, ARGUMENTS, lambda stage: {"flops": len(stage.name)})
    file = job_plan.write_plan(tmp_path, values)
    read = json.loads(file.read_text())
    assert read == values
    one = read["stages"][1]
    assert one["resources"] == {"accelerator": True, "flops": len(one["name"])}
    assert shlex.split(one["command_line"]) == [*ARGUMENTS, f"--stage={one['key']}"]
    rows = [line.split("\t") for line in (tmp_path / job_plan.TABLE).read_text().splitlines()]
    assert [row[0] for row in rows] == [array["name"] for array in values["arrays"]]
    assert rows[0][1:] == ["-", "cpu", values["arrays"][0]["stages"][0]]
    assert rows[-1][1].split(",") == values["arrays"][-1]["needs"]
    assert not list(tmp_path.glob(".*.tmp"))
