"""Several processes as one job: how they meet, wait for one another, and end together.

JAX's coordination service, which runs in process 0, carries all of it; docs/multi-host.md tells the whole story.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed as runtime  # the client of the service, which has no public name

from kd_jax.runtime.cluster import TIMEOUT, Place
from kd_jax.runtime.preemption import EXIT_CODE, Preempted
from kd_jax.types import UserError

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
FOREVER = 10**9  # milliseconds: waiting for another process is bounded by its life, not by time

_FAILED = "kd_jax/failed"  # set once: by the first process that fails, or empty at a good end
_LEFT = "kd_jax/left"  # by number, the processes that have seen it
_CAUSE = 2.0  # seconds for another process's message to come before a crash here is taken for the cause
_LAST = {EXIT_CODE: 60.0}  # seconds that process 0 waits for the others to leave, by exit code; else:
_LAST_ELSE = 5.0

# What an error means to the user: (exit code, what is printed on standard error).
Describe = Callable[[BaseException], tuple[int, str]]


class _Job:
    """This process as a member of a job."""

    def __init__(self, place: Place, describe: Describe, timeout: float):
        self.place, self._describe = place, describe
        self.waiting = False  # for the other processes, with nothing of its own to finish
        self._leaving = threading.RLock()  # held by the thread that ends this process
        late = threading.Timer(timeout, self._nobody_came, (timeout,))
        late.daemon = True
        late.start()
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.processes,
                place.process,
                local_device_ids=place.devices,
                cluster_detection_method="deactivate",
                initialization_timeout=int(timeout) + 60,  # past it JAX aborts without a sentence
                heartbeat_timeout_seconds=HEARTBEAT,
            )
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"--coordinator: process {place.process} of {place.processes} cannot be at {place.coordinator} "
                f"({str(error).splitlines()[0]}); name the host of process 0 and a port that is free there"
            ) from error
        finally:
            late.cancel()
        self._client: Any = runtime.global_state.client
        self._watcher = threading.Thread(target=self._watch, name="other processes", daemon=True)
        self._watcher.start()

    def _nobody_came(self, timeout: float) -> None:
        place = self.place
        problem = "not all processes came to" if place.process == 0 else "there was no process 0 at"
        _print(
            f"error: process {place.process} of {place.processes}: {problem} {place.coordinator} within {timeout:.0f} "
            "s; start all with the same coordinator and number of processes, each with a number of its own, and let "
            "that port through"
        )
        os._exit(2)

    def _watch(self) -> None:
        """Ends this process when another one says that it failed, whatever the main thread is waiting for."""
        try:
            note = self._client.blocking_key_value_get(_FAILED, FOREVER)
        except jax.errors.JaxRuntimeError:
            return  # the service is gone; JAX's client says so and ends the process
        if not note:
            return
        failed = json.loads(note)
        if failed["process"] == self.place.process:
            return
        if failed["code"] == EXIT_CODE:  # most likely all are preempted, and this one is saving its part
            end = time.monotonic() + _LAST[EXIT_CODE]
            while not self.waiting and time.monotonic() < end:
                time.sleep(0.05)
        self._leaving.acquire()
        kind, _, text = failed["text"].partition(": ")
        _print(f"{kind}: process {failed['process']}: {text}")
        self._leave(failed["code"])

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others why this process ends, and ends it."""
        code, text = self._describe(error)
        line = text.strip()
        if not isinstance(error, UserError) and code != EXIT_CODE:
            # The end of another process shows here as a broken connection. Its own message, if it comes, is the cause.
            time.sleep(_CAUSE)
            line = f"error: {line.splitlines()[-1]}"  # of a stack trace
        self._leaving.acquire()
        _print(text)
        note = {"process": self.place.process, "code": code, "text": line}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the service is gone
            self._client.key_value_set(_FAILED, json.dumps(note))
        self._leave(code)

    def _leave(self, code: int) -> NoReturn:
        """Exits at once, without the barriers of a good end; process 0 after the others, since it has the service."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_LEFT}/{self.place.process}", "")
            if self.place.process == 0:
                end = time.monotonic() + _LAST.get(code, _LAST_ELSE)
                for other in range(1, self.place.processes):
                    left = max(int(1000 * (end - time.monotonic())), 1)
                    self._client.blocking_key_value_get(f"{_LEFT}/{other}", left)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def finish(self) -> None:
        """The good end: all are here, so none can fail any more."""
        barrier("the end")
        self._leaving.acquire()
        if self.place.process == 0:
            self._client.key_value_set(_FAILED, "")
        self._watcher.join()
        jax.distributed.shutdown()


_job: _Job | None = None


@contextlib.contextmanager
def joined(place: Place | None, describe: Describe, timeout: float = TIMEOUT) -> Iterator[None]:
    """What is done inside is done by all processes of a job together; place: this one's, None for a job of one.

    An exception in one process ends all of them, with what `describe` says of it and its exit code: where there are
    several, it never leaves this context. No backend may have been used before.
    """
    global _job
    if place is None:
        yield
        return
    _job = _Job(place, describe, timeout)
    try:
        jax.devices()  # a backend waits for those of all processes, and only so long: all ask for it at once
        yield
        _job.finish()
    except BaseException as error:
        _job.fail(error)
    _job = None


def leave(error: Preempted) -> NoReturn:
    """Ends this process from any of its threads, and with it the others of its job."""
    if _job is not None:
        _job.fail(error)
    _print(f"preempted: {error}; the same command resumes the run")
    sys.stdout.flush()
    os._exit(EXIT_CODE)


def barrier(name: str) -> None:
    """Waits until all processes are at this place; what process 0 wrote before it may be read after it."""
    client = runtime.global_state.client
    if client is not None:
        with _waiting():
            client.wait_at_barrier(f"kd_jax/{name}", FOREVER)


@contextlib.contextmanager
def first_goes_ahead(name: str) -> Iterator[None]:
    """What is done inside is done by process 0 and then by the others, who find what it wrote."""
    if jax.process_index() != 0:
        barrier(name)
    yield
    if jax.process_index() == 0:
        barrier(name)


def from_first(value: Any) -> Any:
    """Process 0's value, a JSON value, in every process; the others' are ignored."""
    client = runtime.global_state.client
    text = json.dumps(value)
    if client is not None:
        key = f"kd_jax/first/{_next()}"
        if jax.process_index() == 0:
            client.key_value_set(key, text)
        with _waiting():
            text = client.blocking_key_value_get(key, FOREVER)
    return json.loads(text)


def from_all(value: bytes) -> list[bytes]:
    """The values of all processes, in their order."""
    client = runtime.global_state.client
    if client is None:
        return [value]
    place = f"kd_jax/all/{_next()}"
    client.key_value_set_bytes(f"{place}/{jax.process_index()}", value)
    with _waiting():
        keys = [f"{place}/{process}" for process in range(jax.process_count())]
        values = [client.blocking_key_value_get_bytes(key, FOREVER) for key in keys]
    barrier(place)
    client.key_value_delete(f"{place}/{jax.process_index()}")
    return values


_exchanges = 0


def _next() -> int:
    """The number of an exchange: the same in all processes, since they take part in all of them."""
    global _exchanges
    _exchanges += 1
    return _exchanges


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
    if _job is None:
        yield
        return
    _job.waiting = True
    try:
        yield
    finally:
        _job.waiting = False


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
