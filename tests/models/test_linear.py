"""Linear layers and layer normalization."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kd_jax.models.encoder_config import ACTIVATIONS
from kd_jax.models.linear import LayerNorm, Linear, product
from tests.support.small_models import small_config


@pytest.mark.parametrize("inputs, outputs", [((6,), (5,)), ((6,), (3, 2, 4)), ((3, 2), (5,)), ((3, 2), (2, 2))])
@pytest.mark.parametrize("leading", [(7,), (4, 3)])
def test_product_and_its_gradients(inputs, outputs, leading):
    rng = np.random.default_rng(0)
    x, kernel, cotangent = (
        rng.normal(size=s) for s in ((*leading, *inputs), (*inputs, *outputs), (*leading, *outputs))
    )
    size = np.prod(inputs)
    flat_x, flat_kernel, flat_cotangent = (
        x.reshape(-1, size),
        kernel.reshape(size, -1),
        cotangent.reshape(-1, np.prod(outputs)),
    )
    value, pull = jax.vjp(
        lambda x, kernel: product(x, kernel, len(inputs)), x.astype(np.float32), kernel.astype(np.float32)
    )
    by_x, by_kernel = pull(jnp.asarray(cotangent, jnp.float32))
    np.testing.assert_allclose(value, (flat_x @ flat_kernel).reshape(cotangent.shape), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_x, (flat_cotangent @ flat_kernel.T).reshape(x.shape), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_kernel, (flat_x.T @ flat_cotangent).reshape(kernel.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_in_bfloat16_has_float32_parameters_and_gradients(bias):
    layer = Linear((4,), (2, 3), (None, None, None), bias=bias, std=0.5, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.bfloat16)

    def total(layer):
        y = layer(x)
        assert y.dtype == jnp.bfloat16 and y.shape == (5, 2, 3)
        return jnp.sum(y.astype(jnp.float32))

    gradient = nnx.grad(total)(layer)
    assert gradient["kernel"][...].dtype == jnp.float32
    expected = np.asarray(x, np.float32).sum(0)[:, None, None] * np.ones((2, 3), np.float32)
    np.testing.assert_allclose(gradient["kernel"][...], expected, rtol=2e-2, atol=2e-2)
    if bias:
        np.testing.assert_array_equal(gradient["bias"][...], 5.0)


@pytest.mark.parametrize("family", ["bert", "modernbert"])  # with and without a bias
def test_layer_norm_against_float64(family):
    config = small_config(family)
    norm = LayerNorm(config)
    rng = np.random.default_rng(2)
    scale = rng.normal(size=config.hidden_size)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    x = rng.normal(3, 2, (5, config.hidden_size))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon) * scale
    if config.norm_bias:
        bias = rng.normal(size=config.hidden_size)
        norm.bias[...] = jnp.asarray(bias, jnp.float32)
        expected += bias
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-4, atol=1e-5)
    assert norm(jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


def test_gelu_against_float64():
    scipy_special = pytest.importorskip("scipy.special")
    x = np.linspace(-12, 12, 2001)
    expected = x * scipy_special.ndtr(x)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.asarray(x, jnp.float32)), expected, atol=1e-6, rtol=1e-6)
    rounded = jnp.asarray(x, jnp.bfloat16)
    expected = np.asarray(rounded, np.float64) * scipy_special.ndtr(np.asarray(rounded, np.float64))
    actual = ACTIVATIONS["gelu"](rounded)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=5e-3, atol=2e-6)
