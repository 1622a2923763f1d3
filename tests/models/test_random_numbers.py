"""Rates, moments and independence of the hashed random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

from kd_jax.models.random_numbers import drop, random_bits, truncated_normal


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
