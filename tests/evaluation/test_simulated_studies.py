"""The statistics of a study on simulated studies with known truth: type I errors, power, coverage.

A simulated answer is wrong if the utterance's difficulty, the student's shift, the seed's shift, and the utterance's
extra difficulty for this student and for this seed add up to more than zero. A baseline without a seed has no seed
shift. kd_jax/evaluation/significance.py and docs/comparisons.md have the results of larger simulations.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from scipy import special

from kd_jax.evaluation.significance import (
    HIGHER,
    LOWER,
    ErrorCounts,
    compare,
    decide,
    error_rate,
    significance,
    trend,
)

STUDIES = 300  # of each kind; enough to notice an error rate of 10 % instead of 5 %
OWN = 0.7  # standard deviation of an utterance's extra difficulty for a student, and for one of its seeds
ERROR = 0.24  # of a student without a shift
# Standard errors above 5 % that a share of false findings may lie: here it is at most 6 %, and 7 to 8 % if p-values
# count one side instead of both. The draws are the same each time, so no test fails by chance.
ABOVE = 1.5


class Student(NamedTuple):
    """luck: standard deviation of its seeds' shifts in probits, None for a baseline without a seed; rate: its error."""

    luck: float | None = 0.05
    rate: float = ERROR

    def draw(self, rng: np.random.Generator, difficulty: np.ndarray, seeds: int) -> ErrorCounts:
        names = (None,) if self.luck is None else tuple(range(seeds))
        size, luck = len(difficulty), self.luck or 0.0
        spread = (1 + 2 * OWN**2 + luck**2) ** 0.5
        hard = OWN * (rng.standard_normal(size) + rng.standard_normal((len(names), size)))
        chance = luck * rng.standard_normal((len(names), 1))
        wrong = (difficulty + hard + chance + spread * special.ndtri(self.rate) > 0).astype(float)
        return ErrorCounts(wrong, np.ones_like(wrong), names, tuple(map(str, range(size))))


def share(
    students: list[Student], holds: Callable[[list[ErrorCounts]], bool], *, seeds: int, utterances: int, studies=STUDIES
) -> float:
    """The share of simulated studies in which something holds."""
    rng = np.random.default_rng(1)
    return float(
        np.mean(
            [
                holds([one.draw(rng, difficulty, seeds) for one in students])
                for difficulty in (rng.standard_normal(utterances) for _ in range(studies))
            ]
        )
    )


def declared(found: list[ErrorCounts]) -> list[str]:
    """The statuses of the first student against each of the others, decided together."""
    return [one.status for one in decide(dict(enumerate(compare(found[0], other) for other in found[1:]))).values()]


def any_difference(found: list[ErrorCounts]) -> bool:
    return bool({LOWER, HIGHER} & set(declared(found)))


def covered(truth: float) -> Callable[[list[ErrorCounts]], bool]:
    def holds(found: list[ErrorCounts]) -> bool:
        one = compare(*found)
        return one.low <= truth <= one.high

    return holds


def slope(found: list[ErrorCounts]):
    return trend(found, np.linspace(0, 1, len(found)).tolist())


def standard_error(nominal: float) -> float:
    return (nominal * (1 - nominal) / STUDIES) ** 0.5


def equal_students(luck: float, uneven: float) -> list[Student]:
    """The declared student, whose seeds may vary more, four others, and n-grams without a seed."""
    return [Student(uneven * luck), *[Student(luck)] * 4, Student(None)]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("luck", "uneven"),
    [
        pytest.param(0.0, 1, marks=pytest.mark.long),
        (0.02, 3),
        pytest.param(0.1, 1, marks=pytest.mark.long),
        (0.1, 3),
        (0.3, 1),
    ],
)
def test_equal_students_are_seldom_said_to_differ(seeds, luck, uneven):
    """The family-wise error of the five declared comparisons, from seeds that agree to seeds 7 points apart."""
    wrong = share(equal_students(luck, uneven), any_difference, seeds=seeds, utterances=500)
    assert wrong <= 0.05 + ABOVE * standard_error(0.05)


def test_without_holms_adjustment_they_would_often_be_said_to_differ():
    """Shows that the test above can fail."""

    def unadjusted(found: list[ErrorCounts]) -> bool:
        return any(compare(found[0], other).p_value < 0.05 for other in found[1:])

    wrong = share(equal_students(0.1, 1), unadjusted, seeds=5, utterances=200, studies=150)
    assert wrong > 0.12


@pytest.mark.slow
@pytest.mark.parametrize(("relative", "least"), [(0.15, 0.3), (0.20, 0.6)])
def test_three_seeds_find_a_real_difference(relative, least):
    """All five differences are real; the power is that of the first comparison, after the adjustment."""
    students = [Student(rate=(1 - relative) * ERROR), *[Student()] * 4, Student(None)]
    power = share(students, lambda found: declared(found)[0] == LOWER, seeds=3, utterances=2000, studies=100)
    assert power >= least


@pytest.mark.slow
@pytest.mark.parametrize("luck", [0.0, 0.05, 0.3])
def test_intervals_against_a_baseline_without_a_seed_cover_the_truth(luck):
    pair = [Student(luck, 0.20), Student(None)]
    held = share(pair, covered(0.20 - ERROR), seeds=3, utterances=500)
    assert held >= 0.95 - 3 * standard_error(0.95)


def test_the_interval_of_one_student_covers_its_error_rate():
    def holds(found: list[ErrorCounts]) -> bool:
        interval = error_rate(found[0])
        return interval is not None and interval[1] <= ERROR <= interval[2]

    assert share([Student(0.1)], holds, seeds=3, utterances=300) >= 0.95 - 3 * standard_error(0.95)


def test_two_baselines_without_seeds_are_compared_over_utterances():
    held = share([Student(None, 0.20), Student(None)], covered(0.20 - ERROR), seeds=3, utterances=300)
    assert 0.95 - 3 * standard_error(0.95) <= held <= 0.95 + 3 * standard_error(0.95)


@pytest.mark.slow
@pytest.mark.parametrize("luck", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("shares", [3, pytest.param(5, marks=pytest.mark.long)])
def test_a_trend_is_seldom_seen_where_there_is_none(luck, shares):
    def seen(found: list[ErrorCounts]) -> bool:
        one = slope(found)
        return significance(one.slope, one.p_value, one.seeds) in (LOWER, HIGHER)

    wrong = share([Student(luck)] * shares, seen, seeds=3, utterances=500)
    assert wrong <= 0.05 + ABOVE * standard_error(0.05)


@pytest.mark.slow
def test_a_trend_is_seen_where_there_is_one():
    """An error that falls by a seventh from one end to the other."""
    students = [Student(rate=(1 - part) * ERROR) for part in (0.0, 0.075, 0.15)]

    def falls(found: list[ErrorCounts]) -> bool:
        one = slope(found)
        return significance(one.slope, one.p_value, one.seeds) == LOWER

    assert share(students, falls, seeds=3, utterances=2000, studies=100) >= 0.45
