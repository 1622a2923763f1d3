"""The statistics of a study on simulated studies whose truth is known: errors of the first kind, power, coverage.

A simulated answer is wrong if the utterance's difficulty, the seed's luck, what the student finds hard in general, and
what it finds hard with this seed add up to more than zero. A baseline without a seed has no luck.
"""

from typing import NamedTuple

import numpy as np
import pytest
from scipy import stats

from kd_jax.evaluation.significance import UNDECIDED, ErrorCounts, compare, decide

OWN = 0.7  # standard deviations, of what a student finds hard in general and of what it finds hard with one seed
UTTERANCES = 2000


class Study(NamedTuple):
    """luck: standard deviation of the seeds' luck, by student; shifts: how much worse each student is, as probits."""

    seeds: int = 3
    luck: tuple[float, ...] = (0.05, 0.05, 0.05, 0.05, 0.05)
    shifts: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)
    ngrams: float | None = 0.0
    utterances: int = UTTERANCES

    def draw(self, rng: np.random.Generator) -> list[ErrorCounts]:
        """The students in order, and the n-grams last."""
        difficulty, students = rng.normal(-1, 1, self.utterances), []
        ngrams = () if self.ngrams is None else ((None, self.ngrams),)
        for luck, shift in (*zip(self.luck, self.shifts, strict=True), *ngrams):
            seeds = (None,) if luck is None else tuple(range(self.seeds))
            chance = rng.normal(0, luck or 0, (len(seeds), 1))
            hard = rng.normal(0, OWN, self.utterances) + rng.normal(0, OWN, (len(seeds), self.utterances))
            wrong = (difficulty + shift + chance + hard > 0).astype(float)
            students.append(ErrorCounts(wrong, np.ones_like(wrong), seeds, tuple(map(str, range(self.utterances)))))
        return students


def error_rate(shift: float, luck: float = 0.0) -> float:
    return float(stats.norm.cdf((shift - 1) / (1 + 2 * OWN**2 + luck**2) ** 0.5))


def declared(students: list[ErrorCounts]) -> dict[int, str]:
    """The declared comparisons: the first student with each of the others."""
    found = decide({index: compare(students[0], other) for index, other in enumerate(students[1:], 1)})
    return {index: one.status for index, one in found.items()}


def share_of(studies: int, seed: int, question) -> float:
    rng = np.random.default_rng(seed)
    return float(np.mean([question(rng) for _ in range(studies)]))


# Most that is observed in so many studies if the true share is 5 %: three standard errors more.
def at_most(nominal: float, studies: int) -> float:
    return nominal + 3 * (nominal * (1 - nominal) / studies) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("luck", [0.0, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("uneven", [1, 3])
def test_a_study_of_equal_students_seldom_declares_a_difference(seeds, luck, uneven):
    """The family-wise error; also if the student in every comparison is the one whose seeds differ most."""
    # All students have the same error rate on average: more luck would move it.
    level = [(1 + 2 * OWN**2 + one**2) ** 0.5 for one in (uneven * luck, luck)]
    shifts = (1 - level[0], *[1 - level[1]] * 4)
    base = 1 - (1 + 2 * OWN**2) ** 0.5
    study = Study(seeds, (uneven * luck, *[luck] * 4), shifts, base)
    wrong = share_of(400, 1, lambda rng: any(one != UNDECIDED for one in declared(study.draw(rng)).values()))
    print(f"seeds {seeds}, luck {luck}, uneven {uneven}: {wrong:.4f}")
    assert wrong <= at_most(0.05, 400)
