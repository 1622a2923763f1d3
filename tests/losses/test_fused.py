"""The loss in Pallas kernels, in the interpreter: the values and gradients of the blocked loss and of float64."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.config.execution import Mesh
from kd_jax.losses.blocked import blocked_losses, logits_of
from kd_jax.losses.fused import fused_losses, serves_mesh
from kd_jax.losses.logits import distill_loss
from kd_jax.losses.tiling import GPU, TPU, Decoder, has_kernels
from kd_jax.trainer.mesh import make_mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]

STUDENT, TEACHER, VOCAB = 6, 9, 300
TEMPERATURE = 2.0
SCALES = {"kl": 0.7, "mlm": 0.2}
EVERY = ("kl", "mlm")

# Small tiles, so that there are several of them, and several parts.
SMALL = {
    "tpu": dataclasses.replace(TPU, positions=16, vocabulary=128, resident=2 * 4 * 16 * 128, interpret=True),
    "gpu": dataclasses.replace(GPU, positions=16, vocabulary=32, splits=4, depth=4, resident=2**14, interpret=True),
}
by_platform = pytest.mark.parametrize("platform", list(SMALL))


def case(seed=0, rows=5, slots=9, dtype="float32", vocabulary=VOCAB, student=STUDENT, teacher=TEACHER):
    """Student, teacher, targets, and weights, some of which are 0."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def decoder(width, dtype):
        table, bias = normal(vocabulary, width, dtype=dtype), normal(vocabulary, dtype=dtype)
        return Decoder(normal(rows, slots, width), table, bias)

    return {
        "student": decoder(student, "float32"),
        "teacher": decoder(teacher, dtype),
        "targets": jnp.asarray(rng.integers(0, vocabulary, (rows, slots)), jnp.int32),
        "weights": jnp.asarray(rng.random((rows, slots)) < 0.8, np.float32),
    }


def fused(values, tiling, names=EVERY, temperature=TEMPERATURE):
    scales = {name: jnp.float32(SCALES[name]) for name in names}
    student, teacher, targets, weights = (values[name] for name in ("student", "teacher", "targets", "weights"))
    return fused_losses(student, teacher, targets, weights, temperature, scales, tiling)


def blocked(values, names=EVERY, temperature=TEMPERATURE):
    """The same losses from blocks of logits."""
    student, teacher = values["student"], values["teacher"]
    per_position = {"targets": values["targets"], "weights": values["weights"]}
    if teacher is not None:
        per_position["teacher"] = teacher.features

    def of_block(logits, per_position, constants):
        theirs = [logits_of(per_position["teacher"], *constants["teacher"])] if "kl" in names else []
        targets, weights = per_position["targets"], per_position["weights"]
        return distill_loss(logits, theirs, targets, weights, constants["temperature"], constants["scales"])

    constants = {
        "teacher": None if teacher is None else teacher[1:],
        "temperature": jnp.float32(temperature),
        "scales": {name: jnp.float32(SCALES[name]) for name in names},
    }
    features, table, bias = student
    return blocked_losses(of_block, features, table, bias, per_position, constants, block=20)


def differentiate(function, values):
    """((loss, sums), gradients of the student)."""

    def of(student, rest):
        return function({**rest, "student": student})

    return jax.jit(jax.value_and_grad(of, has_aux=True))(values["student"], values)


def assert_close(actual, expected, tolerance=2e-6):
    """Compares up to a share of the largest number of each array."""

    def check(a, b):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())

    jax.tree.map(check, actual, expected)


@by_platform
@pytest.mark.parametrize(
    "names, dtype, tolerance",
    [(EVERY, "float32", 2e-6), (("kl",), "float32", 2e-6), (("mlm",), "float32", 2e-6), (EVERY, "bfloat16", 6e-3)],
)
def test_values_and_gradients_equal_those_of_blocks(platform, names, dtype, tolerance):
    values = case(dtype=dtype)
    if names == ("mlm",):
        values["teacher"] = None
    expected = differentiate(lambda v: blocked(v, names), values)
    actual = differentiate(lambda v: fused(v, SMALL[platform], names), values)
    assert_close(actual[0], expected[0], 1e-6)
    assert_close(actual[1], expected[1], tolerance)


def softmax64(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def float64(values, temperature=TEMPERATURE):
    """((loss, sums), gradients) in float64, from inputs rounded to the dtype of the features."""
    student, teacher = values["student"], values["teacher"]
    dtype = student.features.dtype

    def logits(model):
        features, table = (np.asarray(leaf.astype(dtype)).astype(np.float64) for leaf in model[:2])
        bias = 0.0 if model.bias is None else np.asarray(model.bias, np.float64)
        return features, table, features @ table.T + bias

    features, table, ours = logits(student)
    theirs = logits(teacher)[2]
    weights = np.asarray(values["weights"], np.float64)
    size = table.shape[0]
    target = np.asarray(values["targets"])[..., None] == np.arange(size)
    p, q, plain = softmax64(theirs / temperature), softmax64(ours / temperature), softmax64(ours)
    kl = (temperature**2 * (p * np.log(p / q)).sum(-1) * weights).sum()
    mlm = (-(target * np.log(plain)).sum(-1) * weights).sum()
    hits = ((ours.argmax(-1) == np.asarray(values["targets"])) * weights).sum()
    at_logits = temperature * (q - p) * SCALES["kl"] + (plain - target) * SCALES["mlm"]
    at_logits = at_logits * weights[..., None]
    by = Decoder(at_logits @ table, np.einsum("rkv,rkh->vh", at_logits, features), at_logits.sum((0, 1)))
    return (SCALES["kl"] * kl + SCALES["mlm"] * mlm, {"kl": kl, "mlm": mlm, "accuracy": hits}), by


def assert_near(actual, expected, value, gradient):
    """Compares up to a share `value` of the sums and a share `gradient` of each gradient's largest number."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=value, atol=1e-30), actual[0], expected[0])
    for a, b in zip(actual[1], expected[1], strict=True):
        if a is not None:
            np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=gradient * np.abs(b).max(), rtol=0)


@by_platform
@pytest.mark.parametrize(
    "dtype, temperature, tolerance", [("float32", 0.5, 2e-6), ("float32", 4.0, 2e-6), ("bfloat16", 1.0, 1e-2)]
)
def test_against_float64(platform, dtype, temperature, tolerance):
    values = case(1, dtype=dtype)
    actual = differentiate(lambda v: fused(v, SMALL[platform], temperature=temperature), values)
    assert actual[0][0].dtype == jnp.float32
    # Logits are float32 products of the rounded inputs, so the value is as exact for bfloat16 features.
    assert_near(actual, float64(values, temperature), 2e-6, tolerance)


@by_platform
@pytest.mark.parametrize("rows, slots, vocabulary", [(1, 1, 7), (1, 97, 31), (4, 16, 512), (3, 11, 641)])
def test_sizes_that_fill_no_tile_or_all(platform, rows, slots, vocabulary):
    values = case(2, rows, slots, vocabulary=vocabulary)
    values["weights"] = jnp.ones((rows, slots))
    assert_near(differentiate(lambda v: fused(v, SMALL[platform]), values), float64(values), 1e-5, 1e-5)


@by_platform
def test_without_bias_and_with_other_widths(platform):
    values = case(3, student=4, teacher=130)
    values["student"] = values["student"]._replace(bias=None)
    values["teacher"] = values["teacher"]._replace(bias=None)
    actual = differentiate(lambda v: fused(v, SMALL[platform]), values)
    assert actual[1].bias is None
    assert_near(actual, float64(values), 1e-5, 1e-5)


@by_platform
def test_positions_of_weight_0_have_no_effect(platform):
    values = case(4)
    absent = np.asarray(values["weights"]) == 0

    def spoiled(model):
        return model._replace(features=jnp.where(absent[..., None], jnp.nan, model.features))

    broken = {**values, "student": spoiled(values["student"]), "teacher": spoiled(values["teacher"])}
    broken["targets"] = jnp.where(absent, 10**6, values["targets"])

    def of(v):
        return fused(v, SMALL[platform])

    whole, same = differentiate(of, values), differentiate(of, broken)
    jax.tree.map(np.testing.assert_array_equal, same, whole)
    assert not np.any(whole[1].features[absent])
    values["weights"] = jnp.zeros_like(values["weights"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(differentiate(of, values)))


@by_platform
def test_a_nan_at_a_position_of_weight_1_reaches_loss_and_gradients(platform):
    values = case(4)
    values["weights"] = jnp.ones_like(values["weights"])
    values["student"] = values["student"]._replace(features=values["student"].features.at[1, 2].set(jnp.nan))
    (loss, _), gradients = differentiate(lambda v: fused(v, SMALL[platform]), values)
    assert np.isnan(loss) and all(np.any(np.isnan(leaf)) for leaf in gradients)


@by_platform
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_models_have_no_divergence_and_no_gradient(platform, dtype):
    values = case(5, dtype=dtype)
    values["teacher"] = jax.tree.map(jnp.array, values["student"])
    (loss, sums), gradients = differentiate(lambda v: fused(v, SMALL[platform], ("kl",), 3.7), values)
    assert loss == 0.0 and sums["kl"] == 0.0
    assert not any(np.any(np.asarray(leaf, np.float32)) for leaf in gradients)


@by_platform
def test_large_logits_and_small_divergences(platform):
    values = case(6)
    student = values["student"]
    rng = np.random.default_rng(0)
    near = jax.tree.map(lambda leaf: leaf * (1 + 1e-2 * jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)), student)
    values["teacher"] = near
    of = jax.jit(lambda v: fused(v, SMALL[platform])[1]["kl"])
    expected = float64(values)[0][1]["kl"]
    assert expected < 0.1
    np.testing.assert_allclose(of(values), expected, rtol=1e-3)
    values["student"] = student._replace(bias=student.bias + 1e3)  # all logits: no probability changes
    np.testing.assert_allclose(of(values), expected, atol=45 * 2e-4)  # 1e3 has a spacing of 6e-5 in float32


@by_platform
def test_the_gradient_is_scaled_with_that_of_the_loss(platform):
    values = case(7)

    def tripled(v):
        loss, sums = fused(v, SMALL[platform])
        return 3 * loss + 100 * sums["kl"], sums  # sums are not differentiated

    _, gradients = differentiate(lambda v: fused(v, SMALL[platform]), values)
    assert_close(differentiate(tripled, values)[1], jax.tree.map(lambda leaf: 3 * leaf, gradients))


@by_platform
def test_without_differentiation_there_is_one_pass(platform):
    values = case(8)
    text = str(jax.make_jaxpr(lambda v: fused(v, SMALL[platform]))(values))
    assert text.count("pallas_call[") == 1
    assert_close(jax.jit(lambda v: fused(v, SMALL[platform]))(values), blocked(values))


@by_platform
def test_no_array_has_positions_times_vocabulary(platform):
    """Nor is there, with parts of the vocabulary on a GPU, a gradient of all logits."""
    values = case(9, rows=16, slots=16, vocabulary=3000)

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            inner = (
                [] if equation.primitive.name == "pallas_call" else jax.tree.leaves(equation.params, is_leaf=is_jaxpr)
            )
            for one in inner:
                if is_jaxpr(one):
                    yield from sizes(getattr(one, "jaxpr", one))

    def is_jaxpr(one):
        return hasattr(one, "eqns")

    def of(student):
        return fused({**values, "student": student}, SMALL[platform])[0]

    largest = max(sizes(jax.make_jaxpr(jax.grad(of))(values["student"]).jaxpr))
    assert largest < 256 * 3000 / 4


@pytest.mark.parametrize("platform, sizes", [("tpu", {"data": 8}), ("gpu", {"data": 2, "fsdp": 4})])
def test_on_a_mesh(platform, sizes):
    mesh, values = make_mesh(Mesh(**sizes)), case(10, rows=16)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def placed(model):
        return model._replace(features=jax.device_put(model.features, rows))

    sharded = {
        "student": placed(values["student"]),
        "teacher": placed(values["teacher"]),
        "targets": jax.device_put(values["targets"], rows),
        "weights": jax.device_put(values["weights"], rows),
    }

    def in_mesh(v):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fused(v, SMALL[platform])

    assert_close(differentiate(in_mesh, sharded), differentiate(blocked, values))


def test_supported_meshes():
    def serves(rows, **sizes):
        with jax.sharding.use_abstract_mesh(make_mesh(Mesh(**sizes)).abstract_mesh):
            return serves_mesh(rows)

    assert serves_mesh(3)
    assert serves(16, data=8, fsdp=1, tensor=1) and serves(8, data=2, fsdp=4, tensor=1)
    assert not serves(12, data=8, fsdp=1, tensor=1)
    assert not serves(16, data=4, fsdp=1, tensor=2)


def test_on_a_cpu_the_kernels_run_in_the_interpreter():
    values = case(11)
    assert_close(jax.jit(lambda v: fused(v, None))(values), jax.jit(blocked)(values), 1e-5)


def test_where_there_are_kernels():
    def device(platform, kind):
        return types.SimpleNamespace(platform=platform, device_kind=kind)

    def found(mode, device, tensor=1):
        mesh = types.SimpleNamespace(devices=np.array([[[device]]]), shape={"tensor": tensor})
        return has_kernels(mode, mesh)  # type: ignore[arg-type]

    tpu, gpu, other, cpu = (
        device("tpu", "TPU v5 lite"),
        device("gpu", "NVIDIA H100"),
        device("gpu", "MI300"),
        device("cpu", "cpu"),
    )
    assert [found("auto", one) for one in (tpu, gpu, other, cpu)] == [True, True, False, False]
    assert not found("auto", tpu, tensor=2)
    assert not found("plain", tpu) and found("fused", cpu)


COMPILED = """
import sys
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kd_jax.compile_check.topology import find_topology
from kd_jax.losses.fused import fused_losses
from kd_jax.losses.tiling import Decoder, has_kernels

name, count, rows = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
mesh = Mesh(np.array(find_topology(name).devices[:count]).reshape(count, 1, 1), ("data", "fsdp", "tensor"))
assert has_kernels("auto", mesh)

def shape(*sizes, dtype=jnp.bfloat16, by_row=False):
    spec = PartitionSpec("data") if by_row else PartitionSpec()
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, spec))

def decoder(width, dtype):
    features = shape(rows, 77, width, by_row=True)
    return Decoder(features, shape(250_002, width, dtype=dtype), shape(250_002, dtype=dtype))

def step(student, teacher, targets, weights, temperature, scales):
    def loss(student):
        return fused_losses(student, teacher, targets, weights, temperature, scales)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.value_and_grad(loss, has_aux=True)(student)

at = [shape(rows, 77, dtype=dtype, by_row=True) for dtype in (jnp.int32, jnp.float32)]
one = shape(dtype=jnp.float32)
operands = decoder(384, jnp.float32), decoder(768, jnp.bfloat16), *at, one, {"kl": one, "mlm": one}
compiled = jax.jit(step).lower(*operands).compile()
text = compiled.as_text()
print("kernels", text.count('custom_call_target="tpu_custom_call"') + text.count("gpu.triton"))
print("MiB", compiled.memory_analysis().temp_size_in_bytes / 2**20)
"""


@pytest.mark.long
@pytest.mark.parametrize("name, count, rows", [("v5e:2x2", 1, 4), ("v5p:2x2x1", 4, 512), ("h100:1", 1, 128)])
def test_it_compiles_for_hardware_that_is_not_here(name, count, rows):
    """Logits would take 300 MiB for each of the rows; a float32 table of the student 366 MiB."""
    module = "jax_plugins.xla_cuda13" if name.startswith("h100") else "libtpu"
    pytest.importorskip(module, reason=f"pip install 'jax[tpu]' or 'jax[cuda13]' brings {module}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", COMPILED, name, str(count), str(rows)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(("kernels", "MiB")))
    assert int(found["kernels"]) == 2
    assert float(found["MiB"]) < 800


@pytest.mark.long
@pytest.mark.parametrize("platform, tiling", [("tpu", TPU), ("gpu", GPU)])
def test_at_a_vocabulary_of_250_002_with_the_real_tiles(platform, tiling):
    tiling = dataclasses.replace(tiling, interpret=True)
    values = case(12, rows=2, slots=3, vocabulary=250_002, student=4, teacher=5)
    values["targets"] = values["targets"].at[0, 0].set(250_001)
    values["weights"] = jnp.ones_like(values["weights"])
    assert_near(differentiate(lambda v: fused(v, tiling), values), float64(values), 1e-5, 1e-5)
    values["teacher"] = jax.tree.map(jnp.array, values["student"])
    (loss, _), gradients = differentiate(lambda v: fused(v, tiling, ("kl",)), values)
    assert loss == 0.0 and not any(np.any(leaf) for leaf in gradients)
