"""Reads the metrics of training steps one step late, so that the host never waits for the devices."""

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from kd_jax.config.training import Training
from kd_jax.runtime.progress import Progress
from kd_jax.trainer.goodput import Goodput
from kd_jax.trainer.metrics import TIME, MetricsWriter, Window
from kd_jax.types import Term, UserError

# A count among a step's metrics where its update is skipped if its loss is not finite; of the run, in its rows.
SKIPPED = "skipped_steps"


class StepReader:
    """Reads each step's metrics while the next one runs, and writes the row of a logged step."""

    def __init__(self, job: Training, writer: MetricsWriter, bar: Progress, window: Window, goodput: Goodput):
        self.window, self._goodput = window, goodput
        self._job, self._writer, self._bar = job, writer, bar
        self._pending: tuple[int, Mapping[str, Term], Any, bool] | None = None
        self._compiled = False
        self._recent: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._seconds = self._waited = 0.0
        self._steps = self._real = self._total = 0

    def dispatched(self, step: int, metrics: Mapping[str, Term], tokens: Any, began: float, waited: float) -> None:
        """Takes over a step that was just handed to the devices, and reads the one before."""
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()
        self.settle()
        self._pending = (step, metrics, tokens, self._compiled)
        if self._compiled:  # the first step's time is compilation
            self._seconds += time.perf_counter() - began
            self._waited += waited
            self._steps += 1
        self._compiled = True

    def settle(self) -> None:
        """Waits for the pending step's metrics, and writes its row if it is logged; UserError if one is not finite."""
        if self._pending is None:
            return
        step, metrics, tokens, timed = self._pending
        self._pending = None
        real, total = (int(count) for count in jax.device_get(tokens))
        if timed:
            self._real += real
            self._total += total
        terms = {name: (float(value), float(weight)) for name, (value, weight) in jax.device_get(dict(metrics)).items()}
        wrong = [name for name, pair in sorted(terms.items()) if not all(math.isfinite(number) for number in pair)]
        if wrong:
            terms = self._without(step, terms, wrong)
        self.window.add(terms | {"useful_share": (real, total)})
        loss, weight = terms["loss"]
        if self._steps > 1:  # a single step of a window that has just begun says little
            self._recent = self._rates()
        self._bar.update(step, loss / weight if weight else math.nan, self._recent)
        if step % self._job.log_every == 0 or step == self._job.steps:
            rates = self._rates()
            times = {f"{TIME}{name}": value for name, value in rates.items() if name != "useful_share"}
            times |= self._goodput.times()
            skipped = {SKIPPED: len(self._goodput.skipped)} if self._job.skip_non_finite else {}
            self._writer.write(step, self.window.take() | skipped | times)
            self._clear()

    def _without(self, step: int, terms: dict[str, tuple[float, float]], wrong: list[str]) -> dict:
        """The terms of a step whose update was left out: nothing counts. UserError where none may be, or no more."""
        what, allowed, skipped = (
            f"step {step}: {', '.join(wrong)} is not a finite number",
            self._job.skip_non_finite,
            "",
        )
        if allowed and terms[SKIPPED][0] == 1.0:
            if len(self._goodput.skipped) < allowed:
                self._goodput.skipped.append(step)
                self._bar.say(f"{what}; its update is left out, {len(self._goodput.skipped)} of {allowed}")
                return dict.fromkeys(terms, (0.0, 0.0))
            skipped = f", after {allowed} steps that were skipped (skip_non_finite)"
        raise UserError(
            f"{what}{skipped}, so the run stops; lower learning_rate, set clip_norm, or warm up longer; it can start "
            "again from its last checkpoint"
        )

    def _rates(self) -> dict[str, float]:
        """Throughput since the last logged step, over all processes; {} before there is any."""
        if not self._seconds:
            return {}
        return {
            "tokens_per_second": self._real / self._seconds,
            "padded_tokens_per_second": self._total / self._seconds,
            "useful_share": self._real / max(self._total, 1),
            "seconds_per_step": self._seconds / self._steps,
            "data_wait_share": self._waited / self._seconds,
        }
