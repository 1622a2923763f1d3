"""SIGTERM, as schedulers send it before they take a machine away, becomes a checkpoint and exit code 75."""

import os
import signal
import threading
from types import FrameType, TracebackType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: launchers start the same command again


class Preempted(Exception):
    """The run has saved a checkpoint and stops because it was asked to; main exits with `EXIT_CODE`."""


class Preemption:
    """A flag that the first SIGTERM sets; the second ends the process at once, as if there were no handler.

    Used as a context manager it puts the former handler back. Python installs handlers in the main thread only:
    elsewhere the flag is set by `request` alone.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._former = None
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            self._former = signal.signal(signal.SIGTERM, self._on_signal)

    def requested(self) -> bool:
        return self._requested.is_set()

    def request(self) -> None:
        """Asks the run to save and stop, as a first SIGTERM does."""
        self._requested.set()

    def close(self) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._former if self._former is not None else signal.SIG_DFL)
            self._installed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.request()

    def __enter__(self) -> "Preemption":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
