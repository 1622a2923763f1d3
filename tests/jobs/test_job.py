"""The real steps give the same losses and parameters on 8 devices, however they are arranged, as on one."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kd_jax.config.execution import Mesh, Rules
from kd_jax.config.training import Finetune, Training
from kd_jax.jobs.job import compiled_step, model_layout, state_functions
from kd_jax.jobs.teachers import Teacher, placed_shapes, teacher_tables
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import make_distill_objective
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.trainer.mesh import DEFAULT, global_batch, make_mesh, shardings
from tests.steps.test_train_step import SETTINGS, tiny, uneven_batch

STEPS = 3
WHOLE = Rules("", "", "", "", "", "")


def started(model, mesh, rules=DEFAULT):
    """(state at step 0, settings) of a short job."""
    settings = Training(steps=10, warmup_steps=2, learning_rate=1e-2).of_step
    draw, begin, _ = state_functions(model, settings, mesh, rules)
    return begin(draw(np.int32(0))), settings


def train(objective, model, constants, mesh, rules=DEFAULT, accumulation=1):
    """(losses of STEPS steps, final parameters as NumPy)."""
    state, settings = started(model, mesh, rules)
    settings = dataclasses.replace(settings, accumulation=accumulation, batch_size=accumulation)
    step = compiled_step(objective, model, settings, mesh, rules)
    losses = []
    for number in range(STEPS):
        state, metrics = step(state, {"seed": np.int32(0), **constants}, global_batch(mesh, uneven_batch(number)))
        losses.append(float(metrics["loss"][0]))
    return losses, jax.device_get(state["params"])


@pytest.mark.parametrize(
    ("shape", "accumulation"),
    [
        ((2, 2, 2), 1),
        ((2, 2, 2), 2),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.long),
        pytest.param((1, 4, 2), 1, marks=pytest.mark.long),
    ],
)
def test_distillation_on_eight_devices_equals_one(shape, accumulation):
    student, teacher = tiny(), tiny(num_layers=1)
    objective = make_distill_objective(WithProjections(student, ()), (teacher,), SETTINGS)
    one = make_mesh(Mesh(1, 1, 1), devices=jax.devices()[:1])
    mesh = make_mesh(Mesh(*shape))
    params = jax.device_get(jax.jit(teacher.init)(jax.random.key(7)))
    layout = shardings(mesh, teacher.logical_axes(), teacher.abstract())
    losses, alone = train(objective, student, {"teachers": (params,)}, one)
    placed = {"teachers": (jax.device_put(params, layout),)}
    spread, together = train(objective, student, placed, mesh, accumulation=accumulation)
    np.testing.assert_allclose(spread, losses, rtol=1e-5)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(together)):
        np.testing.assert_allclose(right, left, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_a_sharded_teacher_and_a_replicated_student_equal_one_device():
    student, teacher = tiny(), tiny(num_layers=1)
    objective = make_distill_objective(WithProjections(student, ()), (teacher,), SETTINGS)
    one = make_mesh(Mesh(1, 1, 1), devices=jax.devices()[:1])
    mesh = make_mesh(Mesh(2, 2, 2))
    params = jax.device_get(jax.jit(teacher.init)(jax.random.key(7)))
    losses, alone = train(objective, student, {"teachers": (params,)}, one)

    layout = model_layout(teacher, mesh, Rules(embed="data,fsdp"))
    placed = {"teachers": (jax.device_put(params, layout),)}
    # Nor does it matter that the teacher predicts the whole batch first.
    once = dataclasses.replace(SETTINGS, once=True)
    objective = make_distill_objective(WithProjections(student, ()), (teacher,), once)
    spread, together = train(objective, student, placed, mesh, WHOLE, accumulation=2)
    np.testing.assert_allclose(spread, losses, rtol=1e-5)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(together)):
        np.testing.assert_allclose(right, left, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    # 32 numbers of a token's embedding over data and fsdp; the vocabulary of 61 divides nothing.
    assert layout["encoder"]["embeddings"]["tokens"].shard_shape((61, 32)) == (61, 8)


def test_the_step_keeps_the_teachers_sharding_and_states_that_of_state_and_batch():
    student, teacher = tiny(), Teacher("", tiny(num_layers=1), Rules(), np.arange(61, dtype=np.int32))
    mesh = make_mesh(Mesh(2, 2, 2))
    objective = make_distill_objective(WithProjections(student, ()), (teacher.model,), SETTINGS)
    settings = Training().of_step
    _, _, state = state_functions(student, settings, mesh, WHOLE)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    constants = {
        "teachers": (placed_shapes(teacher, mesh),),
        "kept": jax.ShapeDtypeStruct((61,), np.int32),
        "seed": jax.ShapeDtypeStruct((), np.int32),
    }
    values = {**uneven_batch(), "teacher_tokens": uneven_batch()["tokens"]}
    batch = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in values.items()}
    # Arrays without a sharding are put where the step wants them.
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    step = compiled_step(objective, student, settings, mesh, WHOLE)
    stated, *_ = step.lower(state, constants, batch).compile().input_shardings
    assert stated[1]["teachers"][0]["encoder"]["embeddings"]["tokens"].spec == PartitionSpec(None, "fsdp")
    assert stated[1]["kept"].is_fully_replicated
    assert stated[2]["tokens"].spec == PartitionSpec(("data", "fsdp"))


def test_the_printed_table_has_the_teacher_as_well():
    mesh = make_mesh(Mesh(2, 2, 2))
    lines = teacher_tables([Teacher("", tiny(num_layers=1), Rules(mlp=""), None)], mesh)
    assert lines[0] == "teacher, frozen:"
    assert any(line.split()[:4] == ["encoder/embeddings/tokens", "61", "x", "32/fsdp"] for line in lines)
    assert any(line.split()[0] == "encoder/layers/mlp/output/kernel" and "/tensor" not in line for line in lines)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_gradient_of_the_token_table_crosses_the_network_once(accumulation):
    student, teacher = tiny(), Teacher("", tiny(num_layers=1), WHOLE, None)
    mesh = make_mesh(Mesh(2, 2, 1), devices=jax.devices()[:4])
    objective = make_distill_objective(WithProjections(student, ()), (teacher.model,), SETTINGS)
    settings = Training(accumulation=accumulation, batch_size=accumulation).of_step
    state = state_functions(student, settings, mesh, WHOLE)[2]
    constants = {"teachers": (placed_shapes(teacher, mesh),), "seed": jax.ShapeDtypeStruct((), np.int32)}
    batch = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in uneven_batch().items()}
    text = compiled_step(objective, student, settings, mesh, WHOLE).lower(state, constants, batch).compile().as_text()
    assert text is not None
    lines = [line.split(" all-reduce(")[0] for line in text.splitlines() if " all-reduce(" in line]
    sizes = [math.prod(map(int, shape.split(","))) for line in lines for shape in re.findall(r"f32\[([\d,]+)\]", line)]
    # No other parameter has as many numbers, and the loss's table may have a column for the bias.
    assert sum(61 * 32 <= size <= 61 * 33 for size in sizes) == 1


def test_jobs_that_differ_in_logging_alone_share_one_compiled_step():
    mesh = make_mesh(Mesh(-1, 1, 1))
    one, other = Training(log_every=1, batch_size=8), Finetune(checkpoint_every=7, evaluate_rows=3)
    objective = make_pretrain_objective(tiny())
    assert objective is make_pretrain_objective(tiny())
    steps = [compiled_step(objective, tiny(), settings.of_step, mesh, Rules()) for settings in (one, other)]
    assert steps[0] is steps[1]
    assert steps[0] is not compiled_step(objective, tiny(), Training(learning_rate=0.5).of_step, mesh, Rules())


def test_parameters_are_really_spread_over_fsdp_and_tensor():
    model = tiny()
    mesh = make_mesh(Mesh(2, 2, 2))
    state, _ = started(model, mesh)
    shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state["params"])]
    assert min(shares) <= 1 / 4
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert min(leaf.addressable_shards[0].data.size / leaf.size for leaf in moments) <= 1 / 4


def test_teacher_is_neither_changed_nor_part_of_the_state():
    student, teacher = tiny(), tiny(num_layers=1)
    mesh = make_mesh(Mesh(-1, 1, 1))
    params = jax.jit(teacher.init)(jax.random.key(7))
    before = jax.device_get(params)
    objective = make_distill_objective(WithProjections(student, ()), (teacher,), SETTINGS)
    state, settings = started(student, mesh)
    step = compiled_step(objective, student, settings, mesh, Rules())
    constants = {"seed": np.int32(0), "teachers": (params,)}
    state, _ = step(state, constants, global_batch(mesh, uneven_batch()))
    assert set(state) == {"step", "params", "opt_state"}
    assert set(state["params"]) == set(student.abstract())
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(params)):
        np.testing.assert_array_equal(left, right)
