"""SIGTERM asks a command to save and stop with exit code 75.

Schedulers send it before they take a machine away. The signal handler only sets a flag, and the work polls it where it
can stop: between two training steps, two batches, two texts. Nothing is raised from the handler, so no library is ever
interrupted halfway; the price is that a long call (a compilation) is finished first.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, TypeVar

import jax

from kd_jax.runtime.watchdog import EXIT_CODE as EXIT_CODE
from kd_jax.runtime.watchdog import alive

Item = TypeVar("Item")


class Preempted(BaseException):
    """The command has saved what it has and stops because it was asked to; main exits with `EXIT_CODE`.

    Like KeyboardInterrupt it is no Exception, so that no `except Exception` on its way keeps it from main.
    """


class Preemption:
    """Listens for SIGTERM inside a `with` block: the first one sets the flag, a second one ends the process.

    Python runs signal handlers in the main thread only; elsewhere the flag is set by `request` alone.
    """

    def __init__(self) -> None:
        self.asked = False  # this process; see `requested` for a job of several
        self._pid = os.getpid()

    def request(self) -> None:
        """Asks as a SIGTERM does."""
        self.asked = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # From here on the default action, which works inside C++ code too: an impatient user is not kept waiting.
        signal.signal(number, signal.SIG_DFL)
        if os.getpid() == self._pid:
            self.request()
        else:  # a data loader's forked child has inherited the handler, and has nothing to save
            os.kill(os.getpid(), number)

    def __enter__(self) -> "Preemption":
        global _current
        self._outer, _current = _current, self
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        global _current
        _current = self._outer
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._former or signal.SIG_DFL)


class Agreement:
    """Several processes agree on the poll at which they stop: the first that none of them has passed.

    A stop at different steps would leave some of them waiting in a collective. Until one is asked, a poll only counts:
    it costs a fraction of a microsecond, and no message. client: of JAX's coordination service.
    """

    def __init__(self, client: Any, process: int, processes: int):
        self._client, self._process, self._processes = client, process, processes
        self._lock = threading.Lock()
        self._polls = 0  # made by this process
        self._stop_at: int | None = None
        self.announced = False  # one of the processes was asked
        self._thread = threading.Thread(target=self._agree, daemon=True, name="preemption")
        self._thread.start()

    def announce(self, notice: str = "asked") -> None:
        """Tells all processes that one of them was asked to stop."""
        if not self.announced:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                self._client.key_value_set(_NOTICE, notice)

    def _agree(self) -> None:
        try:
            if self._client.blocking_key_value_get(_NOTICE, _FOREVER) == _NOBODY:
                return
            # The lock keeps the main thread from passing another poll until all counts are known. It need not poll for
            # this thread to answer, so processes that wait for one another in a collective agree all the same.
            with self._lock:
                self._client.key_value_set(f"{_POLLS}/{self._process}", str(self._polls))
                self.announced = True
                keys = [f"{_POLLS}/{process}" for process in range(self._processes)]
                self._stop_at = 1 + max(int(self._client.blocking_key_value_get(key, _FOREVER)) for key in keys)
        except jax.errors.JaxRuntimeError:
            return  # the service is gone, and the job with it

    def reached(self) -> bool:
        """One poll."""
        with self._lock:
            self._polls += 1
            return self._stop_at is not None and self._polls >= self._stop_at

    def close(self) -> None:
        """Ends the thread; to be called by all processes when none needs to stop any more."""
        self.announce(_NOBODY)
        self._thread.join()


_NOTICE, _POLLS = "kd_jax/preempted", "kd_jax/polls"
_NOBODY = "nobody"
_FOREVER = 10**9  # milliseconds

_current: Preemption | None = None
agreement: Agreement | None = None  # of a job of several processes; set by kd_jax.runtime.distributed


def requested() -> bool:
    """Whether this process, or another one of its job, was asked to stop; for work that one process does alone."""
    asked = _current is not None and _current.asked
    if agreement is None:
        return asked
    if asked:
        agreement.announce()
    return asked or agreement.announced


def reached() -> bool:
    """Whether the work stops here: the same in all processes, which must all poll at the same points of the program."""
    asked = requested()
    return asked if agreement is None else agreement.reached()


def interruptible(items: Iterable[Item], doing: str, *, alone: bool = False) -> Iterator[Item]:
    """The items; before each one, reports to the watchdog and polls the preemption flag.

    doing: what the items are for, as in "the held-out loss". alone: only this process iterates, so it decides by
    itself; otherwise all processes of a job must iterate over equally many items. Raises Preempted.
    """
    for number, item in enumerate(items):
        alive(f"{doing}, item {number}")
        if requested() if alone else reached():
            raise Preempted(f"stopped at {doing}; what is finished is saved")
        yield item
