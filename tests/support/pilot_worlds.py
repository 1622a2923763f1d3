"""Simulated pilots with known truth: answers to the same utterances, with seeds that vary, and no model."""

from collections.abc import Callable

import numpy as np
from scipy import special

from kd_jax.study.advise import Candidate, Outcome, Pilot

FULL = 800  # steps


class World:
    """rate(candidate): true error in points after all steps. Standard deviations in points: luck, the noise of a pilot;
    shared, of all pilots of a seed; drift, of a candidate per halving of the steps. Few steps make all equally worse.
    """

    def __init__(
        self,
        rate: Callable[[Candidate], float],
        *,
        seed: int = 0,
        utterances: int = 800,
        luck: float = 0.5,
        shared: float = 1.0,
        drift: float = 0.0,
    ):
        self.rate, self.luck, self.shared, self.drift = rate, luck, shared, drift
        self._rng = np.random.default_rng(seed)
        self._difficulty = self._rng.standard_normal(utterances)
        self._drifts: dict[tuple, float] = {}
        self._shared: dict[tuple, float] = {}
        self.runs: list[Pilot] = []
        self.outcomes: dict[Pilot, Outcome] = {}

    def outcome(self, pilot: Pilot) -> Outcome:
        """Simulates a pilot."""
        self.runs.append(pilot)
        halvings = np.log2(FULL / pilot.steps)
        rate = self.rate(pilot.candidate) + 3 * halvings + self.luck * self._rng.standard_normal()
        rate += self._shared.setdefault((pilot.steps, pilot.seed), self.shared * self._rng.standard_normal())
        for step in range(round(halvings)):
            key = (pilot.candidate, step)
            rate += self._drifts.setdefault(key, self.drift * self._rng.standard_normal())
        hard = self._difficulty + self._rng.standard_normal(len(self._difficulty))
        wrong = (hard < 2**0.5 * special.ndtri(np.clip(rate / 100, 0.001, 0.999))).astype(float)
        return outcome_of(wrong)

    def run(self, pilots):
        """Runs all pilots, as if there were no budget."""
        for one in pilots:
            if one not in self.outcomes:
                self.outcomes[one] = self.outcome(one)
        return {one: self.outcomes[one] for one in pilots}


def outcome_of(wrong: np.ndarray) -> Outcome:
    """The outcome of right and wrong answers, 0/1 [N]."""
    ids = tuple(map(str, range(len(wrong))))
    rate = 100 * float(wrong.mean())
    return Outcome({"dc": rate}, rate, (100 * wrong - rate) / len(wrong), ids)
