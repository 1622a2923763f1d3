"""Who runs a stage, since when, and how it ended: `attempts/<stage>.json` of a study, locked while the stage runs."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kd_jax.runtime.copies import on_this_host
from kd_jax.types import UserError

FOLDER = "attempts"
RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"  # stopped: preempted or interrupted

_LONGEST_MESSAGE = 500  # characters
_SECONDS_TO_WAIT = 2.0  # for the lock, which whoever asks for a study's state holds for an instant
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Attempt:
    """The last attempt at a stage; times are seconds since the epoch, `ended` is 0 while it runs."""

    outcome: str
    host: str
    pid: int
    started: float
    ended: float = 0.0
    message: str = ""

    def describe(self) -> dict[str, Any]:
        """The attempt as JSON values, its times for people beside those for programs."""
        times = {f"{name}_at": _written(getattr(self, name)) for name in ("started", "ended")}
        return {**asdict(self), **times}


def place_of(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """Where a study notes the attempts at a stage: on this host for a study on a remote store, which has no locks."""
    return on_this_host(workdir) / FOLDER / f"{stage}.json"


@contextlib.contextmanager
def attempt(workdir: pathlib.Path, stage: str, *, writes: bool = True) -> Iterator[None]:
    """Notes that this process runs a stage, and how that ends. Raises UserError when another process runs it.

    writes: of several processes that run a stage together, only one notes it. The lock goes with the process, however
    it ends. Where the filesystem has no locks, two attempts at once are not noticed.
    """
    if not writes:
        yield
        return
    place = place_of(workdir, stage)
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "a+", encoding="utf-8") as file:
        if not _lock(file.fileno()):
            other = read_attempt(workdir, stage)
            who = f"process {other.pid} on {other.host}" if other else "another process"
            raise UserError(f"stage {stage}: {who} is running it; wait for its end, or end it first")
        one = {"host": socket.gethostname(), "pid": os.getpid(), "started": time.time()}

        def note(outcome: str, message: str = "", ended: float = 0.0) -> None:
            values = Attempt(outcome=outcome, message=message[:_LONGEST_MESSAGE], ended=ended, **one).describe()
            file.seek(0)
            file.truncate()
            file.write(json.dumps(values, indent=2) + "\n")
            file.flush()

        note(RUNNING)
        try:
            yield
        except BaseException as error:
            # A preemption is no Exception, as an interruption is none.
            outcome = FAILED if isinstance(error, Exception) else STOPPED
            note(outcome, f"{type(error).__name__}: {error}", time.time())
            raise
        note(FINISHED, ended=time.time())


def read_attempt(workdir: pathlib.Path, stage: str) -> Attempt | None:
    """The last attempt at a stage; None before the first. One whose process is gone is "stopped".

    Only a process of this machine can be found gone: of another machine's its note is believed.
    """
    place = place_of(workdir, stage)
    try:
        with open(place, encoding="utf-8") as file:
            values = json.loads(file.read())
            found = Attempt(**{name: values[name] for name in Attempt.__dataclass_fields__})
            gone = found.outcome == RUNNING and found.host == socket.gethostname() and _is_free(file.fileno())
    except (FileNotFoundError, json.JSONDecodeError):  # no note, or one that is being written
        return None
    if not gone:
        return found
    return Attempt(STOPPED, found.host, found.pid, found.started, place.stat().st_mtime, "its process is gone")


def _lock(descriptor: int) -> bool:
    """Takes the lock, or says that another process has it."""
    until = time.monotonic() + _SECONDS_TO_WAIT
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return True
            if time.monotonic() > until:
                return False
        time.sleep(0.05)


def _is_free(descriptor: int) -> bool:
    """Whether nobody has the lock; False where the filesystem has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


def _written(seconds: float) -> str:
    if not seconds:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds")
