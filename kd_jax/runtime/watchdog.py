"""Reports a command that has stopped making progress: which process is stalled in what, with all stacks."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from typing import TextIO

import jax

from kd_jax.runtime.copies import on_this_host
from kd_jax.runtime.paths import as_path, make_folder

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: launchers start the same command again


class Watchdog:
    """Reports on standard error and in `folder` when `alive` is not called for `seconds`; 0 seconds turn it off.

    exits: also end the process then, with `EXIT_CODE`. A context manager; the innermost one is the process's. When one
    of several hosts hangs, all of them report: the others wait in a collective, so the odd stack is the culprit.
    """

    # A thread, not faulthandler.dump_traceback_later: that can only exit with code 1, writes to one file, and would
    # have to be armed again with every sign of life, which costs a system thread each time.

    def __init__(self, seconds: float, folder: str | os.PathLike, *, exits: bool = False):
        self._seconds, self._exits = float(seconds), exits
        self._file = on_this_host(as_path(folder)) / f"stalled-{jax.process_index()}.txt"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def alive(self, doing: str) -> None:
        """A sign of life; `doing` is what happens next."""
        if self._reported:
            waited = time.monotonic() - self._since
            print(f"{self._doing} went on after {waited:.0f} s", file=sys.stderr, flush=True)
        self._doing, self._since, self._reported = doing, time.monotonic(), False

    def _watch(self) -> None:
        pause, looked = min(self._seconds / 4, 5.0), time.monotonic()
        while not self._stop.wait(pause):
            now = time.monotonic()
            # The pause took several times its length: the whole process was stopped (SIGSTOP, a suspended machine),
            # so no step could run either.
            if now - looked > 3 * pause:
                self._since = min(self._since + (now - looked), now)
            looked, waited = now, now - self._since
            if waited > self._seconds and not self._reported:
                self._reported = True
                self._report(waited)
                if self._exits:
                    os._exit(EXIT_CODE)

    def _report(self, waited: float) -> None:
        line = (
            f"process {jax.process_index()} of {jax.process_count()}: {self._doing} has taken {waited:.0f} s, more "
            f"than config.watchdog_seconds = {self._seconds:g}; the stacks of all threads:\n"
        )
        # A closed stream or a full disk must not keep the other report from being written.
        with contextlib.suppress(Exception):
            _dump(line, sys.__stderr__ or sys.stderr)
        with contextlib.suppress(Exception):
            make_folder(self._file.parent)
            with open(self._file, "a", encoding="utf-8") as file:
                _dump(line, file)

    def __enter__(self) -> "Watchdog":
        global _current
        self._outer, _current = _current, self
        self._doing, self._since, self._reported = "the start", time.monotonic(), False
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        global _current
        _current = self._outer
        alive("the rest")  # the outer one was not told anything meanwhile
        self._stop.set()
        if self._seconds:
            self._thread.join()


_current: Watchdog | None = None


def alive(doing: str) -> None:
    """`Watchdog.alive` of the process's watchdog, if there is one."""
    if _current is not None:
        _current.alive(doing)


def _dump(line: str, file: TextIO) -> None:
    file.write(line)
    file.flush()  # faulthandler writes to the file descriptor, past Python's buffer
    faulthandler.dump_traceback(file=file)
