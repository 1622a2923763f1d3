"""The real steps give the same losses and parameters on 8 devices, however they are arranged, as on one."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from ml_collections import FrozenConfigDict

from kd_jax.config.execution import Mesh, Rules
from kd_jax.config.training import Training
from kd_jax.jobs.frozen import Frozen, model_layout
from kd_jax.jobs.job import STEP_KEYS, programs
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import make_distill_objective
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.trainer.mesh import global_batch, make_mesh, shardings
from tests.steps.test_train_step import SETTINGS, tiny, uneven_batch

STEPS = 3
WHOLE = Rules("", "", "", "", "", "")


def train(objective, arguments, model, frozen, mesh, tables=(), **changes):
    """(losses of STEPS steps, final parameters as NumPy). tables: the rules of what is trained, the entries of frozen
    and the rules of the teachers in it."""
    job = Training(steps=10, warmup_steps=2, learning_rate=1e-2, **changes)
    settings = FrozenConfigDict({key: getattr(job, key) for key in STEP_KEYS})
    compiled = programs(objective, arguments, model, settings, mesh, *tables)
    state = compiled.from_seed(np.int32(0))
    losses = []
    for step in range(STEPS):
        state, metrics = compiled.step(state, {"seed": np.int32(0), **frozen}, global_batch(mesh, uneven_batch(step)))
        losses.append(float(metrics["loss"][0]))
    return losses, jax.device_get(state["params"])


@pytest.mark.parametrize(("shape", "accumulation"), [((8, 1, 1), 1), ((2, 2, 2), 1), ((1, 4, 2), 1), ((2, 2, 2), 2)])
def test_distillation_on_eight_devices_equals_one(shape, accumulation):
    student, teacher = tiny(), tiny(num_layers=1)
    arguments = (WithProjections(student, ()), (teacher,), SETTINGS)
    one = make_mesh(Mesh(1, 1, 1), devices=jax.devices()[:1])
    mesh = make_mesh(Mesh(*shape))
    params = jax.device_get(teacher.init(jax.random.key(7)))
    layout = shardings(mesh, teacher.logical_axes(), teacher.abstract())
    losses, alone = train(make_distill_objective, arguments, student, {"teachers": (params,)}, one)
    placed = {"teachers": (jax.device_put(params, layout),)}
    spread, together = train(make_distill_objective, arguments, student, placed, mesh, accumulation=accumulation)
    np.testing.assert_allclose(spread, losses, rtol=1e-5)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(together)):
        np.testing.assert_allclose(right, left, atol=2e-5, err_msg=jax.tree_util.keystr(path))


def test_a_sharded_teacher_and_a_replicated_student_equal_one_device():
    student, teacher = tiny(), tiny(num_layers=1)
    arguments = (WithProjections(student, ()), (teacher,), SETTINGS)
    one = make_mesh(Mesh(1, 1, 1), devices=jax.devices()[:1])
    mesh = make_mesh(Mesh(2, 2, 2))
    params = jax.device_get(teacher.init(jax.random.key(7)))
    losses, alone = train(make_distill_objective, arguments, student, {"teachers": (params,)}, one)

    whole = WHOLE
    cut = Rules(embed="data,fsdp")
    reads = Frozen(teachers=(teacher,))
    layout = model_layout(teacher, mesh, cut)
    placed = {"teachers": (jax.device_put(params, layout),)}
    tables = (whole, (reads, cut))
    # Nor does it matter that the teacher predicts the whole batch at once.
    arguments = (
        *arguments[:2],
        dataclasses.replace(SETTINGS, once=True),
    )
    spread, together = train(make_distill_objective, arguments, student, placed, mesh, tables, accumulation=2)
    np.testing.assert_allclose(spread, losses, rtol=1e-5)
    for (path, left), right in zip(jax.tree_util.tree_leaves_with_path(alone), jax.tree.leaves(together)):
        np.testing.assert_allclose(right, left, atol=2e-5, err_msg=jax.tree_util.keystr(path))
    # 32 numbers of a token's embedding over data and fsdp; the vocabulary of 61 divides nothing.
    assert layout["encoder"]["embeddings"]["tokens"].shard_shape((61, 32)) == (61, 8)


def test_the_step_states_where_state_teacher_and_batch_lie():
    student, teacher = tiny(), tiny(num_layers=1)
    mesh = make_mesh(Mesh(2, 2, 2))
    whole = WHOLE
    cut = Rules()
    reads = Frozen(teachers=(teacher,), whole=("kept",))
    settings = FrozenConfigDict({key: Training()[key] for key in STEP_KEYS})
    arguments = (WithProjections(student, ()), (teacher,), SETTINGS)
    compiled = programs(make_distill_objective, arguments, student, settings, mesh, whole, (reads, cut))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(compiled.layout))
    frozen = {
        "teachers": (teacher.abstract(),),
        "kept": jax.ShapeDtypeStruct((61,), np.int32),
        "seed": jax.ShapeDtypeStruct((), np.int32),
    }
    batch = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in uneven_batch().items()}
    # Arrays that do not say where they lie are put where the step wants them.
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), compiled.abstract)
    stated, *_ = compiled.step.lower(state, frozen, batch).compile().input_shardings
    assert stated[1]["teachers"][0]["encoder"]["embeddings"]["tokens"].spec == PartitionSpec(None, "fsdp")
    assert stated[1]["kept"].is_fully_replicated
    assert stated[2]["tokens"].spec == PartitionSpec(("data", "fsdp"))


def test_the_printed_table_has_the_teacher_as_well():
    teacher = tiny(num_layers=1)
    mesh = make_mesh(Mesh(2, 2, 2))
    lines = Frozen(teachers=(teacher,)).describe(mesh, Rules(mlp=""))
    assert lines[0] == "teacher, frozen:"
    assert any(line.split()[:4] == ["encoder/embeddings/tokens", "61", "x", "32/fsdp"] for line in lines)
    assert any(line.split()[0] == "encoder/layers/mlp/output/kernel" and "/tensor" not in line for line in lines)
    beside = Frozen(decoder=tiny(decoder_bias=True)).describe(mesh, Rules())
    assert beside[0] == "teacher's decoder, frozen:" and "61 x 32/fsdp" in beside[1]


def test_parameters_are_really_spread_over_fsdp_and_tensor():
    model = tiny()
    mesh = make_mesh(Mesh(2, 2, 2))
    settings = FrozenConfigDict({key: Training()[key] for key in STEP_KEYS})
    compiled = programs(make_pretrain_objective, (model,), model, settings, mesh)
    state = compiled.from_seed(np.int32(0))
    shares = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state["params"])]
    assert min(shares) <= 1 / 4
    moments = [leaf for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim]
    assert min(leaf.addressable_shards[0].data.size / leaf.size for leaf in moments) <= 1 / 4


def test_teacher_is_neither_changed_nor_part_of_the_state():
    student, teacher = tiny(), tiny(num_layers=1)
    mesh = make_mesh(Mesh(-1, 1, 1))
    params = teacher.init(jax.random.key(7))
    before = jax.device_get(params)
    settings = FrozenConfigDict({key: Training()[key] for key in STEP_KEYS})
    arguments = (WithProjections(student, ()), (teacher,), SETTINGS)
    compiled = programs(make_distill_objective, arguments, student, settings, mesh)
    batch = global_batch(mesh, uneven_batch())
    state, _ = compiled.step(compiled.from_seed(np.int32(0)), {"seed": np.int32(0), "teachers": (params,)}, batch)
    assert set(state) == {"step", "params", "opt_state"}
    assert set(state["params"]) == set(student.abstract())
    for left, right in zip(jax.tree.leaves(before), jax.tree.leaves(params)):
        np.testing.assert_array_equal(left, right)
