import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd_jax.config.training import KL, Term, Training
from kd_jax.models.encoder_config import PRESETS, EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import DistillSettings, make_distill_objective
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.steps.train_step import make_train_step, split_micro_batches
from kd_jax.trainer.optimizer import after_skipped, make_optimizer, make_schedule

VOCABULARY, ROWS, LENGTH, SLOTS = 61, 8, 12, 4
SETTINGS = DistillSettings(kl=KL(1.0, 0.5))
EVERYWHERE = dataclasses.replace(SETTINGS, kd_positions="all")


def tiny(**changes) -> Functional:
    values = {**PRESETS["tiny"], "vocab_size": VOCABULARY, **changes}
    return Functional("mlm", EncoderConfig(**values))


def distillation(student, teacher, settings=SETTINGS):
    return make_distill_objective(WithProjections(student, ()), (teacher,), settings)


def uneven_batch(seed=0):
    """Rows with one or two segments, padding, and 0 to SLOTS used mask slots."""
    random = np.random.default_rng(seed)
    tokens = random.integers(5, VOCABULARY, (ROWS, LENGTH)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1))
    for row in range(0, ROWS, 2):
        segments[row, 7:] = 2
        positions[row, 7:] = np.arange(LENGTH - 7)
    segments[3, 5:] = 0
    weights = (np.arange(SLOTS)[None, :] < np.arange(ROWS)[:, None] % (SLOTS + 1)).astype(np.float32)
    columns = np.sort(np.stack([random.permutation(4)[:SLOTS] + 1 for _ in range(ROWS)]), axis=1).astype(np.int32)
    return {
        "tokens": tokens,
        "segment_ids": segments,
        "positions": positions,
        "masked_positions": columns * weights.astype(np.int32),
        "masked_targets": (random.integers(5, VOCABULARY, (ROWS, SLOTS)) * weights).astype(np.int32),
        "masked_weights": weights,
    }


def one_step(objective, params, frozen, batch, accumulation=1, optimizer=None):
    optimizer = optimizer or optax.sgd(1.0)
    step = jax.jit(make_train_step(objective, optimizer, lambda step: 1.0, steps=10, accumulation=accumulation))
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}
    return step(state, {"seed": np.int32(0), **frozen}, batch)


def assert_trees_close(one, other, tolerance=1e-5):
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(left, right, atol=tolerance, rtol=tolerance, err_msg=jax.tree_util.keystr(path))


def test_micro_batches_take_every_nth_row():
    split = split_micro_batches({"tokens": np.arange(6)[:, None]}, 3)
    assert split["tokens"][:, :, 0].tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("accumulation", [2, 4])
@pytest.mark.parametrize("settings", [SETTINGS, EVERYWHERE], ids=["masked", "all"])
def test_accumulation_equals_the_whole_batch_under_uneven_masks(accumulation, settings):
    student, teacher = tiny(), tiny(num_layers=1)
    objective = distillation(student, teacher, settings)
    params = jax.jit(student.init)(jax.random.key(0))
    frozen = {"teachers": (jax.jit(teacher.init)(jax.random.key(1)),)}
    whole, metrics = one_step(objective, params, frozen, uneven_batch())
    parts, part_metrics = one_step(objective, params, frozen, uneven_batch(), accumulation)
    assert_trees_close(whole["params"], parts["params"])
    for name in ("loss", "kl", "mlm", "accuracy"):
        for left, right in zip(metrics[name], part_metrics[name]):
            np.testing.assert_allclose(left, right, rtol=1e-5, err_msg=name)


def test_loss_is_each_sum_over_its_own_global_weight():
    model = tiny()
    params = jax.jit(model.init)(jax.random.key(0))
    batch = uneven_batch()
    _, metrics = one_step(make_pretrain_objective(model), params, {}, batch)
    total, weight = metrics["mlm"]
    assert float(weight) == batch["masked_weights"].sum()
    np.testing.assert_allclose(metrics["loss"][0], total / weight, rtol=1e-6)


def test_fused_logits_give_the_same_loss_and_gradient():
    model, batch = tiny(), uneven_batch()
    params = jax.jit(model.init)(jax.random.key(0))
    _, expected = one_step(make_pretrain_objective(model), params, {}, batch)
    _, found = one_step(make_pretrain_objective(model, fused=True), params, {}, batch)
    for name in ("loss", "accuracy", "grad_norm"):
        np.testing.assert_allclose(found[name][0], expected[name][0], rtol=1e-5, err_msg=name)


def test_batch_without_masked_tokens_changes_nothing():
    student, teacher = tiny(), tiny(num_layers=1)
    params = jax.jit(student.init)(jax.random.key(0))
    batch = uneven_batch()
    batch["masked_weights"] = np.zeros_like(batch["masked_weights"])
    objective = distillation(student, teacher)
    state, metrics = one_step(objective, params, {"teachers": (jax.jit(teacher.init)(jax.random.key(1)),)}, batch)
    assert float(metrics["loss"][0]) == 0.0
    assert_trees_close(state["params"], params, tolerance=0.0)


def test_more_padding_never_changes_the_step():
    student, teacher = tiny(), tiny(num_layers=1)
    params = jax.jit(student.init)(jax.random.key(0))
    frozen = {"teachers": (jax.jit(teacher.init)(jax.random.key(1)),)}
    batch = uneven_batch()
    wider = dict(batch)
    for name in ("tokens", "segment_ids", "positions"):
        wider[name] = np.pad(batch[name], ((0, 0), (0, 5)))
    wider["tokens"][:, LENGTH:] = 17  # whatever stands in the padding
    for settings in (SETTINGS, EVERYWHERE):
        objective = distillation(student, teacher, settings)
        narrow_state, narrow_metrics = one_step(objective, params, frozen, batch)
        wide_state, wide_metrics = one_step(objective, params, frozen, wider)
        np.testing.assert_allclose(narrow_metrics["loss"][0], wide_metrics["loss"][0], rtol=1e-5)
        assert_trees_close(narrow_state["params"], wide_state["params"])


def test_student_equal_to_teacher_has_no_kl_and_no_gradient_from_it():
    model = tiny()
    params = jax.jit(model.init)(jax.random.key(0))
    objective = distillation(model, model, dataclasses.replace(SETTINGS, mlm=Term(0.0)))
    state, metrics = one_step(objective, params, {"teachers": (params,)}, uneven_batch())
    # The loss itself is exactly 0 on equal logits (test_logits.py); here the two forward passes are compiled apart.
    assert abs(float(metrics["kl"][0])) < 1e-6
    assert float(metrics["grad_norm"][0]) < 1e-6
    assert_trees_close(state["params"], params, tolerance=1e-6)


def test_term_weights_follow_their_schedule():
    objective = distillation(tiny(), tiny())
    assert objective.coefficients(0.0) == {"kl": 1.0, "mlm": 1.0}
    assert objective.coefficients(1.0) == {"kl": 0.5, "mlm": 1.0}
    assert objective.coefficients(0.5)["kl"] == 0.75


def broken_objective(objective, at):
    """The same, with one row's share of the loss turned into NaN at the steps `at` (by their progress of 10 steps)."""

    def loss(params, frozen, batch, key, scales, progress):
        total, terms = objective.loss(params, frozen, batch, key, scales, progress)
        wrong = jnp.any(jnp.abs(progress - np.array(at) / 9) < 1e-3) & jnp.any(batch["tokens"] == MARKED)
        return total + jnp.where(wrong, jnp.nan, 0.0), terms

    return dataclasses.replace(objective, loss=loss)


MARKED = VOCABULARY - 1


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_that_is_not_finite_changes_nothing_but_the_schedule_where_it_may_be_skipped(accumulation):
    """One bad row in one micro-batch; the reference takes the same steps without the bad one."""
    model = tiny()
    job = Training(steps=10, warmup_steps=0, schedule="constant", learning_rate=0.01)
    optimizer, schedule = make_optimizer(job), make_schedule(job)
    whole = make_pretrain_objective(model)

    def step_of(objective, skipped):
        return jax.jit(
            make_train_step(objective, optimizer, schedule, steps=10, accumulation=accumulation, skipped=skipped)
        )

    batches = [uneven_batch(number) for number in range(3)]
    for batch in batches:
        batch["tokens"][batch["tokens"] == MARKED] = 5
        batch["tokens"][2, 3] = MARKED
    skips, plain = step_of(broken_objective(whole, [1]), after_skipped), step_of(whole, None)
    params = jax.jit(model.init)(jax.random.key(0))
    frozen = {"seed": np.int32(0)}
    state = reference = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}
    counts = []
    for number, batch in enumerate(batches):
        before = state
        state, metrics = skips(state, frozen, batch)
        counts.append(float(metrics["skipped_steps"][0]))
        if number == 1:
            assert not np.isfinite(metrics["loss"][0])
            assert_trees_close(state["params"], before["params"], tolerance=0.0)
            assert_trees_close(state["opt_state"]["adam"], before["opt_state"]["adam"], tolerance=0.0)
            reference = {**reference, "step": reference["step"] + 1}
        else:
            reference, _ = plain(reference, frozen, batch)
    assert counts == [0.0, 1.0, 0.0]
    assert int(state["step"]) == 3 and int(state["opt_state"]["learning_rate"].count) == 3
    assert int(state["opt_state"]["adam"].count) == 2
    # The schedule is constant, so the reference, whose schedule is one behind, has the same rate.
    assert_trees_close(state["params"], reference["params"], tolerance=1e-6)
    assert_trees_close(state["opt_state"]["adam"], reference["opt_state"]["adam"], tolerance=1e-6)


def test_a_gradient_that_is_not_finite_is_skipped_with_a_finite_loss():
    model = tiny()
    whole = make_pretrain_objective(model)

    def loss(params, frozen, batch, key, scales, progress):
        total, terms = whole.loss(params, frozen, batch, key, scales, progress)
        return total + jnp.sqrt(jnp.sum(params["encoder"]["embeddings"]["tokens"] * 0.0)), terms  # 0, gradient NaN

    objective, optimizer = dataclasses.replace(whole, loss=loss), optax.sgd(1.0)
    params = jax.jit(model.init)(jax.random.key(0))
    step = jax.jit(make_train_step(objective, optimizer, lambda step: 1.0, steps=10, skipped=lambda old, new: old))
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}
    state, metrics = step(state, {"seed": np.int32(0)}, uneven_batch())
    assert np.isfinite(metrics["loss"][0]) and float(metrics["skipped_steps"][0]) == 1.0
    assert_trees_close(state["params"], params, tolerance=0.0)
