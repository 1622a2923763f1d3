"""The evaluation whose parameters a run keeps: with patience the best one, else the last one."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.types import Params

Metrics = Mapping[str, float | None]


class Best:
    """The best evaluation so far.

    metric: the name, among what an evaluation returns, of a score where higher is better. patience: evaluations without
    a higher score after which the run stops; 0 never stops, keeps no parameters, and takes the last one.
    """

    def __init__(self, metric: str, patience: int):
        self.metric, self.patience = metric, patience
        self.step: int | None = None
        self.metrics: dict[str, float | None] = {}
        self.params: Params | None = None
        self._since = 0  # evaluations since then

    @property
    def stops(self) -> bool:
        """Whether the run should stop now."""
        return 0 < self.patience <= self._since

    def add(self, step: int, metrics: Metrics, params: Params) -> None:
        """Records an evaluation; the parameters are copied, so that they may be donated. A missing score is lowest."""
        score = _score(metrics[self.metric])
        if self.patience and self.step is not None and score <= _score(self.metrics[self.metric]):
            self._since += 1
            return
        self.step, self.metrics, self._since = step, dict(metrics), 0
        if self.patience:
            self.params = jax.tree.map(jnp.copy, params)

    def saved(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values, without the parameters."""
        return {"step": self.step, "since": self._since, "metrics": self.metrics}

    def restore(self, saved: Mapping[str, Any], params: Params | None) -> None:
        """The inverse of `saved`; params: those saved with it."""
        self.step, self._since, self.metrics = saved["step"], saved["since"], dict(saved["metrics"])
        self.params = params


def _score(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value
