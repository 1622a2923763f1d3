"""Early stopping: which step is kept, with which parameters, and that interruptions change neither."""

import jax
import numpy as np
import pytest

from kd_jax.runtime.preemption import Preempted
from kd_jax.trainer.best import Best
from kd_jax.trainer.checkpoint import BEST, load_params
from tests.support.toy_training import ABSTRACT, batch_at, toy_job, train
from tests.trainer.test_loop import assert_identical, rows_without_time, stopping_after

# The score of each evaluation; an equal one is not better.
SCORES = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.9, 12: 0.2}
JOB = toy_job(evaluate_every=2, checkpoint_every=5)


def scored(params, step):
    return {"score": SCORES[step], "bias": float(np.asarray(params["layer"]["bias"]).sum())}


def run(workdir, patience=2, **changes):
    best = Best("score", patience)
    state = train(workdir, JOB, evaluate=scored, best=best, **changes)
    return state, best


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(folder, last state, best) of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, *run(folder)


def test_stops_after_patience_evaluations_and_keeps_the_best_parameters(straight, tmp_path):
    folder, state, best = straight
    assert int(state["step"]) == 8 and best.step == 4 and best.stops
    steps = toy_job(steps=12, evaluate_every=0)
    with stopping_after(4), pytest.raises(Preempted):
        train(tmp_path, steps)
    wanted = load_params(tmp_path, ABSTRACT)
    for found in (best.params, load_params(folder, ABSTRACT, best.step)):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, wanted)
    last = load_params(folder, ABSTRACT)
    assert not np.array_equal(last["layer"]["kernel"], wanted["layer"]["kernel"])
    assert [row["score"] for row in rows_without_time(folder) if "score" in row] == [0.1, 0.5, 0.4, 0.5]


def test_more_patience_finds_what_comes_later(tmp_path):
    state, best = run(tmp_path, patience=3)
    assert int(state["step"]) == 12 and best.step == 10 and not best.stops
    assert best.metrics["score"] == 0.9


def test_without_patience_the_last_evaluation_counts_and_nothing_is_kept(tmp_path):
    state, best = run(tmp_path, patience=0)
    assert int(state["step"]) == 12 and best.step == 12 and best.params is None and BEST not in state
    assert best.metrics["score"] == 0.2


def broken_at(step):
    def batches(at):
        if at == step:
            raise OSError("the text is gone")
        return batch_at(at)

    return batches


# Killed between two checkpoints; preempted when an evaluation is due that is the best, is not, or ends the run; and
# killed between the last checkpoint and the end of the command.
@pytest.mark.parametrize("interruption", ["killed", 4, 6, 8, "ended"])
def test_an_interrupted_run_ends_with_the_same_parameters(straight, tmp_path, interruption):
    folder, state, best = straight
    if interruption == "killed":
        with pytest.raises(OSError, match="the text is gone"):
            run(tmp_path, batches=broken_at(7))
    elif interruption == "ended":
        run(tmp_path)
    else:
        with stopping_after(interruption), pytest.raises(Preempted, match=f"step {interruption} of 12 is saved"):
            run(tmp_path)
    again, other = run(tmp_path, batches=broken_at(8))  # step 9 is never reached
    assert_identical(state, again)
    assert other.saved() == best.saved()
    assert rows_without_time(tmp_path) == rows_without_time(folder)
    read = load_params(tmp_path, ABSTRACT, other.step)
    for found in (other.params, read):
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, best.params)


def test_the_best_is_read_where_it_was_found_after_the_last_checkpoint(tmp_path):
    """Preempted at the last step, whose evaluation runs at the next start and is best: no checkpoint contains it."""
    scores = {**SCORES, 12: 1.0}

    def evaluate(params, step):
        return {"score": scores[step]}

    best = Best("score", 3)
    with stopping_after(12), pytest.raises(Preempted):
        train(tmp_path, JOB, evaluate=evaluate, best=Best("score", 3))
    state = train(tmp_path, JOB, evaluate=evaluate, best=best)
    assert best.step == 12
    found = load_params(tmp_path, ABSTRACT, best.step)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, state["params"])


def test_a_score_that_is_missing_or_no_number_is_the_lowest():
    best = Best("score", 2)
    params = {"a": np.zeros(1)}
    for step, (score, counts) in enumerate([(None, True), (float("nan"), False), (0.0, True), (None, False)]):
        best.add(step, {"score": score}, params)
        assert (best.step == step) is counts
