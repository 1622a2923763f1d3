import contextlib
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from kd_jax.config.execution import Mesh
from kd_jax.runtime import preemption
from kd_jax.runtime.files import read_json_lines
from kd_jax.runtime.preemption import Preempted, Preemption, interruptible
from kd_jax.runtime.watchdog import Watchdog
from kd_jax.trainer.goodput import Goodput
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.metrics import TIME
from kd_jax.trainer.optimizer import make_optimizer
from kd_jax.trainer.state import to_plain
from kd_jax.types import UserError
from tests.support.toy_training import OUTPUTS, batch_at, make_step, toy_job, train


def rows_without_time(workdir):
    rows = read_json_lines(workdir / "metrics.jsonl", growing=True)
    return [{name: value for name, value in row.items() if not name.startswith(TIME)} for row in rows]


def assert_identical(first, second):
    """Bit for bit: every leaf of two states."""
    old, new = jax.tree_util.tree_leaves_with_path(to_plain(first)), jax.tree.leaves(to_plain(second))
    assert len(old) == len(new) > 6
    for (path, left), right in zip(old, new):
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right), err_msg=jax.tree_util.keystr(path))


@contextlib.contextmanager
def stopping_after(step):
    """A run from the start is asked to stop at its poll after this step."""
    polls = itertools.count()  # the first comes before the first step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption, "reached", lambda: next(polls) == step)
        yield


def test_trains_the_toy_and_logs_sums_divided_once(tmp_path):
    state = train(tmp_path, toy_job(steps=12, log_every=4))
    assert int(state["step"]) == 12
    rows = rows_without_time(tmp_path)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[-1]["loss"] < rows[0]["loss"]
    segments = np.concatenate([batch_at(step)["segment_ids"] for step in range(4)])
    assert rows[0]["useful_share"] == np.count_nonzero(segments) / segments.size
    timed = read_json_lines(tmp_path / "metrics.jsonl", growing=True)[0]
    assert timed["time/padded_tokens_per_second"] > timed["time/tokens_per_second"] > 0


def test_the_first_loss_row_is_the_weighted_mean_of_its_window(tmp_path):
    """With a tiny learning rate the parameters stay, so the row follows from the batches in float64."""
    state = train(tmp_path, toy_job(steps=4, log_every=4, learning_rate=1e-12, weight_decay=0.0))
    kernel = np.asarray(state["params"]["layer"]["kernel"], np.float64)
    total = weight = 0.0
    for step in range(4):
        batch = batch_at(step)
        errors = ((batch["inputs"] @ kernel - batch["targets"]) ** 2).sum(-1)
        total += (errors * batch["weights"]).sum()
        weight += batch["weights"].sum()
    assert rows_without_time(tmp_path)[0]["loss"] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2), (1, 1, 1)])
def test_the_mesh_does_not_change_the_losses(tmp_path, shape):
    train(tmp_path / "eight", toy_job(steps=6, log_every=1))
    data, fsdp, tensor = shape
    mesh = make_mesh(Mesh(data, fsdp, tensor), devices=jax.devices()[: data * fsdp * tensor])
    state = train(tmp_path / "other", toy_job(steps=6, log_every=1), mesh=mesh)
    assert state["params"]["layer"]["kernel"].sharding.shard_shape((8, 4)) == (8 // fsdp, OUTPUTS // tensor)
    assert state["opt_state"]["adam"].mu["layer"]["kernel"].sharding.shard_shape((8, 4)) == (
        8 // fsdp,
        OUTPUTS // tensor,
    )
    first, second = rows_without_time(tmp_path / "eight"), rows_without_time(tmp_path / "other")
    assert len(first) == 6
    for left, right in zip(first, second):
        assert left == pytest.approx(right, rel=1e-5)


def test_resume_is_exact_even_between_two_logged_steps(tmp_path):
    """5 steps, stop, resume: the checkpoint lies inside the window of steps 5 to 8."""
    straight = train(tmp_path / "straight")

    def broken(step):
        if step == 7:
            raise OSError("the text is gone")
        return batch_at(step)

    with pytest.raises(OSError, match="the text is gone"):
        train(tmp_path / "broken", batches=broken)
    resumed = train(tmp_path / "broken")
    assert_identical(straight, resumed)
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "broken")


def test_a_killed_process_resumes_exactly(tmp_path):
    """kill -9 at step 11, then the same command again; the reference never stops."""
    program = pathlib.Path(__file__).parents[1] / "support" / "toy_training.py"
    environment = os.environ | {"PYTHONPATH": str(program.parents[2])}

    def run(folder, kill_at):
        command = [sys.executable, str(program), str(tmp_path / folder), str(kill_at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    killed = run("killed", 11)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {row["step"] for row in rows_without_time(tmp_path / "killed")} <= {4, 8}
    again = train(tmp_path / "killed")
    assert_identical(train(tmp_path / "straight"), again)
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "killed")


def test_a_finished_run_takes_no_further_step(tmp_path):
    first = train(tmp_path)

    def never(step):
        raise AssertionError(f"step {step} was run again")

    assert_identical(first, train(tmp_path, batches=never))


def test_a_preempted_run_saves_and_goes_on_with_the_evaluation_that_was_due(tmp_path):
    def evaluate(params, step):
        return {"dev/bias": float(np.asarray(params["layer"]["bias"]).sum()), "dev/none": None}

    job = toy_job(evaluate_every=3)
    straight = train(tmp_path / "straight", job, evaluate=evaluate)
    with stopping_after(3), pytest.raises(Preempted, match="step 3 of 12 is saved"):
        train(tmp_path / "stopped", job, evaluate=evaluate)
    assert read_json_lines(tmp_path / "stopped" / "metrics.jsonl", growing=True) == []
    assert_identical(straight, train(tmp_path / "stopped", job, evaluate=evaluate))
    rows = rows_without_time(tmp_path / "straight")
    assert rows == rows_without_time(tmp_path / "stopped")
    assert [row["step"] for row in rows if "dev/bias" in row] == [3, 6, 9, 12]
    assert rows[0]["dev/none"] is None


def test_an_evaluation_made_up_for_is_not_counted_twice(tmp_path):
    """Preempted where an evaluation is due, evaluated on resume, killed before the next checkpoint, and resumed."""
    job = toy_job(evaluate_every=3, checkpoint_every=6)

    def broken(step):
        if step == 4:
            raise OSError("the text is gone")
        return batch_at(step)

    def evaluate(params, step):
        return {"dev/step": step}

    with stopping_after(3), pytest.raises(Preempted):
        train(tmp_path, job, evaluate=evaluate)
    with pytest.raises(OSError, match="the text is gone"):
        train(tmp_path, job, batches=broken, evaluate=evaluate)
    train(tmp_path, job, evaluate=evaluate)
    assert [row["dev/step"] for row in rows_without_time(tmp_path) if "dev/step" in row] == [3, 6, 9, 12]


def test_sigterm_is_a_preemption(tmp_path):
    def batches(step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_at(step)

    with Preemption(), pytest.raises(Preempted, match="of 12 is saved"):
        train(tmp_path, batches=batches)
    assert list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_loss_that_is_not_finite_names_the_step_and_is_not_saved(tmp_path):
    def batches(step):
        batch = batch_at(step)
        return batch | {"targets": np.full_like(batch["targets"], np.nan)} if step == 6 else batch

    with pytest.raises(UserError, match=r"^step 7: grad_norm, loss is not a finite number"):
        train(tmp_path, toy_job(checkpoint_every=7), batches=batches)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))


def test_a_resume_with_another_identity_is_refused(tmp_path):
    train(tmp_path, toy_job(steps=5), identity={"config": {"distill": {"temperature": 2.0}}, "data": "abc"})
    with pytest.raises(UserError, match=r"config\.distill\.temperature: 2\.0 -> 3\.0\n  data: 'abc' -> 'def'"):
        train(tmp_path, toy_job(steps=5), identity={"config": {"distill": {"temperature": 3.0}}, "data": "def"})


def test_logging_and_checkpoint_intervals_may_change_on_resume(tmp_path):
    with stopping_after(1), pytest.raises(Preempted, match="step 1 of 12 is saved"):
        train(tmp_path / "changed")
    changed = train(tmp_path / "changed", toy_job(log_every=3, checkpoint_every=7))
    assert_identical(train(tmp_path / "straight"), changed)
    assert [row["step"] for row in rows_without_time(tmp_path / "changed")] == [3, 6, 9, 12]


def test_progress_prints_the_lines_and_writes_json_rows(tmp_path, capsys):
    train(tmp_path, toy_job(steps=2, warmup_steps=1), lines=["kernel 8 x 4"], progress=True, tensorboard=True)
    assert "kernel 8 x 4" in capsys.readouterr().err
    assert list((tmp_path / "tensorboard").glob("events.*"))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["step"] == 2


def test_phases_follow_one_another_and_only_the_running_one_is_loaded(tmp_path):
    """Two phases with other frozen values: the switch comes at its step, and a resume in the second skips the first."""
    job = toy_job(steps=8, checkpoint_every=6, log_every=1)
    loaded = []

    def phases():
        optimizer = make_optimizer(job)
        step = jax.jit(make_step(optimizer))

        def frozen(number, scale):
            def load():
                loaded.append(number)
                return {"scale": np.float32(scale)}

            return load

        return ((0, step, frozen(0, 1.0)), (4, step, frozen(1, 0.0)))

    with stopping_after(6), pytest.raises(Preempted):
        train(tmp_path, job, phases=phases())
    assert loaded == [0, 1]
    loaded.clear()
    train(tmp_path, job, phases=phases())
    assert loaded == [1]
    norms = [
        row["grad_norm"] for row in read_json_lines(tmp_path / "metrics.jsonl", growing=True) if "grad_norm" in row
    ]
    assert [norm > 0 for norm in norms] == [True] * 4 + [False] * 4


def test_a_preemption_during_an_evaluation_ends_it_and_it_is_made_up_for(tmp_path):
    batches_done = []

    def evaluate(params, step):
        for number in interruptible(range(4), "the evaluation"):
            batches_done.append((step, number))
            if len(batches_done) == 7:  # in the second evaluation
                os.kill(os.getpid(), signal.SIGTERM)
        return {"dev/step": step}

    job = toy_job(evaluate_every=3)
    with Preemption(), pytest.raises(Preempted, match="step 6 of 12 is saved"):
        train(tmp_path / "stopped", job, evaluate=evaluate)
    assert batches_done[-1] == (6, 2)
    assert_identical(
        train(tmp_path / "straight", job, evaluate=evaluate), train(tmp_path / "stopped", job, evaluate=evaluate)
    )
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "stopped")
    assert batches_done[7:11] != [] and (6, 3) in batches_done


def test_a_preemption_before_the_first_step_ends_without_one(tmp_path):
    with stopping_after(0), pytest.raises(Preempted, match="nothing was to be saved yet"):
        train(tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert int(train(tmp_path)["step"]) == 12


def spoiled(*steps):
    def batches(step):
        batch = batch_at(step)
        return batch | {"targets": np.full_like(batch["targets"], np.nan)} if step in steps else batch

    return batches


def test_steps_that_are_not_finite_are_skipped_counted_and_left_out_of_the_means(tmp_path, capsys):
    """Rows of 4 steps; steps 6, 9 to 12 are spoiled (counted from 1), so that the last row has nothing to count."""
    job, goodput = toy_job(skip_non_finite=5), Goodput()
    state = train(tmp_path, job, batches=spoiled(5, 8, 9, 10, 11), goodput=goodput)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state["params"]))
    assert int(state["opt_state"]["adam"].count) == 7
    rows = rows_without_time(tmp_path)
    assert [row["skipped_steps"] for row in rows] == [0, 1, 5]
    assert rows[1]["loss"] > 0 and rows[2]["loss"] is None and rows[2]["useful_share"] > 0
    assert goodput.summary()["skipped_steps"] == [6, 9, 10, 11, 12]
    assert "step 6: grad_norm, loss is not a finite number; its update is left out, 1 of 5" in capsys.readouterr().err


def test_skipped_steps_are_exact_under_resume(tmp_path):
    """Stopped between two spoiled steps, and killed after a third that is done again."""
    job, bad = toy_job(skip_non_finite=3), (2, 6, 8)

    def broken(step):
        if step == 10:
            raise OSError("the text is gone")
        return spoiled(*bad)(step)

    straight = train(tmp_path / "straight", job, batches=spoiled(*bad))
    with pytest.raises(OSError, match="the text is gone"):
        train(tmp_path / "broken", toy_job(skip_non_finite=3, checkpoint_every=8), batches=broken)
    goodput = Goodput()
    assert_identical(straight, train(tmp_path / "broken", job, batches=spoiled(*bad), goodput=goodput))
    assert rows_without_time(tmp_path / "straight") == rows_without_time(tmp_path / "broken")
    assert goodput.skipped == [3, 7, 9]


def test_one_step_more_than_allowed_ends_the_run(tmp_path):
    wanted = r"^step 9: grad_norm, loss is not a finite number, after 2 steps that were skipped \(skip_non_finite\), so"
    with pytest.raises(UserError, match=wanted):
        train(tmp_path, toy_job(skip_non_finite=2), batches=spoiled(1, 3, 8))


def test_the_account_goes_on_over_restarts_and_counts_what_was_lost(tmp_path):
    def broken(step):
        if step == 8:
            raise OSError("the text is gone")
        return batch_at(step)

    def evaluate(params, step):
        time.sleep(0.05)
        return {"dev/step": step}

    job = toy_job(log_every=1, evaluate_every=4)
    with pytest.raises(OSError, match="the text is gone"):
        train(tmp_path, job, batches=broken, goodput=Goodput(tmp_path), evaluate=evaluate)
    goodput = Goodput(tmp_path)
    train(tmp_path, job, goodput=goodput, evaluate=evaluate)
    found = goodput.summary()
    assert (found["starts"], found["lost_steps"]) == (2, 3)  # saved at 5; the rows went to 8
    assert found["evaluation_seconds"] >= 3 * 0.05  # at 4 (saved with step 5), 8 (again) and 12
    assert found["compile_seconds"] > 0 and found["checkpoint_seconds"] > 0
    assert 0 < found["goodput"] < 1
    kinds = ("steps", "data_wait", "compile", "evaluation", "checkpoint", "other")
    assert sum(found[f"{kind}_seconds"] for kind in kinds) == pytest.approx(found["wall_seconds"])
    rows = [row for row in read_json_lines(tmp_path / "metrics.jsonl", growing=True) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert all(0 < row["time/goodput"] < 1 for row in rows[1:])
    spent = [row["time/steps_seconds"] for row in rows]
    assert spent == sorted(spent)


def test_the_watchdog_sees_which_step_is_stalled(tmp_path):
    file = tmp_path / "stalled-0.txt"

    def slow(step):
        end = time.monotonic() + 30
        while step == 6 and time.monotonic() < end and not (file.exists() and "in slow" in file.read_text()):
            time.sleep(0.02)
        return batch_at(step)

    with Watchdog(0.5, tmp_path):
        train(tmp_path, batches=slow)
    assert "process 0 of 1: step 7 has taken" in file.read_text()
