"""Losses of blocks of logits: the same values and gradients as from all logits at once, in the memory of a block."""

import contextlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.config.execution import Mesh
from kd_jax.losses.blocked import block_parts, blocked_losses, logits_of, with_bias_inside
from kd_jax.losses.logits import distill_loss, kl_divergence, masked_cross_entropy
from kd_jax.trainer.mesh import make_mesh

ROWS, SLOTS, HIDDEN, TEACHER, VOCAB = 12, 5, 6, 9, 40
TEMPERATURE = 2.0

ROOT = pathlib.Path(__file__).resolve().parents[2]


def case(seed=0, rows=ROWS, slots=SLOTS, dtype=np.float32):
    """A student's and a teacher's features and tables, targets, and weights of which some are 0."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "features": normal(rows, slots, HIDDEN),
        "table": jnp.asarray(rng.normal(size=(VOCAB, HIDDEN)), np.float32),
        "bias": jnp.asarray(rng.normal(size=VOCAB), np.float32),
        "per_position": {
            "teacher": normal(rows, slots, TEACHER),
            "targets": jnp.asarray(rng.integers(0, VOCAB, (rows, slots)), jnp.int32),
            "weights": jnp.asarray(rng.random((rows, slots)) < 0.8, np.float32),
        },
        "constants": {
            "table": normal(VOCAB, TEACHER),
            "bias": normal(VOCAB),
            "temperature": jnp.float32(TEMPERATURE),
            "scales": {"kl": jnp.float32(0.7), "mlm": jnp.float32(0.2)},
        },
    }


def both_terms(logits_BxV, per_position, constants):
    teacher = logits_of(per_position["teacher"], constants["table"], constants["bias"])
    return distill_loss(
        logits_BxV,
        [teacher],
        per_position["targets"],
        per_position["weights"],
        constants["temperature"],
        constants["scales"],
    )


def blocked(values, block, loss=both_terms):
    return blocked_losses(
        loss,
        values["features"],
        values["table"],
        values["bias"],
        values["per_position"],
        values["constants"],
        block=block,
    )


def direct(values):
    """The same from losses.logits on the logits of all positions."""
    per_position, constants = values["per_position"], values["constants"]
    logits = jnp.einsum("rkh,vh->rkv", values["features"], values["table"])
    if values["bias"] is not None:
        logits = logits + values["bias"][None, None]
    teacher = jnp.einsum("rkh,vh->rkv", per_position["teacher"], constants["table"]) + constants["bias"][None, None]
    kl = kl_divergence(logits, teacher, per_position["weights"], TEMPERATURE)[0]
    mlm = masked_cross_entropy(logits, per_position["targets"], per_position["weights"])[0]
    hits = (jnp.argmax(logits, -1) == per_position["targets"]) * per_position["weights"]
    loss = constants["scales"]["kl"] * kl + constants["scales"]["mlm"] * mlm
    return loss, {"kl": kl, "mlm": mlm, "accuracy": jnp.sum(hits)}


def differentiate(function, values):
    """((loss, metrics), gradients by features, table and bias)."""
    names = [name for name in ("features", "table", "bias") if values[name] is not None]

    def of(parts):
        return function({**values, **parts})

    return jax.jit(jax.value_and_grad(of, has_aux=True))({name: values[name] for name in names})


def assert_close(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), actual, expected)


@pytest.mark.parametrize("block, with_bias", [(1, True), (7, True), (12, False), (1000, True), (1000, False)])
def test_values_and_gradients_equal_those_of_all_logits(block, with_bias):
    values = case()
    if not with_bias:
        values["bias"] = None
    assert_close(differentiate(lambda v: blocked(v, block), values), differentiate(direct, values))


@pytest.mark.parametrize("rows, slots, block", [(7, 5, 8), (1, 13, 4)])
def test_blocks_that_divide_neither_rows_nor_slots(rows, slots, block):
    values = case(1, rows, slots)
    assert_close(differentiate(lambda v: blocked(v, block), values), differentiate(direct, values))


@pytest.mark.parametrize("rows, slots, block", [(64, 10, 256), (64, 13, 200), (61, 9, 100), (3, 50, 7), (8, 4, 1)])
def test_no_block_is_larger_than_wanted(rows, slots, block):
    seen = []

    def loss(logits, per_position, constants):
        seen.append(logits.shape[0])
        return jnp.sum(logits * per_position[:, None]), ()

    assert rows % block_parts(rows, slots, block)[0] == 0
    ones = jnp.ones((rows, slots))
    total, _ = blocked_losses(loss, ones[..., None], jnp.ones((2, 1)), None, ones, (), block=block)
    assert max(seen) <= block
    assert total == 2 * rows * slots  # every position once, those that pad not at all


def test_blocks_prefer_no_padding_and_whole_rows():
    assert block_parts(64, 10, 640) == (1, 1)
    assert block_parts(64, 10, 320) == (1, 2)  # half of the slots of every row
    assert block_parts(64, 9, 320) == (2, 1)  # two parts of 5 and 4 slots would have to be padded
    assert block_parts(64, 10, 10_000) == (1, 1)


def test_a_block_below_one_position_is_an_error():
    with pytest.raises(ValueError, match="block"):
        blocked(case(), 0)


def test_without_differentiation_only_the_value_is_computed():
    values, block = case(2), 12
    calls = []

    @jax.custom_vjp
    def watched(logits):
        return jnp.sum(logits)

    def forward(logits):
        calls.append("differentiated")
        return watched(logits), logits

    watched.defvjp(forward, lambda logits, cotangent: (cotangent * jnp.ones_like(logits),))
    assert_close(jax.jit(lambda v: blocked(v, block))(values), direct(values))
    jax.jit(lambda v: blocked(v, block, lambda logits, *_: (watched(logits), ())))(values)
    assert not calls
    differentiate(lambda v: blocked(v, block, lambda logits, *_: (watched(logits), ())), values)
    assert calls


def test_the_gradient_is_scaled_with_that_of_the_loss():
    values = case(3)

    def tripled(v):
        loss, metrics = blocked(v, 15)
        return 3 * loss + 100 * metrics["kl"], metrics  # metrics are not differentiated

    _, gradients = differentiate(lambda v: blocked(v, 15), values)
    _, tripled_gradients = differentiate(tripled, values)
    assert_close(tripled_gradients, jax.tree.map(lambda leaf: 3 * leaf, gradients))


def test_constants_and_what_stands_at_positions_get_no_gradient():
    values = case(4)

    def of(constants, teacher):
        per_position = {**values["per_position"], "teacher": teacher}
        return blocked({**values, "constants": constants, "per_position": per_position}, 15)[0]

    gradients = jax.jit(jax.grad(of, (0, 1)))(values["constants"], values["per_position"]["teacher"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def softmax64(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_against_float64(dtype, tolerance):
    values = case(5, dtype=dtype)
    per_position, constants, scales = values["per_position"], values["constants"], values["constants"]["scales"]

    def wide(leaf):
        return np.asarray(leaf.astype(dtype) if leaf.dtype == np.float32 else leaf).astype(np.float64)

    features, table, bias = wide(values["features"]), wide(values["table"]), np.asarray(values["bias"], np.float64)
    student = features @ table.T + bias
    teacher = wide(per_position["teacher"]) @ wide(constants["table"]).T + np.asarray(constants["bias"], np.float64)
    weights = np.asarray(per_position["weights"], np.float64)
    target = np.eye(VOCAB)[np.asarray(per_position["targets"])]
    p, q = softmax64(teacher / TEMPERATURE), softmax64(student / TEMPERATURE)
    kl = (TEMPERATURE**2 * (p * np.log(p / q)).sum(-1) * weights).sum()
    mlm = (-(target * np.log(softmax64(student))).sum(-1) * weights).sum()
    at_logits = TEMPERATURE * (q - p) * float(scales["kl"]) + (softmax64(student) - target) * float(scales["mlm"])
    at_logits *= weights[..., None]
    expected = {
        "features": at_logits @ table,
        "table": np.einsum("rkv,rkh->vh", at_logits, features),
        "bias": at_logits.sum((0, 1)),
    }
    (loss, metrics), gradients = differentiate(lambda v: blocked(v, 20), values)
    assert loss.dtype == jnp.float32
    # Logits are products of what was rounded, in float32: the value is as exact from bfloat16 features.
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(metrics["mlm"], mlm, rtol=1e-5)
    np.testing.assert_allclose(loss, float(scales["kl"]) * kl + float(scales["mlm"]) * mlm, rtol=1e-5)
    for name, value in expected.items():
        assert gradients[name].dtype == values[name].dtype
        actual = np.asarray(gradients[name], np.float64)
        np.testing.assert_allclose(actual, value, atol=tolerance * np.abs(value).max(), err_msg=name)


def test_many_blocks_of_bfloat16_features_add_up_in_float32():
    # 512 blocks that each add 2**-8 to a gradient of at least 1: a bfloat16 sum would not move.
    features = jnp.ones((512, 1, 1), jnp.bfloat16)
    size = np.full((512, 1), 2.0**-8, np.float32)
    size[0] = 1.0

    def loss(logits, size_B, constants):
        return jnp.sum(logits * size_B[:, None]), ()

    def of(table):
        return blocked_losses(loss, features, table, None, size, (), block=1)[0]

    np.testing.assert_array_equal(jax.jit(jax.grad(of))(jnp.zeros((1, 1))), 1 + 511 * 2.0**-8)


def test_equal_models_have_no_divergence_at_a_large_vocabulary():
    for dtype in (jnp.bfloat16, jnp.float32):
        features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), dtype)
        table = jnp.asarray(np.random.default_rng(1).normal(size=(250_002, 4)), jnp.float32)

        def block(logits, per_position, constants):
            teacher = logits_of(per_position, constants, None)
            weights = jnp.ones(logits.shape[0])
            return kl_divergence(logits, teacher, weights, 2.0)[0], ()

        def of(features, table, other, other_table, block=block):
            return blocked_losses(block, features, table, None, other, other_table, block=3)[0]

        other_table = jnp.array(table)
        value, gradients = jax.jit(jax.value_and_grad(of, (0, 1)))(features, table, features, other_table)
        assert value == 0.0
        assert not any(np.any(np.asarray(leaf, np.float32)) for leaf in gradients)


def compiled_memory(rows, slots, block, vocabulary=250_002, hidden=4):
    """Bytes of temporary memory of the loss and its gradients, and of one block of float32 logits."""

    def of(features, table, bias, teacher, teacher_table, targets, weights):
        def loss(features, table, bias):
            per_position = {"teacher": teacher_features, "targets": targets, "weights": weights}
            constants = {"table": inner_table, "bias": inner_bias, "temperature": 2.0, "scales": {"kl": 0.5, "mlm": 1}}
            return blocked_losses(both_terms, features, table, bias, per_position, constants, block=block)

        teacher_features, inner_table, inner_bias = with_bias_inside(teacher, teacher_table, bias)
        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(features, table, bias)

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    features, table, at = shape(rows, slots, hidden), shape(vocabulary, hidden), (rows, slots)
    arguments = (features, table, shape(vocabulary), features, table, shape(*at, dtype=jnp.int32), shape(*at))
    analysis = jax.jit(of).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes, block * vocabulary * 4


@pytest.mark.parametrize("slots", [8, 16])  # one block, and two
def test_peak_memory_is_below_three_blocks_of_logits(slots):
    """As XLA compiles by itself: a process of its own has not the flag that kd_jax sets for jaxlib 0.10.2."""
    program = f"from tests.losses.test_blocked import compiled_memory as of; a, b = of(16, {slots}, 128); print(a / b)"
    flags = "--xla_cpu_experimental_ynn_fusion_type=+reduce" if importlib.metadata.version("jaxlib") == "0.10.2" else ""
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 3, f"{done.stdout} blocks"


def test_peak_memory_with_the_flag_against_wrong_sums_is_below_six_blocks_of_logits():
    """What correct sums cost on CPUs with jaxlib 0.10.2; docs/performance.md states it."""
    temporary, block = compiled_memory(16, 8, 128)
    assert temporary < 6 * block, f"{temporary / block:.2f} blocks"


def test_memory_does_not_grow_with_the_number_of_positions():
    few, block = compiled_memory(16, 16, 64)
    many, _ = compiled_memory(16, 128, 64)
    assert many - few < 0.05 * block


@pytest.mark.parametrize(
    "sizes, block",
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 16),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 100),
        ({"data": 8, "fsdp": 1, "tensor": 1}, 20),
    ],
)
def test_on_a_mesh(sizes, block):
    mesh = make_mesh(Mesh(**sizes))
    values = case(6, rows=16)

    def place(leaf, *spec):
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*spec)))

    rows = ("data", "fsdp")
    sharded = {
        "features": place(values["features"], rows),
        "table": place(values["table"], "tensor", "fsdp"),
        "bias": place(values["bias"], "tensor"),
        "per_position": jax.tree.map(lambda leaf: place(leaf, rows), values["per_position"]),
        "constants": {
            **jax.tree.map(lambda leaf: place(leaf), values["constants"]),
            "table": place(values["constants"]["table"], "tensor"),
        },
    }
    expected = differentiate(direct, values)
    assert_close(differentiate(lambda v: blocked(v, block), sharded), expected)

    def in_mesh(v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return blocked(v, block)

    assert_close(differentiate(in_mesh, sharded), expected)


def test_the_gradient_of_the_table_is_summed_over_devices_after_the_blocks_and_not_in_each():
    mesh = make_mesh(Mesh(8, 1, 1))
    values = case(6, rows=16)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    sharded = {**values, "features": jax.device_put(values["features"], rows)}
    sharded["per_position"] = jax.tree.map(lambda leaf: jax.device_put(leaf, rows), values["per_position"])

    def compiled(in_mesh: bool) -> str:
        def gradient(v):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if in_mesh else contextlib.nullcontext():
                return jax.grad(lambda table: blocked({**v, "table": table}, 16)[0])(v["table"])

        text = jax.jit(gradient).lower(sharded).compile().as_text()
        assert text is not None
        return text

    def in_loops(text: str) -> int:
        """Collectives that are computed inside of a loop's body."""
        bodies = set(re.findall(r"body=%([\w.\-]+)", text))
        parts = re.split(r"\n(?=%|ENTRY)", text)
        return sum(part.count(" all-reduce(") for part in parts if part.split(" ")[0].lstrip("%") in bodies)

    assert in_loops(compiled(False)) > 0
    assert in_loops(compiled(True)) == 0
