"""Similarity of two texts from token counts, and the rank correlation of two measurements over domains.

Counts are arrays [V] over one vocabulary. The plug-in Jensen-Shannon divergence grows as samples shrink, because small
samples lack rare tokens. So domains of different sizes are comparable only after sampling both texts down to one number
of tokens: `similarity(..., size=...)` does that.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from kd_jax.types import UserError

# Above this many tokens NumPy cannot draw without replacement; with replacement makes no practical difference then.
_LARGEST_URN = 10**9


def jensen_shannon(counts_a: np.ndarray, counts_b: np.ndarray) -> float | None:
    """Jensen-Shannon divergence in bits, in [0, 1]: 0 for equal, 1 for disjoint texts; None if a text is empty.

    JSD(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 with equal weights (Lin 1991, "Divergence measures based on the
    Shannon entropy", IEEE Transactions on Information Theory 37(1)), computed as the mean of the two KL divergences to
    the mixture. A token absent from a text contributes 0 there, so no smoothing is needed.
    """
    a, b = _pair(counts_a, counts_b)
    if not a.sum() or not b.sum():
        return None
    p, q = a / a.sum(), b / b.sum()
    mixture = (p + q) / 2
    bits = 0.0
    for side in (p, q):
        present = side > 0
        bits += 0.5 * float(np.sum(side[present] * np.log2(side[present] / mixture[present])))
    return min(max(bits, 0.0), 1.0)


def vocabulary_overlap(counts_a: np.ndarray, counts_b: np.ndarray, top: int = 10_000) -> float | None:
    """Share in [0, 1] of the most frequent token types that two texts have in common; None if a text is empty.

    k types of each text are compared, k the smallest of `top` and the two numbers of types, so that a short text is
    not compared with a long one's whole vocabulary; ties go to the lower id. After the overlap of the most frequent
    unigrams in Gururangan et al. 2020, "Don't Stop Pretraining".
    """
    a, b = _pair(counts_a, counts_b)
    k = min(top, np.count_nonzero(a), np.count_nonzero(b))
    if k == 0:
        return None
    frequent_a, frequent_b = (np.argsort(-counts, kind="stable")[:k] for counts in (a, b))
    return len(np.intersect1d(frequent_a, frequent_b)) / k


# Add a measure here. "jsd" falls and "overlap" rises with similarity.
MEASURES: dict[str, Callable[[np.ndarray, np.ndarray], float | None]] = {
    "jsd": jensen_shannon,
    "overlap": vocabulary_overlap,
}


def similarity(
    measure: str, counts_a: np.ndarray, counts_b: np.ndarray, *, size: int = 0, seed: int = 0, repeats: int = 10
) -> float | None:
    """A named measure of two texts' token counts [V].

    size > 0 samples `size` tokens of each text without replacement, `repeats` times, and averages; None if a text has
    fewer tokens or is empty. Raises UserError for an unknown measure, ValueError for counts that
    are negative or of unequal length.
    """
    if measure not in MEASURES:
        raise UserError(f"similarity measure {measure!r} is unknown; use one of {', '.join(MEASURES)}")
    a, b = _pair(counts_a, counts_b)
    if size <= 0:
        return MEASURES[measure](a, b)
    if a.sum() < size or b.sum() < size:
        return None
    rng = np.random.default_rng(seed)
    values = [MEASURES[measure](_draw(rng, a, size), _draw(rng, b, size)) for _ in range(repeats)]
    return float(np.mean(np.array(values, np.float64)))


def matched_jsd(counts_a: np.ndarray, counts_b: np.ndarray, size: int, seed: int, repeats: int = 10) -> float | None:
    """Jensen-Shannon divergence at `size` tokens of each text, averaged over draws; None if a text has fewer."""
    return similarity("jsd", counts_a, counts_b, size=size, seed=seed, repeats=repeats)


class RankCorrelation(NamedTuple):
    """Spearman's rho, two-sided permutation p-value, bootstrap interval over the pairs; None if undefined."""

    rho: float | None
    p_value: float | None
    low: float | None
    high: float | None
    count: int


def rank_correlation(
    x: np.ndarray,
    y: np.ndarray,
    *,
    permutations: int = 10_000,
    resamples: int = 2_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RankCorrelation:
    """Spearman's rank correlation of two measurements over domains, float [n] each.

    The p-value is exact over all orders if there are at most `permutations` of them, else it comes from that many
    random orders and the observed one. The interval is a percentile bootstrap over domains, rough with fewer than about
    ten of them. Everything is None for fewer than three domains or a constant measurement.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"measurements of shapes {x.shape} and {y.shape}; they must be paired")
    count = len(x)
    if count < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return RankCorrelation(None, None, None, None, count)
    ranks_x, ranks_y = stats.rankdata(x), stats.rankdata(y)
    test = stats.permutation_test(
        (ranks_x,),
        lambda ranks, axis: _pearson(ranks, ranks_y),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=permutations,
        rng=np.random.default_rng(seed),
    )
    draws = np.random.default_rng(seed).integers(0, count, (resamples, count))
    resampled = _pearson(stats.rankdata(x[draws], axis=1), stats.rankdata(y[draws], axis=1))
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(resampled, [tail, 1 - tail])  # NaN: a resample that drew one value only
    return RankCorrelation(float(_pearson(ranks_x, ranks_y)), float(test.pvalue), float(low), float(high), count)


def _pearson(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Correlation along the last axis; NaN if a side is constant."""
    a = a - a.mean(axis=-1, keepdims=True)
    b = b - b.mean(axis=-1, keepdims=True)
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    return np.divide((a * b).sum(axis=-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def _draw(rng: np.random.Generator, counts: np.ndarray, size: int) -> np.ndarray:
    if counts.sum() >= _LARGEST_URN:
        return rng.multinomial(size, counts / counts.sum())
    present = np.flatnonzero(counts)
    drawn = np.zeros_like(counts)
    drawn[present] = rng.multivariate_hypergeometric(counts[present], size, method="marginals")
    return drawn


def _pair(counts_a: np.ndarray, counts_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(counts_a), np.asarray(counts_b)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"counts of shapes {a.shape} and {b.shape}; both must be over one vocabulary")
    if (a < 0).any() or (b < 0).any():
        raise ValueError("counts must not be negative")
    return a, b
