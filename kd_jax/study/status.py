"""The state of a study in one line, from its files alone, whichever machines run it."""

import math
import pathlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kd_jax.config.training import Finetune
from kd_jax.runtime.files import read_json_lines, read_json_object
from kd_jax.runtime.paths import need_local
from kd_jax.study.attempts import FAILED, RUNNING, STOPPED, Attempt, read_attempt
from kd_jax.study.plan import PHASES, REPORT, Stage
from kd_jax.study.run import Study, read_seconds
from kd_jax.study.timing import Timing, duration

METRICS = "metrics.jsonl"
DONE, LEFT = "done", "left"
STATES = (DONE, RUNNING, FAILED, STOPPED, LEFT)


@dataclass(frozen=True)
class Running:
    """A stage that is running; step and steps are 0 where it has none or has not written any."""

    stage: Stage
    attempt: Attempt
    wrote: float  # seconds since the epoch
    step: int
    steps: int
    loss: float | None
    seconds_per_step: float | None


@dataclass(frozen=True)
class Status:
    """The state of all stages; times are seconds.

    counts: phase -> stages in each of STATES. spent: time of finished and running stages. left: estimated work left,
    None while nothing is known. unknown: unfinished stages of kinds of which none has finished. others: folders of
    stages that this config does not have.
    """

    name: str
    counts: dict[str, Counter]
    running: list[Running]
    failed: list[tuple[Stage, Attempt]]
    started: float | None
    now: float
    spent: float
    left: float | None
    unknown: int
    others: int

    @property
    def finished(self) -> bool:
        return all(states[DONE] == sum(states.values()) for states in self.counts.values())


def status_of(study: Study, now: float | None = None) -> Status:
    """Reads the state of every stage. Raises UserError for a study on a remote store."""
    need_local(study.workdir, "the workdir for --status")
    now = time.time() if now is None else now
    stages = [stage for stage in study.planned() if stage.phase != REPORT]
    counts = {phase: Counter() for phase in PHASES if any(stage.phase == phase for stage in stages)}
    running: dict[str, Running] = {}
    failed, unfinished, starts = [], [], []
    timing = Timing()
    spent = 0.0
    for stage in stages:
        attempt = None if stage.deferred else read_attempt(study.workdir, stage.folder)
        if attempt is not None:
            starts.append(attempt.started)
        if study.done(stage):
            counts[stage.phase][DONE] += 1
            took = read_seconds(study.folder(stage))
            if not math.isnan(took):
                spent += took
                timing.note(stage, took)
            continue
        unfinished.append(stage)
        # An attempt that finished without leaving DONE is one whose folder was deleted since.
        state = attempt.outcome if attempt and attempt.outcome in STATES else LEFT
        counts[stage.phase][state] += 1
        if attempt and state == RUNNING:
            spent += max(now - attempt.started, 0.0)  # clocks jump
            running[stage.key] = _running(study.folder(stage), stage, attempt)
        elif attempt and state == FAILED:
            failed.append((stage, attempt))
    newest = sorted(running.values(), key=lambda one: -one.wrote)
    left, unknown = _seconds_left(unfinished, running, timing, now)
    others = len(set(_names(study.workdir / "stages")) - {stage.folder for stage in stages})
    started = min(starts, default=None)
    return Status(study.settings.name, counts, newest, failed, started, now, spent, left, unknown, others)


def _running(folder: pathlib.Path, stage: Stage, attempt: Attempt) -> Running:
    """What a running stage has written."""
    # Files of the folder and one level below, not of every checkpoint, which would take long.
    files = [file for name in _names(folder) for file in (folder / name, *(folder / name).glob("*"))]
    wrote = max([attempt.started, *(file.stat().st_mtime for file in files if file.exists())])
    # With finetune.domain="each" every domain writes metrics of its own; the newest is the one that runs.
    folders = [folder, *sorted((folder / "domains").glob("*"), key=lambda path: path.stat().st_mtime)]
    found = (read_json_lines(path / METRICS, growing=True) for path in reversed(folders))
    rows = next((rows for rows in found if rows), [])

    def last(name: str) -> Any:
        return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)

    step = max((row["step"] for row in rows), default=0)
    return Running(stage, attempt, wrote, step, _steps(folder, stage), last("loss"), last("time/seconds_per_step"))


def _names(folder: pathlib.Path) -> list[str]:
    """The entries of a folder; none if it does not exist or was renamed just now."""
    try:
        return [entry.name for entry in folder.iterdir()]
    except FileNotFoundError:
        return []


def _steps(folder: pathlib.Path, stage: Stage) -> int:
    """The steps of a training stage, 0 where they are not known; with epochs they follow from the utterances."""
    job = stage.job
    if job is None or not isinstance(job, Finetune) or not job.epochs:
        return job.steps if job else 0
    run = folder / "run.json"
    # The key is missing where each domain has a model of its own.
    count = read_json_object(run).get("train_utterances", 0) if run.is_file() else 0
    return math.ceil(job.epochs * count / job.batch_size)


def _seconds_left(
    unfinished: list[Stage], running: Mapping[str, Running], timing: Timing, now: float
) -> tuple[float | None, int]:
    """(seconds of work in the unfinished stages, number of stages whose time cannot be estimated)."""
    total, unknown = 0.0, 0
    for stage in unfinished:
        here = running.get(stage.key)
        if here is not None and here.seconds_per_step and here.steps:
            total += (here.steps - here.step) * here.seconds_per_step
            continue
        known = timing.expected(stage)
        if known is None:
            unknown += 1
            continue
        total += max(known - max(now - here.attempt.started, 0.0), 0.0) if here is not None else known
    return (None if unfinished and unknown == len(unfinished) else total), unknown


def line(status: Status) -> str:
    """The status as one line."""
    totals = sum(status.counts.values(), Counter())
    numbers = ", ".join(f"{totals[state]} {state}" for state in STATES if totals[state] or state in (DONE, LEFT))
    phases = " ".join(f"{phase} {states[DONE]}/{sum(states.values())}" for phase, states in status.counts.items())
    parts = [f"{status.name}: {numbers} [{phases}]"]
    if status.running:
        first, *more = status.running
        step = f": step {first.step}/{first.steps or '?'}" if first.step or first.steps else ""
        loss = f", loss {first.loss:.4f}" if first.loss is not None else ""
        wrote = f", wrote {duration(status.now - first.wrote)} ago on {first.attempt.host}"
        parts.append(first.stage.name + step + loss + wrote + (f" (and {len(more)} more)" if more else ""))
    if status.failed:
        stage, attempt = status.failed[0]
        message = " ".join(attempt.message.split())
        parts.append(f"{stage.name} failed: {message if len(message) <= 100 else message[:99] + '…'}")
    if status.started is not None:
        parts.append(f"started {duration(status.now - status.started)} ago, {duration(status.spent)} of work done")
    if status.left is None:
        parts.append("time left unknown until a stage of the same kind has finished")
    elif not status.finished:
        text = f"about {duration(status.left)} of work left"
        text += f", and {status.unknown} stages of kinds not yet timed" if status.unknown else ""
        at_once = len(status.running)
        parts.append(text if at_once < 2 else f"{text}, {duration(status.left / at_once)} with {at_once} at once")
    if not totals[DONE] and status.others:
        parts.append(f"{status.others} stages of another config are here: repeat the overrides of the first start")
    return "; ".join(parts)
