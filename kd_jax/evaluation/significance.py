"""Is a difference between students more than chance? Over seeds and utterances, and for many comparisons at once.

A student's error rate varies with its seed (initialization, data order, finetuning) and with the utterances that
happen to be in the test set. `compare` and `trend` cover both. The variance of an estimate is that over utterances (of
the mean difference, since all students see the same ones) plus that over seeds (each student's own, which may differ
tenfold), minus what both count: the noise of single answers, estimated from how differently the seeds answer the same
utterance. Ratios are linearized. The interval is a t interval whose degrees of freedom (Satterthwaite 1946, as in
Welch's test) are few if seeds cause most of the variance, and many if utterances do; it is never narrower than that of
the seeds alone. It does not cover what all seeds share: the teacher, the transfer set's own texts, the finetuning
recipe, the languages. The variance over seeds is not covered for a student with one seed; a baseline without a seed has
none.

In simulated studies (tests/evaluation/test_simulated_studies.py; 500 or 2000 utterances, 3 or 5 seeds that spread by 0
to 7 points, in one student up to three times as far) five equal students and n-grams were reported to differ in 2.1 to
5.5 % of 2,000 studies of each kind, at a nominal 5 %. docs/comparisons.md has the power.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy import special

from kd_jax.data.text.utterances import SharedIds, shared_ids
from kd_jax.evaluation.records import Record
from kd_jax.evaluation.results import TERMS

MINIMUM_SEEDS = 3
CONFIDENCE = 0.95  # of all intervals; a difference is significant if its p-value is below the rest
LOWER, HIGHER, UNDECIDED = "lower", "higher", "undecided"

Name = TypeVar("Name", bound=Hashable)


class ErrorCounts(NamedTuple):
    """The terms of an error rate: rate of a seed = sum of numerators / sum of denominators over utterances.

    numerator, denominator: float [S, N] for S seeds and N ids. Utterances that are translations of each other share an
    id and are summed, because they are not independent. A deterministic model has seeds (None,).
    """

    numerator: np.ndarray
    denominator: np.ndarray
    seeds: tuple[int | None, ...]
    ids: tuple[str, ...]

    @property
    def rates(self) -> np.ndarray:
        """Error rate of each seed, float [S]."""
        return self.numerator.sum(axis=1) / self.denominator.sum(axis=1)

    @property
    def seedless(self) -> bool:
        """Whether the model has no seed."""
        return self.seeds == (None,)


class SeedMean(NamedTuple):
    """Mean and sample standard deviation over seeds; deviation is None for a single seed."""

    mean: float
    deviation: float | None


class Difference(NamedTuple):
    """Error rate of a minus that of b (means over seeds), or its relative change; negative means a is better.

    seeds: of the student that has fewer; a model without a seed is compared with every seed of the other, and two such
    models give 0.
    """

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


class Trend(NamedTuple):
    """Slope of the error rate along a share: the change from share 0 to share 1 on a straight line."""

    slope: float
    low: float
    high: float
    p_value: float
    seeds: int
    utterances: int


class Decision(NamedTuple):
    """A comparison, its p-value adjusted for all decided together, and its status: LOWER, HIGHER or UNDECIDED."""

    difference: Difference
    adjusted: float
    status: str


def parallel_ids(records: Iterable[Record]) -> SharedIds:
    """The ids that locales share in records, and whether they are translations of each other."""
    return shared_ids((record["id"], record["locale"], record["intent"]) for record in records)


def error_counts(
    records: Mapping[Any, Sequence[Record]],
    metric: str,
    *,
    test_set: str,
    locale: str = "all",
    domain: str = "all",
    parallel: bool | None = None,
) -> ErrorCounts | None:
    """The terms of an error rate from each seed's records; None if nothing is in scope or a rate is undefined.

    records: seed -> records, the only key is None for a model without a seed. metric is a key of results.TERMS for the
    records' task. parallel: whether records of one id are translations, which count together; None infers it from their
    intents (`parallel_ids`). Raises ValueError if the seeds were tested on different utterances.
    """
    seeds = tuple(records) if None in records else tuple(sorted(seed for seed in records if seed is not None))
    if parallel is None:
        parallel = not records or parallel_ids(records[seeds[0]]).parallel
    rows = []
    for seed in seeds:
        sums: dict[str, list[float]] = {}
        for record in records[seed]:
            inside = locale in ("all", record["locale"]) and domain in ("all", record["domain"])
            if inside and test_set in record["test_sets"]:
                numerator, denominator = TERMS[record["task"]][metric](record)
                name = record["id"] if parallel else f"{record['locale']} {record['id']}"
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += numerator
                total[1] += denominator
        rows.append(sums)
    if not rows or not rows[0]:
        return None
    ids = tuple(sorted(rows[0]))
    if any(sums.keys() != rows[0].keys() for sums in rows):
        raise ValueError(f"seeds {list(seeds)} were tested on different utterances of {test_set}")
    table = np.array([[sums[name] for name in ids] for sums in rows])
    if (table[..., 1].sum(axis=1) == 0).any():
        return None
    return ErrorCounts(table[..., 0], table[..., 1], seeds, ids)


def over_seeds(values: Sequence[float]) -> SeedMean:
    """Mean and spread of a metric over seeds; raises ValueError without any."""
    if not len(values):
        raise ValueError("a mean over seeds needs at least one value")
    array = np.asarray(values, np.float64)
    return SeedMean(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None)


def error_rate(one: ErrorCounts) -> tuple[float, float, float] | None:
    """(error rate, low, high) of one student, over its seeds and the utterances as in `compare`; None if there is
    neither a second seed nor a second utterance."""
    if not comparable(one, one):
        return None
    rate = float(one.rates.mean())
    low, high, _ = _t_interval(rate, (one,), (1.0,))
    return rate, max(low, 0.0), high


def compare(a: ErrorCounts, b: ErrorCounts) -> Difference:
    """Two students on the same utterances, each with its own seeds; ValueError if the utterances differ.

    The intervals are described at the top of this file; p_value is two-sided from the same t. relative is the change
    against b, None if b makes no error.
    """
    rate_a, rate_b = float(a.rates.mean()), float(b.rates.mean())
    difference = rate_a - rate_b
    low, high, p_value = _t_interval(difference, (a, b), (1.0, -1.0))
    relative = relative_low = relative_high = None
    if rate_b > 0:
        # First order in the errors: a/b - 1 moves as (a - (a/b) b) / b.
        relative = rate_a / rate_b - 1
        relative_low, relative_high, _ = _t_interval(relative, (a, b), (1 / rate_b, -rate_a / rate_b**2))
    sizes = (_fewest_seeds((a, b)), len(a.ids))
    return Difference(difference, low, high, p_value, relative, relative_low, relative_high, rate_a, rate_b, *sizes)


def trend(students: Sequence[ErrorCounts], shares: Sequence[float]) -> Trend:
    """The least-squares line of the error rate over a share, with its interval as in `compare`.

    Every student has the same weight. Raises ValueError unless at least two shares differ and all students were tested
    on the same utterances. A curve that falls and rises again has no slope.
    """
    away = np.asarray(shares, np.float64) - np.mean(shares)
    if not (away**2).sum():
        raise ValueError(f"a trend needs two different shares, not {list(shares)}")
    weights = away / (away**2).sum()
    slope = float(sum(weight * one.rates.mean() for weight, one in zip(weights, students, strict=True)))
    interval = _t_interval(slope, students, weights.tolist())
    return Trend(slope, *interval, _fewest_seeds(students), len(students[0].ids))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (Holm 1979), in the order given, which bound the family-wise error rate."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def decide(differences: Mapping[Name, Difference]) -> dict[Name, Decision]:
    """Decides comparisons that were declared together, before their results were seen.

    A difference is lower or higher if its Holm-adjusted p-value is below 1 - CONFIDENCE and its students have at least
    MINIMUM_SEEDS seeds, if they have any.
    """
    adjusted = holm([one.p_value for one in differences.values()])
    return {
        name: Decision(one, p_value, significance(one.difference, p_value, one.seeds))
        for (name, one), p_value in zip(differences.items(), adjusted)
    }


def significance(estimate: float, p_value: float, seeds: int) -> str:
    """LOWER or HIGHER than zero, or UNDECIDED, which it always is with too few seeds."""
    if p_value >= 1 - CONFIDENCE or 0 < seeds < MINIMUM_SEEDS:
        return UNDECIDED
    return LOWER if estimate < 0 else HIGHER


def comparable(a: ErrorCounts, b: ErrorCounts) -> bool:
    """Whether their difference has an interval: the same utterances, and more than one of them or more than one seed
    of each student that has seeds.
    """
    return a.ids == b.ids and (len(a.ids) > 1 or _fewest_seeds((a, b)) > 1)


def _fewest_seeds(students: Sequence[ErrorCounts]) -> int:
    return min((len(one.seeds) for one in students if not one.seedless), default=0)


def _t_interval(
    estimate: float, students: Sequence[ErrorCounts], weights: Sequence[float]
) -> tuple[float, float, float]:
    """Interval and two-sided p-value of a weighted sum of the students' error rates."""
    if any(one.ids != students[0].ids for one in students):
        raise ValueError("the students were tested on different utterances")
    utterances = len(students[0].ids)
    together, from_seeds, spread, doubled = np.zeros(utterances), 0.0, 0.0, 0.0
    for one, weight in zip(students, weights, strict=True):
        seeds, rates = len(one.seeds), one.rates
        # The contribution of each utterance to each seed's rate; rows sum to 0.
        parts = (one.numerator - rates[:, None] * one.denominator) / one.denominator.sum(axis=1, keepdims=True)
        mean = parts.mean(axis=0)
        together += weight * mean
        if seeds > 1:
            own = weight**2 * float(rates.var(ddof=1)) / seeds
            from_seeds, spread = from_seeds + own, spread + own**2 / (seeds - 1)
            # Interaction of seed and utterance: the residual of a two-way table (its variance over S seeds).
            doubled += weight**2 * float(((parts - mean) ** 2).sum()) / (seeds - 1) / seeds * _inflated(utterances)
    from_utterances = float((together**2).sum()) * _inflated(utterances)
    variance = max(from_utterances + from_seeds - doubled, from_utterances, from_seeds)
    if variance < 1e-24:  # all utterances and seeds agree: the p-value of a sign test
        return estimate, estimate, 1.0 if abs(estimate) < 1e-12 else 0.5 ** (utterances - 1)
    bounds = [(variance, variance**2 / (spread + from_utterances**2 / max(utterances - 1, 1)))]
    if from_seeds > doubled:
        # Seeds that agree by chance would give too many degrees of freedom.
        bounds.append((from_seeds - doubled, from_seeds**2 / spread))
    half = max(float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) * part**0.5 for part, freedom in bounds)
    p_value = max(float(2 * special.stdtr(freedom, -abs(estimate) / part**0.5)) for part, freedom in bounds)
    return estimate - half, estimate + half, p_value


def _inflated(utterances: int) -> float:
    """N / (N - 1), for deviations from a mean of N."""
    return utterances / (utterances - 1) if utterances > 1 else 1.0
