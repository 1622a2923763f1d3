"""Who runs a stage, since when, and how it ended: `attempts/<stage>.json` of a study, locked while the stage runs."""

import contextlib
import datetime
import functools
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from kd_jax.runtime.copies import on_this_host
from kd_jax.runtime.lock import is_free, take
from kd_jax.types import UserError

RUNNING, FINISHED, FAILED, STOPPED = "running", "finished", "failed", "stopped"  # stopped: preempted or interrupted

_LONGEST_MESSAGE = 500  # characters


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
        """The attempt as JSON values, with its times also in ISO 8601 for human readers."""
        return {**asdict(self), "started_at": _iso(self.started), "ended_at": _iso(self.ended)}


def path_of(workdir: pathlib.Path, stage: str) -> pathlib.Path:
    """The file of a stage's attempts; on this host for a study on a remote store, which has no locks."""
    return on_this_host(workdir) / "attempts" / f"{stage}.json"


@contextlib.contextmanager
def attempt(workdir: pathlib.Path, stage: str, *, writes: bool = True) -> Iterator[None]:
    """Notes that this process runs a stage, and how that ends. Raises UserError when another process runs it.

    writes: of several processes that run a stage together, only one notes it. Where the file system has no locks, two
    attempts at the same time go unnoticed.
    """
    if not writes:
        yield
        return
    path = path_of(workdir, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    # flock and not a marker file: the kernel releases it however the process ends, so no stale lock blocks a resume.
    with _opened(path) as file:
        if not take(file):
            other = read_attempt(workdir, stage)
            who = f"process {other.pid} on {other.host}" if other else "another process"
            raise UserError(f"stage {stage}: {who} is running it; wait until it ends, or stop it first")
        here = Attempt(RUNNING, socket.gethostname(), os.getpid(), time.time())
        note = functools.partial(_note, file)
        note(here)
        try:
            yield
        except BaseException as error:  # Preempted and KeyboardInterrupt are no Exception
            outcome = FAILED if isinstance(error, Exception) else STOPPED
            message = f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]
            note(replace(here, outcome=outcome, ended=time.time(), message=message))
            raise
        note(replace(here, outcome=FINISHED, ended=time.time()))


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _note(descriptor: int, one: Attempt) -> None:
    # In place, since replacing the file would leave the lock on the old one; and in one write that covers the old
    # record, so that a kill leaves either one.
    text = (json.dumps(one.describe(), indent=2) + "\n").encode()
    os.pwrite(descriptor, text.ljust(os.fstat(descriptor).st_size), 0)
    os.ftruncate(descriptor, len(text))


def make_up(workdir: pathlib.Path, stage: str, ended: Callable[[], float]) -> float | None:
    """Records as finished an attempt that was killed after the end of its stage; returns the seconds that it took.

    None if there is no such attempt. ended(): when the stage ended, in seconds since the epoch.
    """
    found = read_attempt(workdir, stage)
    if found is None or found.outcome != STOPPED:
        return None
    with _opened(path_of(workdir, stage)) as file:
        finished = replace(found, outcome=FINISHED, ended=ended(), message="")
        if take(file):
            _note(file, finished)
    return max(finished.ended - found.started, 0.0)


def read_attempt(workdir: pathlib.Path, stage: str) -> Attempt | None:
    """The last attempt at a stage; None before the first. One whose process is gone is "stopped".

    Only a process of this machine can be found gone; another machine's note is believed.
    """
    path = path_of(workdir, stage)
    try:
        with open(path, encoding="utf-8") as file:
            values = json.loads(file.read())
            found = Attempt(**{field.name: values[field.name] for field in fields(Attempt)})
            gone = found.outcome == RUNNING and found.host == socket.gethostname() and is_free(file.fileno())
    except (FileNotFoundError, ValueError, LookupError, TypeError):  # no record, or one that is being written
        return None
    lost = {"outcome": STOPPED, "ended": path.stat().st_mtime, "message": "its process is gone"}
    return replace(found, **lost) if gone else found


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec="seconds") if seconds else ""
