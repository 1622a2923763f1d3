import itertools

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from kd_jax.evaluation.similarity import jensen_shannon, matched_jsd, rank_correlation, similarity, vocabulary_overlap
from kd_jax.types import UserError


def test_jsd_by_hand():
    # p = (1, 0), q = (1/2, 1/2): mixture (3/4, 1/4); (log2(4/3) + (log2(2/3) + log2(2)) / 2) / 2 = 0.311278
    assert jensen_shannon(np.array([4, 0]), np.array([3, 3])) == pytest.approx(0.3112781244591328, abs=1e-12)
    assert jensen_shannon(np.array([4, 0]), np.array([0, 7])) == 1.0
    assert jensen_shannon(np.array([2, 4, 0]), np.array([1, 2, 0])) == 0.0
    assert jensen_shannon(np.array([0, 0]), np.array([1, 2])) is None


def test_jsd_is_the_square_of_scipys_distance_and_symmetric():
    rng = np.random.default_rng(0)
    a, b = rng.poisson(2, 500), rng.poisson(3, 500)
    assert jensen_shannon(a, b) == pytest.approx(jensenshannon(a, b, base=2) ** 2, abs=1e-12)
    assert jensen_shannon(a, b) == pytest.approx(jensen_shannon(b, a), abs=1e-15)


def test_overlap_takes_as_many_types_from_each_text():
    a, b = np.array([9, 5, 1, 0, 0]), np.array([9, 0, 6, 5, 1])
    assert vocabulary_overlap(a, b, top=2) == 0.5  # {0, 1} and {0, 2}
    assert vocabulary_overlap(a, b) == pytest.approx(2 / 3)  # {0, 1, 2} and {0, 2, 3}
    assert vocabulary_overlap(a, np.zeros(5, int)) is None


def test_matching_sizes_takes_the_size_out_of_the_divergence():
    # All three texts come from one distribution, so any difference in divergence is the sample size's.
    rng = np.random.default_rng(1)
    p = 1 / np.arange(1, 2001)
    small, large, generic = (rng.multinomial(n, p / p.sum()) for n in (500, 20_000, 200_000))
    of_small, of_large = jensen_shannon(small, generic), jensen_shannon(large, generic)
    assert of_small is not None and of_large is not None
    assert of_small > 5 * of_large
    matched = [matched_jsd(text, generic, 500, seed=0) for text in (small, large)]
    assert matched[0] == pytest.approx(matched[1], rel=0.1)
    assert matched_jsd(large, generic, 500, seed=0) == matched[1] != matched_jsd(large, generic, 500, seed=1)


def test_drawing_keeps_the_size_and_takes_no_more_than_there_is():
    a = np.array([3, 0, 2])
    assert matched_jsd(a, a, 5, seed=0) == 0.0  # the whole text each time
    assert matched_jsd(a, a, 6, seed=0) is None
    huge = np.array([2 * 10**9, 10**9])  # more than can be drawn without replacement
    same = matched_jsd(huge, huge, 10_000, seed=0)
    assert same is not None and 0 <= same < 1e-3


def test_interface_by_name():
    a, b = np.array([4, 0]), np.array([3, 3])
    assert similarity("jsd", a, b) == jensen_shannon(a, b)
    assert similarity("overlap", a, b) == vocabulary_overlap(a, b)
    with pytest.raises(UserError, match="jsd, overlap"):
        similarity("cosine", a, b)
    with pytest.raises(ValueError, match="one vocabulary"):
        similarity("jsd", a, np.ones(3, int))
    with pytest.raises(ValueError, match="negative"):
        similarity("jsd", a, np.array([1, -1]))


def test_rank_correlation_against_scipy_and_all_orders():
    x, y = np.array([1.0, 2, 3, 4, 50]), np.array([2.0, 1, 4, 3, 90])  # only the order counts
    got = rank_correlation(x, y)
    assert got.rho == pytest.approx(0.8) and got.count == 5
    orders = [abs(spearmanr(x, y[list(order)]).statistic) for order in itertools.permutations(range(5))]
    assert got.p_value == pytest.approx(np.mean(np.array(orders) >= 0.8 - 1e-12))
    assert got.low is not None and got.rho is not None and got.high is not None
    assert -1 <= got.low <= got.rho <= got.high <= 1


def test_rank_correlation_of_many_domains():
    rng = np.random.default_rng(2)
    x = rng.normal(size=40)
    strong = rank_correlation(x, x + 0.3 * rng.normal(size=40), permutations=500, resamples=500)
    assert strong.low > 0.7 and strong.p_value < 0.01
    none = rank_correlation(x, rng.normal(size=40), permutations=500, resamples=500)
    assert none.low is not None and none.high is not None
    assert none.low < 0 < none.high and none.p_value > 0.05


def test_rank_correlation_undefined():
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) == (None, None, None, None, 2)
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]).rho is None
