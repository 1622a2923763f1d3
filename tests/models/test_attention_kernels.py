"""Fused attention against plain attention, in values and gradients; the kernels run interpreted."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.compile_check.hlo import Program
from kd_jax.config.execution import Mesh
from kd_jax.models.attention import mask_at, plain_attention
from kd_jax.models.attention_kernels import PLAIN, Kernel, computes, find_kernel, fused_attention
from kd_jax.models.functional import Functional
from kd_jax.trainer.mesh import make_mesh, on_mesh
from kd_jax.types import UserError
from tests.support.small_models import packed_batch, parameters, small_config

SPLASH, TRITON = Kernel("splash", True, True), Kernel("triton", True, True)
ROWS = [[128], [50, 30, 20], [5, 100], []]  # one text, several, padding after and between blocks, only padding
LENGTH = 128


def arrays(heads: int, size: int, rows=ROWS, length: int = LENGTH, dtype=jnp.float32):
    """Query, key, value and the gradient of the mixed values, and segment ids."""
    rng = np.random.default_rng(0)
    shape = (len(rows), length, heads, size)
    query, key, value, given = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(4))
    return (query * jnp.asarray(2 * size**-0.5, dtype), key, value), given, packed_batch(rows, length)["segment_ids"]


def compiled(attend, inputs, given):
    def both(inputs, given):
        mixed, pull = jax.vjp(attend, *inputs)
        return mixed, *pull(given.astype(mixed.dtype))

    return jax.jit(both).lower(inputs, given).compile()


def with_gradients(attend, inputs, given):
    """The mixed values, and the gradients of query, key and value, float32 NumPy."""

    return [np.asarray(one, np.float32) for one in compiled(attend, inputs, given)(inputs, given)]


def plainly(inputs, segment_ids, window):
    query, key, value = inputs
    columns = jnp.broadcast_to(jnp.arange(segment_ids.shape[1])[None], segment_ids.shape)
    return plain_attention(query, key, value, mask_at(jnp.asarray(segment_ids), columns, window))


def check(kernel, inputs, given, segment_ids, window, tolerance):
    local = window is not None

    def fused(query, key, value):
        return fused_attention(kernel, query, key, value, jnp.asarray(segment_ids), local, window or 0)

    wide = [one.astype(jnp.float32) for one in inputs]
    wanted = with_gradients(lambda *inputs: plainly(inputs, segment_ids, window), wide, given)
    for name, one, other in zip("oqkv", with_gradients(fused, inputs, given), wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("kernel", [SPLASH, TRITON], ids=lambda one: one.name)
@pytest.mark.parametrize("window", [None, 20])
def test_values_and_gradients_are_those_of_plain_attention(kernel, window):
    inputs, given, segment_ids = arrays(2, 32)
    check(kernel, inputs, given, segment_ids, window, 1e-5)


@pytest.mark.parametrize("kernel", [SPLASH, TRITON], ids=lambda one: one.name)
def test_bfloat16(kernel):
    inputs, given, segment_ids = arrays(1, 64, dtype=jnp.bfloat16)
    check(kernel, inputs, given, segment_ids, 20, 2e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 80, 128])
@pytest.mark.parametrize("length", [64, 512, 2048])
def test_the_kernel_compiled_for_a_gpu(length, size, dtype):
    if jax.default_backend() != "gpu":
        pytest.skip("there is no GPU; launch/gpu_check.sh runs this test where one is")
    third = length // 3
    inputs, given, segment_ids = arrays(2, size, [[length], [third, third], []], length, dtype)
    with jax.default_matmul_precision("highest"):
        for window in (None, 20):
            # Products in the kernel round to TF32 or bfloat16.
            check(Kernel("triton", True), inputs, given, segment_ids, window, 2e-2)


def test_heads_of_a_size_that_is_no_power_of_two_and_an_odd_number_of_blocks():
    inputs, given, segment_ids = arrays(1, 20, [[100, 70], [192]], 192)
    check(TRITON, inputs, given, segment_ids, 70, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("kernel", [SPLASH, TRITON], ids=lambda one: one.name)
@pytest.mark.parametrize("size", [32, 64, 128])
def test_several_blocks_of_a_long_row(kernel, size):
    inputs, given, segment_ids = arrays(1, size, [[700, 300]], 1024)
    for window in (None, 64):
        check(kernel, inputs, given, segment_ids, window, 1e-5)


@pytest.mark.parametrize("kernel", [SPLASH, TRITON], ids=lambda one: one.name)
def test_on_a_mesh_each_device_attends_in_its_rows_and_heads(kernel):
    inputs, given, segment_ids = arrays(2, 32, [[128], [50, 30], [70, 58], []])

    def attend(query, key, value):
        return fused_attention(kernel, query, key, value, jnp.asarray(segment_ids), True, 20)

    alone = with_gradients(attend, inputs, given)
    mesh = make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    placed = jax.device_put((inputs, given), NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")))
    program = compiled(on_mesh(attend, mesh), *placed)
    assert Program(program.as_text() or "").collectives() == []
    for one, other in zip(program(*placed), alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@functools.cache
def small_encoder(scan: str, **changes) -> Functional:
    sizes = {"max_positions": 64, "local_window": 30, "hidden_size": 32, "num_layers": 2, "scan": scan}
    return Functional("mlm", small_config("modernbert", **sizes, **changes), attention=TRITON)


@pytest.mark.parametrize("scan", ["scan", "unroll"])
def test_an_encoder_with_fused_attention_equals_one_with_plain(scan):
    fused = small_encoder(scan, dropout=0.1)
    plain, batch = dataclasses.replace(fused, attention=PLAIN), packed_batch([[64], [20, 30]], 64)
    params, key = parameters(plain), jax.random.key(3)
    at = np.array([[0, 9, 63], [19, 20, 49]])

    def states(model, params):
        hidden = model.hidden_at(params, batch, at, key)
        return jnp.sum(jnp.sin(hidden)), hidden

    def run(model):
        return jax.jit(jax.value_and_grad(functools.partial(states, model), has_aux=True))(params)

    (_, one), gradient = run(fused)
    (_, other), wanted = run(plain)
    np.testing.assert_allclose(one, other, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradient, wanted)


def test_dropout_of_attention_is_computed_plainly_or_refused():
    required = small_encoder("unroll", attention_dropout=0.5)
    chosen = dataclasses.replace(required, attention=required.attention._replace(required=False))
    plain = dataclasses.replace(required, attention=PLAIN)
    batch, params, key = packed_batch([[64]], 64), parameters(plain), jax.random.key(0)
    programs = [jax.jit(model.hidden).lower(params, batch, key).as_text() for model in (chosen, plain)]
    assert programs[0] == programs[1]
    with pytest.raises(UserError, match=r"config\.attention: fused attention has no dropout; set attention_dropout"):
        jax.eval_shape(required.hidden, params, batch, key)
    jax.eval_shape(required.hidden, params, batch)  # no dropout outside of training


def test_row_lengths_that_a_kernel_does_not_support():
    assert computes(TRITON, 192, False)
    assert not computes(TRITON._replace(required=False), 100, False)
    with pytest.raises(UserError, match=r"rows of a multiple of 128 tokens, not 192; change rows\.length, or use auto"):
        computes(SPLASH, 192, False)
    assert not computes(Kernel("splash"), 128, False)  # several devices and no mesh


def test_the_setting_means_the_kernel_of_the_mesh():
    def on(platform: str) -> jax.sharding.Mesh:
        device = types.SimpleNamespace(platform=platform)
        return types.SimpleNamespace(devices=np.array([device]))  # pyright: ignore[reportReturnType]

    kinds = [find_kernel("auto", on(platform)).name for platform in ("cpu", "gpu", "tpu")]
    assert kinds == ["plain", "triton", "splash"]
    assert find_kernel("plain", on("tpu")) == PLAIN
    assert find_kernel("fused", on("gpu")) == Kernel("triton", True)
    assert find_kernel("fused", on("cpu")) == TRITON
