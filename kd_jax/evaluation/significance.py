"""Is a difference between students more than chance? Seeds, utterances, and many comparisons at once.

What the numbers cover. A student's error rate varies with its seed (initialization, data order, finetuning) and with
the utterances that happen to be in the test set. `compare` covers both: its standard error comes from resampling seeds
and utterances, and its interval is a t interval whose degrees of freedom (Satterthwaite 1946) lie near seeds - 1 where
the seeds make most of the variance and near utterances - 1 where the utterances do. A plain percentile bootstrap over
three seeds would be far too narrow: it cannot leave the range of the three. In simulations (binary errors, 3 or 5
seeds, 300 or 2000 utterances, seed noise from none to overwhelming) its nominal 95 % intervals held the true
difference in 91 to 100 % of runs: at three noisy seeds they are a little too narrow, and where seeds agree too wide.
The interval does not cover what all seeds share: the teacher, the transfer set's own texts, the finetuning recipe, the
languages. With one seed only the utterances are covered. `randomization_test` is about these very models: it covers
utterances only.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from kd_jax.evaluation.records import Record
from kd_jax.evaluation.results import TERMS

MINIMUM_SEEDS = 3


class ErrorCounts(NamedTuple):
    """An error rate taken apart: rate of a seed = sum of numerators / sum of denominators over utterances.

    numerator, denominator: float [S, N], S seeds and N utterance ids (locales of one id are summed, since parallel
    utterances are not independent); seeds int [S]; ids [N] names.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    seeds: tuple[int, ...]
    ids: tuple[str, ...]

    @property
    def rates(self) -> np.ndarray:
        """Error rate of each seed, float [S]."""
        return self.numerator.sum(axis=1) / self.denominator.sum(axis=1)


class Interval(NamedTuple):
    """Mean and spread over seeds; low and high are None for a single seed."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    count: int


class Difference(NamedTuple):
    """Error rate of a minus that of b (mean over common seeds), or its relative change; negative means a is better."""

    difference: float
    low: float
    high: float
    p_value: float
    relative: float | None
    relative_low: float | None
    relative_high: float | None
    rate_a: float
    rate_b: float
    seeds: int
    utterances: int


class Verdict(NamedTuple):
    """winner is None when the best is not told apart from all others; `tied` are the best and those like it."""

    winner: str | None
    best: str
    tied: tuple[str, ...]
    comparisons: dict[str, Difference]
    adjusted: dict[str, float]
    text: str


def error_counts(
    records: Mapping[int, Sequence[Record]], metric: str, *, test_set: str, locale: str = "all", domain: str = "all"
) -> ErrorCounts | None:
    """An error rate taken apart, from each seed's records; None where nothing is in scope or a rate is undefined.

    metric is a name of results.TERMS for the records' task. Raises ValueError when the seeds were tested on different
    utterances.
    """
    rows = []
    for seed in sorted(records):
        sums: dict[str, list[float]] = {}
        for record in records[seed]:
            inside = locale in ("all", record["locale"]) and domain in ("all", record["domain"])
            if inside and test_set in record["test_sets"]:
                numerator, denominator = TERMS[record["task"]][metric](record)
                total = sums.setdefault(record["id"], [0.0, 0.0])
                total[0] += numerator
                total[1] += denominator
        rows.append(sums)
    if not rows or not rows[0]:
        return None
    ids = tuple(sorted(rows[0]))
    if any(sums.keys() != rows[0].keys() for sums in rows):
        raise ValueError(f"seeds {sorted(records)} were tested on different utterances of {test_set}")
    table = np.array([[sums[name] for name in ids] for sums in rows])
    if (table[..., 1].sum(axis=1) == 0).any():
        return None
    return ErrorCounts(table[..., 0], table[..., 1], tuple(sorted(records)), ids)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean, sample standard deviation and Student's t interval of the mean over seeds, test set taken as fixed."""
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError("an interval needs at least one value")
    mean, count = float(array.mean()), len(array)
    if count == 1:
        return Interval(mean, None, None, None, 1)
    deviation = float(array.std(ddof=1))
    half = float(stats.t.ppf((1 + confidence) / 2, count - 1)) * deviation / count**0.5
    return Interval(mean, deviation, mean - half, mean + half, count)


def compare(
    a: ErrorCounts, b: ErrorCounts, *, confidence: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> Difference:
    """Paired hierarchical bootstrap of two students over common seeds and utterances.

    Each replicate draws seeds, then utterance ids (one draw for all seeds and both students, since all are tested on
    the same utterances), with replacement. Seeds' deviations are stretched by sqrt(S / (S - 1)), since S draws out of
    S show only that share of the variance. The interval is estimate -+ t * standard deviation of the replicates; see
    the top of this file for the degrees of freedom; p_value is two-sided from the same t. relative is the change
    against b, None where b makes no error.
    """
    a, b = _common(a, b)
    estimate_a, estimate_b = a.rates, b.rates
    difference = float(np.mean(estimate_a - estimate_b))
    rate_a, rate_b = float(estimate_a.mean()), float(estimate_b.mean())

    rng = np.random.default_rng(seed)
    utterance_weights = _resample_weights(rng, resamples, len(a.ids))
    seed_weights = _stretched(_resample_weights(rng, resamples, len(a.seeds)) / len(a.seeds))
    drawn_a = (seed_weights * _resampled_rates(a, utterance_weights)).sum(axis=1)
    drawn_b = (seed_weights * _resampled_rates(b, utterance_weights)).sum(axis=1)
    size = len(a.ids)
    low, high, p_value = _t_interval(difference, drawn_a - drawn_b, estimate_a - estimate_b, size, confidence)

    relative = relative_low = relative_high = None
    if rate_b > 0:
        # First order in the errors: a/b - 1 moves as (a - (a/b) b) / b.
        ratio = rate_a / rate_b
        relative = ratio - 1
        replicates = (drawn_a - ratio * drawn_b) / rate_b
        relative_low, relative_high, _ = _t_interval(
            relative, replicates, (estimate_a - ratio * estimate_b) / rate_b, size, confidence
        )
    sizes = (len(a.seeds), len(a.ids))
    return Difference(difference, low, high, p_value, relative, relative_low, relative_high, rate_a, rate_b, *sizes)


def randomization_test(a: ErrorCounts, b: ErrorCounts, *, permutations: int = 10_000, seed: int = 0) -> float:
    """Two-sided p-value of approximate randomization (Noreen 1989): students swap outputs on random utterances.

    An utterance is swapped in all seeds at once. The null hypothesis is about these trained models, not about other
    seeds.
    """
    a, b = _common(a, b)
    swaps = np.random.default_rng(seed).integers(0, 2, (permutations, len(a.ids))).astype(np.float64)

    def swapped(x: ErrorCounts, y: ErrorCounts) -> np.ndarray:
        numerator = x.numerator.sum(axis=1) + swaps @ (y.numerator - x.numerator).T
        denominator = x.denominator.sum(axis=1) + swaps @ (y.denominator - x.denominator).T
        return (numerator / np.where(denominator > 0, denominator, 1)).mean(axis=1)

    observed = abs(float(np.mean(a.rates - b.rates)))
    # Rounding must not make an equal difference look smaller than the observed one.
    extreme = np.abs(swapped(a, b) - swapped(b, a)) >= observed - 1e-12
    return float((1 + extreme.sum()) / (1 + permutations))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given; they bound the chance of a false finding."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def compare_all(
    candidates: Mapping[str, ErrorCounts],
    reference: str,
    *,
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> tuple[dict[str, Difference], dict[str, float]]:
    """`compare` of each other candidate with the reference (candidate minus reference), and Holm-adjusted p-values."""
    differences = {
        name: compare(counts, candidates[reference], confidence=confidence, resamples=resamples, seed=seed)
        for name, counts in candidates.items()
        if name != reference
    }
    adjusted = holm([item.p_value for item in differences.values()])
    return differences, dict(zip(differences, adjusted))


def verdict(
    candidates: Mapping[str, ErrorCounts], *, confidence: float = 0.95, resamples: int = 1_000, seed: int = 0
) -> Verdict:
    """Which transfer set won, or that none did.

    Rule: the candidate with the lowest mean error rate is compared with each other candidate (`compare`); it has won
    only when each comparison rests on at least three seeds and has a Holm-adjusted p-value below 1 - confidence, so
    that its interval leaves out zero even after the correction. Otherwise there is no winner at this size. Raises
    ValueError for fewer than two candidates.
    """
    if len(candidates) < 2:
        raise ValueError("a verdict needs at least two candidates")
    rates = {name: float(counts.rates.mean()) for name, counts in candidates.items()}
    best = min(rates, key=rates.__getitem__)
    comparisons, adjusted = compare_all(candidates, best, confidence=confidence, resamples=resamples, seed=seed)
    fewest = min(item.seeds for item in comparisons.values())
    ranked = sorted(comparisons, key=rates.__getitem__)
    apart = {name for name in ranked if adjusted[name] < 1 - confidence}
    tied = (best, *(name for name in ranked if name not in apart))
    rival = comparisons[ranked[0]]
    basis = f"{fewest} seed" if fewest == 1 else f"{fewest} seeds"
    against = (
        f"{best} {rates[best]:.4f}, next {ranked[0]} {rates[ranked[0]]:.4f} "
        f"(+{rival.difference:.4f}, {confidence:.0%} interval {rival.low:+.4f} to {rival.high:+.4f}, {basis})"
    )
    if fewest < MINIMUM_SEEDS:
        return Verdict(
            None,
            best,
            tied,
            comparisons,
            adjusted,
            f"no winner at this size: fewer than {MINIMUM_SEEDS} seeds; {against}",
        )
    if len(tied) > 1:
        text = f"no winner at this size: {', '.join(tied)} are not told apart; {against}"
        return Verdict(None, best, tied, comparisons, adjusted, text)
    return Verdict(best, best, tied, comparisons, adjusted, f"{best} wins: {against}")


def _common(a: ErrorCounts, b: ErrorCounts) -> tuple[ErrorCounts, ErrorCounts]:
    """Both restricted to the seeds they share; raises ValueError when there are none or the utterances differ."""
    if a.ids != b.ids:
        raise ValueError("the students were tested on different utterances")
    shared = [seed for seed in a.seeds if seed in b.seeds]
    if not shared:
        raise ValueError(f"no seed in common: {a.seeds} and {b.seeds}")

    def pick(counts: ErrorCounts) -> ErrorCounts:
        rows = [counts.seeds.index(seed) for seed in shared]
        return ErrorCounts(counts.numerator[rows], counts.denominator[rows], tuple(shared), counts.ids)

    return pick(a), pick(b)


def _resample_weights(rng: np.random.Generator, resamples: int, size: int) -> np.ndarray:
    """How often each of `size` items is drawn in each resample with replacement, float [resamples, size]."""
    draws = rng.integers(0, size, (resamples, size)) + size * np.arange(resamples)[:, None]
    return np.bincount(draws.ravel(), minlength=resamples * size).reshape(resamples, size).astype(np.float64)


def _stretched(weights: np.ndarray) -> np.ndarray:
    size = weights.shape[1]
    return 1 / size + (weights - 1 / size) * (size / (size - 1)) ** 0.5 if size > 1 else weights


def _resampled_rates(counts: ErrorCounts, weights: np.ndarray) -> np.ndarray:
    """Error rate of each seed on each resample of the utterances, float [resamples, S]."""
    numerator, denominator = weights @ counts.numerator.T, weights @ counts.denominator.T
    # A resample without any denominator (tiny test sets of slots) falls back on the observed rate.
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), counts.rates)


def _t_interval(
    estimate: float, replicates: np.ndarray, by_seed: np.ndarray, utterances: int, confidence: float
) -> tuple[float, float, float]:
    """Interval and two-sided p-value from bootstrap replicates [R] and the seeds' own estimates [S]."""
    variance = float(replicates.var(ddof=1))
    if variance < 1e-24:  # every utterance and seed says the same: the p-value of a sign test
        return estimate, estimate, 1.0 if abs(estimate) < 1e-12 else 0.5 ** (utterances - 1)
    seeds = len(by_seed)
    from_seeds = min(float(by_seed.var(ddof=1)) / seeds, variance) if seeds > 1 else 0.0
    spread = from_seeds**2 / max(seeds - 1, 1) + (variance - from_seeds) ** 2 / max(utterances - 1, 1)
    freedom = variance**2 / spread
    half = float(stats.t.ppf((1 + confidence) / 2, freedom)) * variance**0.5
    return estimate - half, estimate + half, float(2 * stats.t.sf(abs(estimate) / variance**0.5, freedom))
