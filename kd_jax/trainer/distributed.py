"""Several processes as one job: how they find each other, wait for one another, and end together.

JAX's coordination service, which runs in process 0, carries all of it; docs/multi-host.md tells the whole story.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

import jax
from jax._src import clusters  # JAX's detection of clusters, of which its public function tells nothing
from jax._src import distributed as runtime  # the client of the service, which has no public name

from kd_jax.trainer.preemption import EXIT_CODE, Preempted
from kd_jax.types import UserError

TIMEOUT = 300.0  # seconds in which all processes must have come
HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
FOREVER = 10**9  # milliseconds: waiting for another process is bounded by its life, not by time

_FAILED = "kd_jax/failed"  # set once: by the first process that fails, or empty at a good end
_LEFT = "kd_jax/left"  # by number, the processes that have seen it
_CAUSE = 2.0  # seconds for another process's message to come before a crash here is taken for the cause
_LAST = {EXIT_CODE: 60.0}  # seconds that process 0 waits for the others to leave, by exit code; else:
_LAST_ELSE = 10.0

# What an error means to the user: (exit code, what is printed on standard error).
Describe = Callable[[BaseException], tuple[int, str]]


class Place(NamedTuple):
    """One process's place in a job."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # of this host, by number; None: all of them


def from_flags(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place that the flags name, or else the environment; None for a process on its own.

    processes=1 alone says that this process is on its own, whatever the environment says. Raises UserError.
    """
    if processes == 1:
        return None
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None or value == ""]
    if len(missing) == len(given):
        return from_environment()
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: missing beside {' and '.join(sorted(given.keys() - set(missing)))}; give all of "
            "--coordinator=HOST:PORT --processes=N --process=I, or none"
        )
    assert coordinator is not None and processes is not None and process is not None
    return _checked(Place(coordinator, processes, process), "--")


def from_environment() -> Place | None:
    """The place that a TPU pod, SLURM, Open MPI or an indexed Kubernetes job gives this process, found as JAX does.

    A process that has a host to itself takes all its devices; of several on a host each takes the device of its
    number. None outside of them and for a job of one process.
    """
    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or _irrelevant(cluster.__name__) or not cluster.is_env_present():
            continue
        name = cluster.__name__.removesuffix("Cluster")
        try:
            processes = cluster.get_process_count()
            if processes == 1:
                return None
            coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
                timeout_secs=int(TIMEOUT), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
            number = cluster.get_local_process_id()
            devices = None if number is None or _alone_on_its_host(processes) else (number,)
            place = Place(coordinator, processes, cluster.get_process_id(), devices)
        except Exception as error:
            message = " ".join(str(error).split())
            raise UserError(
                f"the environment looks like {name}, but does not say where this process belongs ({message}); give "
                "--coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to run alone"
            ) from error
        return _checked(place, f"{name}: ")
    return None


def _irrelevant(name: str) -> bool:
    """Whether a kind of cluster need not be asked: a pod without an index is no part of a job, and asking costs."""
    if name.startswith("K8s"):
        return "JOB_COMPLETION_INDEX" not in os.environ
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return "Tpu" in name and bool(platforms) and "tpu" not in platforms


def _alone_on_its_host(processes: int) -> bool:
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return os.environ.get("SLURM_STEP_NUM_NODES") == str(processes)


def _checked(place: Place, prefix: str) -> Place:
    port = re.fullmatch(r".+:(\d+)", place.coordinator)
    if not port or not 0 < int(port.group(1)) < 2**16:
        raise UserError(f"{prefix}coordinator: {place.coordinator!r} is no HOST:PORT; name the host of process 0")
    if place.processes < 1:
        raise UserError(f"{prefix}processes: {place.processes} is below 1; give the number of processes of the job")
    if not 0 <= place.process < place.processes:
        raise UserError(
            f"{prefix}process: {place.process} is none of {place.processes} processes; count from 0 to "
            f"{place.processes - 1}"
        )
    return place


class _Job:
    """This process as a member of a job."""

    def __init__(self, place: Place, describe: Describe, timeout: float):
        self.place, self._describe = place, describe
        self.waiting = False  # for the other processes, with nothing of its own to finish
        self._leaving = threading.Lock()  # held by the thread that ends this process
        late = threading.Timer(timeout, self._nobody_came, (timeout,))
        late.daemon = True
        late.start()
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=int(timeout) + 60,  # past it JAX aborts without a sentence
            heartbeat_timeout_seconds=HEARTBEAT,
        )
        late.cancel()
        self._client: Any = runtime.global_state.client
        self._watcher = threading.Thread(target=self._watch, name="other processes", daemon=True)
        self._watcher.start()

    def _nobody_came(self, timeout: float) -> None:
        place = self.place
        here = f"process {place.process} of {place.processes}"
        problem = f"{place.processes} processes were not there" if place.process == 0 else "process 0 was not there"
        _print(
            f"error: {here}: within {timeout:.0f} s {problem} at {place.coordinator}; start all with the same "
            "coordinator and number of processes, each with a number of its own, and let its port through"
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
        if not isinstance(error, UserError) and code != EXIT_CODE:
            # The end of another process shows here as a broken connection. Its own message, if it comes, is the cause.
            time.sleep(_CAUSE)
        self._leaving.acquire()
        _print(text)
        note = {"process": self.place.process, "code": code, "text": text.strip().splitlines()[-1]}
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
