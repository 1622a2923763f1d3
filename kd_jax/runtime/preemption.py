"""SIGTERM, as schedulers send it before they take a machine away, becomes a checkpoint and exit code 75."""

import contextlib
import ctypes
import itertools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: launchers start the same command again
GRACE_SECONDS = 10.0  # how long a process that has nothing to save may still be busy after the signal


class Preempted(BaseException):
    """The command has saved what it has and stops because it was asked to; main exits with `EXIT_CODE`.

    Like KeyboardInterrupt it is no Exception, so that no `except Exception` on its way keeps it from main.
    """


class Preemption:
    """What the process is told by SIGTERM: the first asks it to save and stop, the second ends it at once.

    A single process is stopped by `Preempted`, raised where its main thread is, except inside `deferred`, where the
    work asks `reached` between two steps. A main thread that does not come back to Python, as in a compilation, is not
    waited for longer than `GRACE_SECONDS` where there is nothing to save: then the process ends with `EXIT_CODE`.

    Several processes always ask `reached`, all at the same places of the program, as often as each other: JAX's
    preemption service takes the notice of one to all and lets them agree on the place where they stop. `alone` is for
    work of one process.

    leave: how the process ends from another thread than the main one. A context manager, which puts the former handler
    back. Python installs handlers in the main thread only: elsewhere `request` alone asks.
    """

    def __init__(self, leave: Callable[[Preempted], Any] | None = None) -> None:
        self._leave = leave or _leave
        self._requested = False
        self._several = jax.distributed.is_initialized() and jax.process_count() > 1
        self._deferred = self._several
        self._agreed = False
        self._signals = 0
        self._close: list[Callable[[], None]] = []

    def requested(self) -> bool:
        """Whether this process was asked."""
        return self._requested

    def request(self) -> None:
        """Asks the process to save and stop, as a first SIGTERM does, but for raising anything."""
        self._requested = True

    def reached(self) -> bool:
        """Whether the work stops here, for which several processes ask at the same places and equally often."""
        if not (self._several and self._deferred):
            return self.requested()
        if not self._agreed:
            try:
                self._agreed = multihost_utils.reached_preemption_sync_point(next(_places))
            except RuntimeError:
                return False  # the service is switched off by JAX_ENABLE_PREEMPTION_SERVICE
        return self._agreed

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While inside, nothing is raised but by the work itself, which has something to save and asks `reached`."""
        with self._turned(True):
            yield
        if self._requested and not self._several:
            raise Preempted("what is finished is saved")

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """While inside, this process works by itself, or waits for another that does; it stops by itself, too."""
        with self._turned(False):
            yield

    @contextlib.contextmanager
    def _turned(self, deferred: bool) -> Iterator[None]:
        former, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = former

    def _install(self) -> None:
        foreign = _foreign_handler()
        former = signal.signal(signal.SIGTERM, self._on_signal)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        former_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader, foreign), daemon=True, name="preemption")
        watcher.start()

        def close() -> None:
            signal.signal(signal.SIGTERM, former if former is not None else signal.SIG_DFL)
            if foreign is not None:
                _libc().signal(signal.SIGTERM, foreign)
            signal.set_wakeup_fd(former_fd)
            os.write(writer, _STOP)
            watcher.join()
            os.close(reader)
            os.close(writer)

        self._close.append(close)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Runs in the main thread, between two of its bytecodes."""
        self._signals += 1
        if self._signals > 1:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._requested = True
        if not self._deferred:
            raise Preempted("what is finished is saved")

    def _watch(self, reader: int, foreign: int | None) -> None:
        """Runs in a thread: hears signals also while the main thread is inside of a library."""
        heard, idle_since = 0, None
        while True:
            if select.select([reader], [], [], 0.1)[0]:
                received = os.read(reader, 64)
                if _STOP in received:
                    return
                terms = received.count(bytes([signal.SIGTERM]))
                if terms and not heard and foreign is not None:
                    ctypes.CFUNCTYPE(None, ctypes.c_int)(foreign)(signal.SIGTERM)
                heard += terms
            if not heard:
                continue
            idle_since = None if self._deferred else (idle_since or time.monotonic())
            if heard > 1:
                time.sleep(0.5)  # the handler ends the process where the main thread runs Python
                os._exit(128 + signal.SIGTERM)
            if idle_since is not None and time.monotonic() - idle_since > GRACE_SECONDS:
                self._leave(Preempted("there was nothing to save"))

    def __enter__(self) -> "Preemption":
        global _current
        former, _current = _current, self

        def back() -> None:
            global _current
            _current = former

        self._close.append(back)
        if threading.current_thread() is threading.main_thread():
            self._install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._close:
            self._close.pop()()


_STOP = b"\0"
_places = itertools.count(1)  # JAX's preemption service knows the places of the program by number
_current: Preemption | None = None


@contextlib.contextmanager
def watching(leave: Callable[[Preempted], Any] | None = None) -> Iterator[Preemption]:
    """The process's Preemption: the one that is watching already, or a new one for the while."""
    if _current is not None:
        yield _current
        return
    with Preemption(leave) as new:
        yield new


def poll() -> None:
    """Raises `Preempted` when the command was asked to stop, at a place that all of its processes pass."""
    if _current is not None and _current.reached():
        raise Preempted("what is finished is saved")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """`Preemption.alone` of the one that is watching, if any."""
    with _current.alone() if _current is not None else contextlib.nullcontext():
        yield


def _leave(error: Preempted) -> None:
    print(f"preempted: {error}; the same command resumes the run", file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    return libc


def _foreign_handler() -> int | None:
    """The address of the handler of JAX's preemption service, which Python does not know of and would replace."""
    if not jax.distributed.is_initialized() or signal.getsignal(signal.SIGTERM) not in (None, signal.SIG_DFL):
        return None
    return _libc().signal(signal.SIGTERM, None)  # the default, until Python's handler takes its place


def _before_fork() -> None:
    """Holds signals back until the child has its own answer to them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _in_child() -> None:
    """A forked child, as of a data loader, is ended by SIGTERM and must not wake its parent."""
    if _current is not None:
        with contextlib.suppress(ValueError):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
