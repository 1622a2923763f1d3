"""Several processes as one job: how they meet, wait for one another, and end together (docs/multi-host.md).

JAX's coordination service, which runs in process 0, carries all of it as keys and values. JAX's own collectives would
not do: a process that waits in one cannot be told that another has failed.
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
from jax._src.distributed import global_state  # the only way to the service's client

from kd_jax.runtime import preemption
from kd_jax.runtime.cluster import TIMEOUT, Place
from kd_jax.runtime.preemption import EXIT_CODE
from kd_jax.types import UserError

_HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
_FOREVER = 10**9  # milliseconds: waiting for another process is bounded by its life, not by time
_SLICE = 500  # milliseconds of waiting between two looks at this process's own preemption flag

_FAILED = "kd_jax/failed"  # set once: by the first process that fails, or empty when all are done
_LEFT = "kd_jax/left"  # by process number: it has seen the failure
_CAUSE = 2.0  # seconds in which another process's message may still show that a crash here was only its consequence
_TO_SAVE = 60.0  # seconds that the others get to write their part of a checkpoint after a preemption
_TO_LEAVE = 15.0  # the same after any other end
_TO_EXIT = 1.0  # seconds from a process's last message to its exit

# What an error means to the user: (exit code, what is printed on standard error).
Describe = Callable[[BaseException], tuple[int, str]]


class _Job:
    """This process as a member of a job."""

    def __init__(self, place: Place, describe: Describe, timeout: float):
        self._place, self._describe = place, describe
        self._exchanges = 0
        self._waiting = False  # for the other processes, with nothing of its own to finish
        self._leaving = threading.RLock()  # held by the thread that ends this process
        # Our signal handler takes the place of JAX's, and `preemption.Agreement` that of its service: JAX's handler
        # swallows every SIGTERM, and a process that works alone cannot ask it.
        jax.config.update("jax_enable_preemption_service", False)
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
                initialization_timeout=int(timeout) + 60,  # past it JAX aborts without an exception
                heartbeat_timeout_seconds=_HEARTBEAT,
            )
        except jax.errors.JaxRuntimeError as error:
            raise UserError(
                f"--coordinator: process {place.process} of {place.processes} cannot be at {place.coordinator} "
                f"({str(error).splitlines()[0]}); name the host of process 0 and a port that is free there"
            ) from error
        finally:
            late.cancel()
        self._client: Any = global_state.client
        preemption.agreement = preemption.Agreement(self._client, place.process, place.processes)
        self._watcher = threading.Thread(target=self._watch, name="other processes", daemon=True)
        self._watcher.start()

    def _nobody_came(self, timeout: float) -> None:
        place = self._place
        problem = "not all processes came to" if place.process == 0 else "there was no process 0 at"
        _print(
            f"error: process {place.process} of {place.processes}: {problem} {place.coordinator} within {timeout:.0f} "
            "s; start all with the same coordinator and number of processes, each with a number of its own, and let "
            "that port through"
        )
        os._exit(2)

    def _watch(self) -> None:
        """Ends this process when another one says that it failed, even if the main thread waits in a collective."""
        try:
            note = self._client.blocking_key_value_get(_FAILED, _FOREVER)
        except jax.errors.JaxRuntimeError:
            return  # the service is gone; JAX's client says so and ends the process
        failed = json.loads(note or "null")
        if failed is None or failed["process"] == self._place.process:
            return
        if failed["code"] == EXIT_CODE:  # all stop at the same poll, so this one may still be saving its part
            end = time.monotonic() + _TO_SAVE
            while not self._waiting and time.monotonic() < end:
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
        note = {"process": self._place.process, "code": code, "text": line}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the service is gone
            self._client.key_value_set(_FAILED, json.dumps(note))
        self._leave(code)

    def _leave(self, code: int) -> NoReturn:
        """Exits at once; process 0 after the others, since the service ends with it and would kill them silently."""
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(f"{_LEFT}/{self._place.process}", "")
            if self._place.process == 0:
                end = time.monotonic() + (_TO_SAVE if code == EXIT_CODE else _TO_LEAVE)
                for other in range(1, self._place.processes):
                    left = max(int(1000 * (end - time.monotonic())), 1)
                    self._client.blocking_key_value_get(f"{_LEFT}/{other}", left)
                time.sleep(_TO_EXIT)  # JAX aborts a process when the service ends, even one that is about to exit
        os._exit(code)

    def finish(self) -> None:
        """Ends the job when all processes are done, so that none can fail any more."""
        self.exchange(b"")
        self._leaving.acquire()
        if self._place.process == 0:
            self._client.key_value_set(_FAILED, "")
        self._watcher.join()
        assert preemption.agreement is not None
        preemption.agreement.close()
        preemption.agreement = None
        jax.distributed.shutdown()

    def exchange(self, value: bytes) -> list[bytes]:
        """`from_all`. The processes take part in the same exchanges, so counting them gives each its own keys."""
        self._exchanges += 1
        folder, mine = "kd_jax/exchange", self._place.process
        self._client.key_value_set_bytes(f"{folder}/{self._exchanges}/{mine}", value)
        self._waiting = True
        try:
            values = [self._get(f"{folder}/{self._exchanges}/{one}") for one in range(self._place.processes)]
        finally:
            self._waiting = False
        if self._exchanges > 1:  # all have given to this exchange, so they have read the one before
            self._client.key_value_delete(f"{folder}/{self._exchanges - 1}/{mine}")
        return values

    def _get(self, key: str) -> bytes:
        """Waits for a value. Python handles signals only between two calls into C++, so the wait is sliced."""
        while True:
            preemption.requested()  # passes a request on to the process that works; this one has nothing to stop
            try:
                return self._client.blocking_key_value_get_bytes(key, _SLICE)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


_job: _Job | None = None


@contextlib.contextmanager
def joined(place: Place | None, describe: Describe, timeout: float = TIMEOUT) -> Iterator[None]:
    """Runs the block in all processes of a job together; place: this one's, None for a job of one.

    An exception in one process ends all of them, with what `describe` says of it and its exit code: with several
    processes it never leaves this context. No JAX backend may have been used before.
    """
    global _job
    if place is None:
        yield
        return
    _job = _Job(place, describe, timeout)
    try:
        jax.devices()  # a backend waits a limited time for those of all processes, so all ask for it at once
        yield
        _job.finish()
    except BaseException as error:
        _job.fail(error)
    _job = None


def from_all(value: bytes) -> list[bytes]:
    """The values of all processes, in their order."""
    return [value] if _job is None else _job.exchange(value)


def from_first(value: Any) -> Any:
    """Process 0's value, a JSON value, in every process; the others' are ignored."""
    return json.loads(from_all(json.dumps(value).encode())[0])


def barrier() -> None:
    """Waits until all processes are here; what process 0 wrote before may be read after it."""
    from_all(b"")


@contextlib.contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Runs the block on process 0 first, then on the others, who find what it wrote."""
    if jax.process_index() != 0:
        barrier()
    yield
    if jax.process_index() == 0:
        barrier()


def _print(text: str) -> None:
    # Not sys.stderr, which a study redirects to the log of a stage.
    print(text, file=sys.__stderr__ or sys.stderr, flush=True)
