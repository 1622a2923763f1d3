"""Goodput: where the wall time of a run went since its first start, and which of its steps were lost or skipped."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from kd_jax.runtime.files import read_json_object, write_sealed
from kd_jax.runtime.paths import as_path, is_there, make_folder
from kd_jax.trainer.metrics import TIME

FILE = "goodput.json"
# Everything else is start-up, the time between two starts, and steps that were lost.
KINDS = ("steps", "data_wait", "compile", "evaluation", "checkpoint")


class Goodput:
    """Seconds by kind. They are saved with each checkpoint, so they never include what a killed run lost.

    Goodput is the share of the wall time since the first start that went into steps which count. `folder` keeps the
    first start and the number of lost steps over restarts; None keeps nothing.
    """

    def __init__(self, folder: str | os.PathLike | None = None):
        self._file = None if folder is None else as_path(folder) / FILE
        self._seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._kind: str | None = None
        self._since = time.monotonic()
        self.skipped: list[int] = []  # steps whose update was skipped because their loss was not finite
        before: dict[str, Any] = {"first_start": time.time(), "starts": 0, "lost_steps": 0}
        if self._file is not None and is_there(self._file):
            before = read_json_object(self._file)
        self._began, self._starts, self._lost = before["first_start"], before["starts"], before["lost_steps"]

    def start(self, saved: Mapping[str, Any] | None, lost_steps: int) -> None:
        """Continues from what a checkpoint holds, None without one; lost_steps: done after it, and to be repeated."""
        if saved is not None:
            self._seconds |= {kind: float(seconds) for kind, seconds in saved["seconds"].items()}
            self.skipped = [int(step) for step in saved["skipped"]]
        self._starts += 1
        self._lost += lost_steps
        if self._file is not None and jax.process_index() == 0:
            make_folder(self._file.parent)
            state = {"first_start": self._began, "starts": self._starts, "lost_steps": self._lost}
            write_sealed(self._file, state)

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """The time in the block counts as `kind`, and not as the kind of the block around it."""
        former = self._turn(kind)
        try:
            yield
        finally:
            self._turn(former)

    def _turn(self, kind: str | None) -> str | None:
        now = time.monotonic()
        if self._kind is not None:
            self._seconds[self._kind] += now - self._since
        former, self._kind, self._since = self._kind, kind, now
        return former

    def saved(self) -> dict[str, Any]:
        """For a checkpoint, as JSON values."""
        self._turn(self._kind)
        return {"seconds": dict(self._seconds), "skipped": self.skipped}

    def times(self) -> dict[str, float]:
        """The seconds of each kind and the goodput so far, as metrics."""
        found = self.summary()
        wanted = ("goodput", *(f"{kind}_seconds" for kind in KINDS))
        return {f"{TIME}{name}": found[name] for name in wanted}

    def summary(self) -> dict[str, Any]:
        """All of it: seconds, goodput in [0, 1], starts, lost steps, skipped steps."""
        self._turn(self._kind)
        wall = max(time.time() - self._began, sum(self._seconds.values()), 1e-9)
        return {
            "goodput": self._seconds["steps"] / wall,
            "wall_seconds": wall,
            **{f"{kind}_seconds": seconds for kind, seconds in self._seconds.items()},
            "other_seconds": wall - sum(self._seconds.values()),
            "starts": self._starts,
            "lost_steps": self._lost,
            "skipped_steps": self.skipped,
        }
