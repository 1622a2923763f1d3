import numpy as np
import pytest

from kd_jax.data.permutation import counter_keys, name_key, permute, splitmix64


def test_splitmix64_matches_the_published_sequence():
    # First outputs of the generator seeded with 1234567, from its reference implementation.
    states = 1234567 + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 1000, 65536, 65537])
def test_is_a_bijection(size):
    index = np.arange(size)
    result = permute(index, size, np.full(size, name_key("key", size), np.uint64))
    np.testing.assert_array_equal(np.sort(result), index)


def test_sizes_and_keys_may_differ_by_element():
    sizes = np.array([3, 1000, 7, 65537])
    keys = counter_keys(5, np.arange(4))
    mixed = permute(np.array([2, 999, 0, 65536]), sizes, keys)
    alone = [permute(np.array([i]), s, k[None])[0] for i, s, k in zip([2, 999, 0, 65536], sizes, keys)]
    np.testing.assert_array_equal(mixed, alone)


def test_keys_give_different_orders_without_visible_pattern():
    index = np.arange(1000)
    orders = [permute(index, 1000, np.full(1000, name_key(seed), np.uint64)) for seed in range(20)]
    for order in orders:
        assert abs(np.corrcoef(index, order)[0, 1]) < 0.15
        assert np.mean(np.diff(order) == 1) < 0.02
    # Over many keys each index goes everywhere equally often: about 1/10 of the orders send index 7 into each tenth.
    keys = counter_keys(9, np.arange(20000))
    tenths = np.bincount(permute(np.full(20000, 7), 1000, keys) // 100, minlength=10)
    assert np.all(np.abs(tenths - 2000) < 5 * np.sqrt(2000))


def test_large_sizes_stay_inside():
    size = 2**40 + 12345
    index = np.arange(size - 1000, size)
    result = permute(index, size, np.full(1000, 3, np.uint64))
    assert result.min() >= 0 and result.max() < size and len(np.unique(result)) == 1000


def test_counter_keys_depend_on_the_order_of_counters():
    a, b = np.arange(100), np.arange(100)[::-1].copy()
    assert len(np.unique(counter_keys(1, a, b))) == 100
    assert not np.intersect1d(counter_keys(1, a, b)[:50], counter_keys(1, b, a)[:50]).size
    assert not np.intersect1d(counter_keys(1, a), counter_keys(2, a)).size


def test_all_orders_of_three_are_about_equally_likely():
    keys = np.repeat(counter_keys(3, np.arange(6000)), 3)
    orders = permute(np.tile(np.arange(3), 6000), 3, keys).reshape(-1, 3)
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 6 and np.all(np.abs(counts - 1000) < 150)
