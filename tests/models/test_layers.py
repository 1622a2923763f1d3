"""Linear layers, layer normalization, and rates, moments and independence of the hashed random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flax import nnx

from kd_jax.models.layers import (
    ACTIVATIONS,
    LayerNorm,
    Linear,
    drop,
    product,
    random_bits,
    recomputed,
    truncated_normal,
)
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
    np.testing.assert_allclose(np.asarray(value), (flat_x @ flat_kernel).reshape(cotangent.shape), rtol=1e-4, atol=1e-5)
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


def test_dropout_masks_have_their_rate_and_are_independent():
    size, rate = 200_000, 0.3
    masks = [
        np.asarray(drop(jnp.ones((size // 100, 100)), rate, jax.random.key(seed), site) > 0).ravel()
        for seed, site in ((0, 0), (0, 1), (1, 0), (2, 7))
    ]
    kept = np.asarray(drop(jnp.ones(size), rate, jax.random.key(0), 0))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / (1 - rate))}
    deviation = np.sqrt(rate * (1 - rate) / size)
    for index, mask in enumerate(masks):
        assert abs(mask.mean() - (1 - rate)) < 5 * deviation
        for shift in (1, 2, 100):  # neighbors, and the row below
            assert abs(np.corrcoef(mask[shift:], mask[:-shift])[0, 1]) < 5 / np.sqrt(size)
        for other in masks[:index]:
            assert abs(np.corrcoef(mask, other)[0, 1]) < 5 / np.sqrt(size)


def test_bits_are_uniform():
    bits = np.asarray(random_bits(jax.random.key(0), (1000, 200)))
    assert bits.dtype == np.uint32
    for shift in (0, 8, 16, 24):
        counts = np.bincount((bits.ravel() >> shift) & 255, minlength=256)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert len(np.unique(bits)) > 0.9999 * bits.size


def test_keys_that_differ_by_little_give_unrelated_bits():
    # Keys of the steps of a run differ in a few bits; XOR of their streams must look random too.
    first = np.asarray(random_bits(jax.random.wrap_key_data(jnp.array([0, 1], jnp.uint32)), (100_000,)))
    for words in ([0, 2], [1, 1], [1 << 31, 1]):
        other = np.asarray(random_bits(jax.random.wrap_key_data(jnp.array(words, jnp.uint32)), (100_000,)))
        counts = np.bincount((first ^ other) & 255, minlength=256)
        assert scipy.stats.chisquare(counts).pvalue > 1e-4


def test_truncated_normal_follows_its_distribution():
    sample = np.asarray(truncated_normal(jax.random.key(3), (50_000,), 0.02), np.float64)
    assert np.abs(sample).max() <= 0.04
    assert scipy.stats.kstest(sample / 0.02, scipy.stats.truncnorm(-2, 2).cdf).pvalue > 1e-3


def test_numbers_do_not_depend_on_the_sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    key = jax.random.key(1)

    def sample(key):
        return truncated_normal(key, (64, 3), 1.0)

    split = jax.jit(sample, out_shardings=sharding)(key)
    assert len(split.sharding.device_set) == 8
    np.testing.assert_array_equal(split, jax.jit(sample)(key))


def test_recomputed_saves_only_its_arguments_in_bfloat16():
    def function(x, scale):
        wide = x.astype(jnp.float32)
        return (jnp.tanh(wide) * jnp.sin(wide) * scale[None]).astype(x.dtype)

    x = jnp.linspace(-2, 2, 600).reshape(20, 30)
    scale = jnp.linspace(0.5, 1.5, 30)

    def kept_and_gradients(function, x):
        y, pull = jax.vjp(function, x, scale)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(pull)), pull(jnp.ones_like(y))

    narrow = x.astype(jnp.bfloat16)
    kept, gradients = kept_and_gradients(recomputed(function), narrow)
    assert kept == narrow.nbytes + scale.nbytes
    more, wanted = kept_and_gradients(function, narrow)
    assert more > 3 * kept
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(one, np.float32), np.asarray(other, np.float32))
    assert kept_and_gradients(recomputed(function), x)[0] == kept_and_gradients(function, x)[0]
