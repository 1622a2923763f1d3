"""The state of a study in one line, from its files alone: whoever runs it, wherever it runs."""

import math
import pathlib
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kd_jax.runtime.files import read_json, read_json_lines
from kd_jax.runtime.paths import need_local
from kd_jax.study.attempts import FAILED, RUNNING, STOPPED, Attempt, read_attempt
from kd_jax.study.job_plan import PHASES, REPORT, Planned, is_done, planned
from kd_jax.study.plan import Stage
from kd_jax.study.run import Study, read_seconds

METRICS = "metrics.jsonl"
DONE, LEFT = "done", "left"
STATES = (DONE, RUNNING, FAILED, STOPPED, LEFT)


@dataclass(frozen=True)
class Running:
    """A stage that is under way; step and steps are 0 where it has none or none is written yet."""

    one: Planned
    attempt: Attempt
    wrote: float  # seconds since the epoch
    step: int = 0
    steps: int = 0
    loss: float | None = None
    seconds_per_step: float | None = None


@dataclass(frozen=True)
class Status:
    """counts: of each phase the stages in each of STATES. left: seconds of work, None where no stage tells.

    spent: seconds of finished stages and of those under way. untold: stages of a kind of which none has finished.
    """

    name: str
    counts: dict[str, Counter]
    running: list[Running]
    failed: list[tuple[Planned, Attempt]]
    started: float | None
    now: float
    spent: float
    left: float | None
    untold: int
    others: int = 0  # folders of stages that this config does not have

    @property
    def finished(self) -> bool:
        return all(states[DONE] == sum(states.values()) for states in self.counts.values())


def status_of(study: Study, now: float | None = None) -> Status:
    """Reads the state of every stage."""
    need_local(study.workdir, "a study whose state can be told")
    now = time.time() if now is None else now
    stages = [one for one in planned(study) if one.phase != REPORT]
    counts = {phase: Counter() for phase in PHASES if any(one.phase == phase for one in stages)}
    running, failed, open_stages = [], [], []
    seconds: dict[tuple, list[float]] = {}
    starts = []
    spent = 0.0
    for one in stages:
        attempt = read_attempt(study.workdir, one.stage.folder) if one.stage and not one.deferred else None
        if attempt is not None:
            starts.append(attempt.started)
        state = DONE if is_done(study, one) else LEFT if attempt is None else attempt.outcome
        # Finished without its marker is one whose folder was taken away since.
        state = state if state in STATES else LEFT
        counts[one.phase][state] += 1
        assert one.stage is not None, "the report is left out"
        if state == DONE:
            took = read_seconds(study.folder(one.stage))
            if not math.isnan(took):
                spent += took
                for kind in _kinds(one.stage):
                    seconds.setdefault(kind, []).append(took)
            continue
        open_stages.append(one)
        if state == RUNNING and attempt is not None:
            spent += now - attempt.started
            running.append(_running(study.folder(one.stage), one, attempt))
        elif state == FAILED and attempt is not None:
            failed.append((one, attempt))
    left, untold = _seconds_left(open_stages, {one.one.key: one for one in running}, seconds, now)
    return Status(
        name=study.config.study.name,
        counts=counts,
        running=sorted(running, key=lambda one: -one.wrote),
        failed=failed,
        started=min(starts, default=None),
        now=now,
        spent=spent,
        left=left,
        untold=untold,
        others=_others(study, stages),
    )


def _running(folder: pathlib.Path, one: Planned, attempt: Attempt) -> Running:
    """What a stage that is under way has written."""
    files = [file.stat().st_mtime for file in _newest_first(folder)]
    wrote = max([attempt.started, *files])
    places = [folder, *sorted((folder / "domains").glob("*"), key=lambda place: place.stat().st_mtime)]
    rows = next((rows for place in reversed(places) if (rows := read_json_lines(place / METRICS, growing=True))), [])
    steps = _steps(folder, one.stage)
    if not rows:
        return Running(one, attempt, wrote, steps=steps)

    def last(name: str) -> Any:
        return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)

    step = max((row["step"] for row in rows), default=0)
    return Running(one, attempt, wrote, step, steps, last("loss"), last("time/seconds_per_step"))


def _newest_first(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that tell that a stage is alive: of its own folder and one below, not of every checkpoint."""
    try:
        inside = list(folder.iterdir())
        below = [file for place in inside if place.is_dir() for file in place.iterdir()]
    except FileNotFoundError:  # not begun, or renamed just now
        return []
    return [file for file in (*inside, *below) if file.exists()]


def _block(stage: Stage) -> Any:
    """The job's block of a training stage's config, None of another's."""
    name = stage.command.split("_")[0]
    return stage.config[name] if name in ("pretrain", "distill", "finetune") else None


def _steps(folder: pathlib.Path, stage: Stage | None) -> int:
    """The steps of a training stage, 0 where they are not known; with epochs they follow from the utterances."""
    block = _block(stage) if stage else None
    if block is None:
        return 0
    if "epochs" not in block or not block.epochs:
        return block.steps
    run = folder / "run.json"
    if not run.is_file():
        return 0
    count = read_json(run).get("train_utterances", 0)  # none where each domain has a model of its own
    return math.ceil(block.epochs * count / block.batch_size)


def _kinds(stage: Stage) -> tuple[tuple, ...]:
    """What stages that take about as long have in common, the most telling first."""
    block = _block(stage)
    if block is None:
        return ((stage.command,),)
    which = block.model if "model" in block else ""
    length = (block.epochs or block.steps) if "epochs" in block else block.steps
    cached = "teacher_cache" in stage.config and bool(stage.config.teacher_cache)
    shape = str(stage.config.student) if stage.command == "distill" else ""  # an intermediate is another student
    whole = (stage.command, which, length, block.batch_size, cached, shape)
    return (whole, (stage.command, which))


def _seconds_left(
    open_stages: list[Planned], running: dict[str, Running], seconds: dict[tuple, list[float]], now: float
) -> tuple[float | None, int]:
    """(seconds of work in all stages that are not finished, stages of which nothing tells how long they take)."""
    total, untold = 0.0, 0
    for one in open_stages:
        assert one.stage is not None, "the report is left out"
        here = running.get(one.key)
        if here is not None and here.seconds_per_step and here.steps:
            total += (here.steps - here.step) * here.seconds_per_step
            continue
        known = next((seconds[kind] for kind in _kinds(one.stage) if kind in seconds), None)
        if known is None:
            untold += 1
            continue
        mean = sum(known) / len(known)
        total += max(mean - (now - here.attempt.started), 0.0) if here is not None else mean
    return (None if open_stages and untold == len(open_stages) else total), untold


def _others(study: Study, stages: list[Planned]) -> int:
    """Folders of stages that this config does not have: of an earlier config, or of the other recipes."""
    mine = {one.stage.folder for one in stages if one.stage}
    try:
        return sum(place.name not in mine for place in (study.workdir / "stages").iterdir() if place.is_dir())
    except FileNotFoundError:
        return 0


def line(status: Status) -> str:
    """The status as one line."""
    totals = sum(status.counts.values(), Counter())
    numbers = ", ".join(f"{totals[state]} {state}" for state in STATES if totals[state] or state in (DONE, LEFT))
    phases = " ".join(f"{phase} {states[DONE]}/{sum(states.values())}" for phase, states in status.counts.items())
    parts = [f"{status.name}: {numbers} [{phases}]"]
    if status.running:
        first, *more = status.running
        parts.append(_told(first, status.now) + (f" (and {len(more)} more)" if more else ""))
    if status.failed:
        one, attempt = status.failed[0]
        parts.append(f"{one.name} failed: {_short(attempt.message, 100)}")
    if status.started is not None:
        parts.append(f"begun {duration(status.now - status.started)} ago, {duration(status.spent)} of work done")
    if not status.finished:
        parts.append(_told_left(status))
    if not totals[DONE] and status.others:
        parts.append(f"{status.others} stages of another config are here: give the overrides of the first start")
    return "; ".join(parts)


def _told_left(status: Status) -> str:
    if status.left is None:
        return "time left unknown until a stage of the same kind has finished"
    untold = f", and {status.untold} stages of kinds that are new" if status.untold else ""
    at_once = max(len(status.running), 1)
    text = f"about {duration(status.left)} of work left{untold}"
    return text if at_once == 1 else f"{text}, {duration(status.left / at_once)} with {at_once} at once"


def _told(one: Running, now: float) -> str:
    step = f" step {one.step}/{one.steps or '?'}" if one.step or one.steps else ""
    loss = f", loss {one.loss:.4f}" if one.loss is not None else ""
    colon = ":" if step else ""
    return f"{one.one.name}{colon}{step}{loss}, wrote {duration(now - one.wrote)} ago on {one.attempt.host}"


def duration(seconds: float) -> str:
    """3700 as "1 h 2 min"."""
    seconds = max(round(seconds), 0)
    if seconds < 100:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes / 1440:.1f} days"


def _short(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"
