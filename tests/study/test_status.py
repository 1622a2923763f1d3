import json
import os
import pathlib
import subprocess
import sys

import pytest

from kd_jax.config import from_dict, to_dict
from kd_jax.main import study
from kd_jax.study import attempts, status
from kd_jax.study.plan import REPORT
from kd_jax.study.run import Study
from tests.support import pretrained

NOW = 1_000_000.0


def open_toy(config, workdir) -> Study:
    return Study(to_dict(config), workdir, lambda *_: None, study.KEYS)


@pytest.fixture
def opened(tmp_path) -> Study:
    config = pretrained.get_config()
    config.study.update({"seeds": (0, 1), "tasks": ("dc",), "name": "Toy"})
    return open_toy(config, tmp_path)


def stages_by_name(opened):
    return {stage.name: stage for stage in opened.planned() if stage.command != REPORT}


def finish(opened, name, seconds):
    """Leaves behind what a finished stage does."""
    folder = opened.folder(stages_by_name(opened)[name])
    folder.mkdir(parents=True)
    (folder / "DONE").write_text("{}")
    (folder / "seconds.json").write_text(str(seconds))
    note(opened, name, attempts.FINISHED, started=NOW - 500, ended=NOW - 500 + seconds)


def note(opened, name, outcome, started, ended=0.0, message=""):
    stage = stages_by_name(opened)[name]
    path = attempts.path_of(opened.workdir, stage.folder)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(attempts.Attempt(outcome, "elsewhere", 7, started, ended, message).describe()))


def metrics(opened, name, rows, wrote, run=None):
    folder = opened.folder(stages_by_name(opened)[name])
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "metrics.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 99')  # the last row is being written
    os.utime(file, (wrote, wrote))
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))
        os.utime(folder / "run.json", (wrote - 5, wrote - 5))


def line(opened) -> str:
    return status.line(status.status_of(opened, NOW))


def test_before_the_start_everything_is_left(opened):
    total = len(opened.planned()) - 1
    said = line(opened)
    assert said.startswith(f"Toy: 0 done, {total} left [teachers 0/3 predictions 0/2 students 0/10 recipes 0/12 ")
    assert "time left unknown" in said
    assert not opened.workdir.joinpath("attempts").exists()


def test_a_running_stage_shows_its_step_loss_and_when_it_wrote(opened):
    finish(opened, "prepare", 20)
    note(opened, "pretrain-teacher", attempts.RUNNING, started=NOW - 300)
    rows = [
        {"step": 20, "loss": 5.0, "time/seconds_per_step": 2.0},
        {"step": 40, "loss": 4.25, "time/seconds_per_step": 1.0},
        {"step": 40, "heldout_task/loss": 4.5},
    ]
    metrics(opened, "pretrain-teacher", rows, wrote=NOW - 12)
    said = line(opened)
    assert "1 done, 1 running" in said and "[teachers 1/3 " in said
    assert "pretrain-teacher: step 40/250, loss 4.2500, wrote 12 s ago on elsewhere" in said
    assert "started 8 min ago, 5 min of work done" in said  # 500 s; 20 s and 300 s
    found = status.status_of(opened, NOW)
    assert found.left == (250 - 40) * 1.0
    assert found.unknown == sum(sum(states.values()) for states in found.counts.values()) - 2
    assert f"about 4 min of work left, and {found.unknown} stages of kinds not yet timed" in said


def test_time_left_is_that_of_finished_stages_of_the_same_kind(opened):
    for name, seconds in (("prepare", 20), ("pretrain-teacher", 100), ("adapt-teacher", 30)):
        finish(opened, name, seconds)
    assert status.status_of(opened, NOW).left is None  # a teacher's pretraining tells nothing of a student's
    finish(opened, "mlm-task-seed0", 40)
    found = status.status_of(opened, NOW)
    assert found.left == 40  # mlm-task-seed1: a student's pretraining, unlike the teachers'
    finish(opened, "distilled-task-generic-seed0", 60)
    finish(opened, "distilled-generic-generic-seed0", 80)
    more = status.status_of(opened, NOW)
    assert more.left == 40 + 6 * 60  # of eight distillations six are left; the slower one also compiled
    note(opened, "distilled-mix50-generic-seed0", attempts.RUNNING, started=NOW - 25)
    assert status.status_of(opened, NOW).left == 40 + 5 * 60 + (60 - 25)


def test_several_at_once_share_what_is_left(opened):
    finish(opened, "prepare", 20)
    finish(opened, "distilled-task-generic-seed0", 600)
    for name in ("distilled-mix50-generic-seed0", "distilled-generic-generic-seed0"):
        note(opened, name, attempts.RUNNING, started=NOW)
    said = line(opened)
    assert "(and 1 more)" in said
    assert "about 1 h 10 min of work left" in said and "35 min with 2 at once" in said


def test_steps_of_finetuning_follow_from_its_epochs(opened):
    name = next(one.name for one in opened.planned() if one.phase == "recipes")
    note(opened, name, attempts.RUNNING, started=NOW - 10)
    assert f"{name}, wrote 10 s ago" in line(opened)  # nothing of it is there yet
    metrics(opened, name, [{"step": 20, "loss": 1.0}], NOW - 1, run={"train_utterances": 1600})
    assert f"{name}: step 20/200, loss 1.0000, wrote 1 s ago" in line(opened)


def test_a_failed_and_a_stopped_stage_are_told(opened):
    note(opened, "prepare", attempts.FAILED, NOW - 9, NOW - 3, "UserError: config.nlu.path: there is\nno folder x")
    note(opened, "pretrain-teacher", attempts.STOPPED, NOW - 9, NOW - 3, "Preempted: step 3 of 9 is saved")
    said = line(opened)
    assert "1 failed, 1 stopped" in said
    assert "prepare failed: UserError: config.nlu.path: there is no folder x" in said
    assert "\n" not in said


def test_a_finished_study_has_no_time_left(opened):
    config = from_dict(dict(opened.values))
    config.study.recipe_learning_rates = (1e-3,)
    one = open_toy(config, opened.workdir)
    for stage in stages_by_name(one).values():
        one.folder(stage).mkdir(parents=True)
        (one.folder(stage) / "DONE").write_text("{}")
    found = status.status_of(one, NOW)
    assert found.finished
    assert "left" not in status.line(found).replace("0 left", "")


def test_stages_of_another_config_are_noticed(opened):
    finish(opened, "prepare", 20)
    config = from_dict(dict(opened.values))
    config.rows.length = 32
    other = open_toy(config, opened.workdir)
    assert "1 stages of another config are here" in line(other)


def test_a_long_metrics_file_is_read_from_its_end(opened):
    note(opened, "prepare", attempts.FINISHED, NOW - 9, NOW - 8)
    note(opened, "pretrain-teacher", attempts.RUNNING, started=NOW - 300)
    rows = [{"step": step, "loss": float(step), "note": "x" * 1000} for step in range(200)]
    metrics(opened, "pretrain-teacher", rows, wrote=NOW)
    assert "step 199/250, loss 199.0000" in line(opened)


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "0 s"), (99, "99 s"), (119, "2 min"), (3700, "1 h 2 min"), (60 * 86400, "60.0 days"), (-3, "0 s")],
)
def test_durations_are_written_for_people(seconds, said):
    assert status.duration(seconds) == said


PROGRAM = """
import pathlib, sys
from jax._src import xla_bridge
from tests.support import pretrained
from kd_jax.main import study
_, workdir = sys.argv
place = pathlib.Path(workdir)
for name in ("plan", "status", "dry-run"):
    study.INSTEAD[name][0](pretrained.get_config("smoke"), place)
    print(name, xla_bridge.backends_are_initialized())
"""


def test_no_device_is_touched(tmp_path):
    """A study's state is asked for while others train on the accelerators of the machine."""
    root = pathlib.Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [line for line in ran.stdout.splitlines() if line.endswith(("True", "False"))] == [
        "plan False",
        "status False",
        "dry-run False",
    ]
