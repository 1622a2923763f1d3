"""Notices that nothing goes on: which process is stalled in what, with the stacks of all of its threads."""

import faulthandler
import os
import pathlib
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

import jax

from kd_jax.config import require
from kd_jax.runtime.copies import on_this_host
from kd_jax.runtime.paths import as_path
from kd_jax.runtime.preemption import EXIT_CODE

_TICK = 5.0  # seconds between two looks, at the most


class Watchdog:
    """Reports on standard error and in `folder` when `alive` is not called for `seconds`; 0 seconds turn it off.

    exits: also end the process then, with the exit code on which launchers start the same command again. A context
    manager; the innermost one is the process's. Where one host of several hangs, all are reported: the others wait
    in a collective, and the stacks tell which one does something else.
    """

    def __init__(self, seconds: float, folder: str | os.PathLike, *, exits: bool = False):
        require(seconds >= 0, "watchdog_seconds", f"{seconds} is negative", "1800 is usual, 0 turns it off")
        self._seconds, self._exits = float(seconds), exits
        self._file = on_this_host(as_path(folder)) / f"stalled-{jax.process_index()}.txt"
        self._doing, self._since, self._reported = "the start", time.monotonic(), False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._former: Watchdog | None = None

    def alive(self, doing: str) -> None:
        """Something was done, and `doing` is what comes now."""
        if self._reported:
            waited = time.monotonic() - self._since
            print(f"{self._doing} went on after {waited:.0f} s", file=sys.stderr, flush=True)
        self._doing, self._since, self._reported = doing, time.monotonic(), False

    def _watch(self) -> None:
        while not self._stop.wait(min(self._seconds / 4, _TICK)):
            waited = time.monotonic() - self._since
            if self._reported or waited <= self._seconds:
                continue
            self._reported = True
            self._report(waited)
            if self._exits:
                os._exit(EXIT_CODE)

    def _report(self, waited: float) -> None:
        line = (
            f"process {jax.process_index()} of {jax.process_count()}: {self._doing} has taken {waited:.0f} s, more "
            f"than config.watchdog_seconds = {self._seconds:g}; the stacks of all threads:\n"
        )
        for output in (sys.__stderr__, self._file):
            try:
                if isinstance(output, pathlib.Path):
                    output.parent.mkdir(parents=True, exist_ok=True)
                    with open(output, "a", encoding="utf-8") as file:
                        _dump(line, file)
                elif output is not None:
                    _dump(line, output)
            except (OSError, ValueError):
                continue  # a closed stream or a full disk; the other one may take it

    def __enter__(self) -> "Watchdog":
        global _current
        self._former, _current = _current, self
        self.alive("the start")
        if self._seconds:
            self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._former
        if _current is not None:
            _current.alive("the rest")
        self._stop.set()
        if self._thread is not None:
            self._thread.join()


_current: Watchdog | None = None


def alive(doing: str) -> None:
    """`Watchdog.alive` of the process's, if there is one."""
    if _current is not None:
        _current.alive(doing)


def _dump(line: str, file: TextIO) -> None:
    file.write(line)
    file.flush()
    faulthandler.dump_traceback(file=file)
