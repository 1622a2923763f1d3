"""Running a study: finished stages are skipped, interrupted ones resume, and recipes are chosen on dev."""

import contextlib
import dataclasses
import datetime
import gc
import itertools
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from kd_jax.jobs.trained import whole
from kd_jax.runtime.files import read_json, read_json_object, write_json
from kd_jax.runtime.paths import is_there
from kd_jax.runtime.preemption import interruptible
from kd_jax.study.attempts import attempt, make_up, path_of
from kd_jax.study.plan import FITTED, PHASES, REPORT, STAGE, Keys, Planner, Recipe, Stage, Student
from kd_jax.study.timing import Timing, duration
from kd_jax.study.workers import Workers
from kd_jax.types import UserError

SECONDS = "seconds.json"  # of a stage: its wall time

# Runs one command: (its name, its config as plain values, its directory).
RunStage = Callable[[str, dict[str, Any], pathlib.Path], None]


class Study:
    """The stages of one study under `workdir/stages`, and what they wrote.

    values: the whole config. workers: run independent stages at the same time. writes: whether this process writes the
    study's own files; of several that run the study together, one does. agree(value): broadcasts that process's JSON
    value to all of them.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        workdir: pathlib.Path,
        run_stage: RunStage,
        keys: Keys,
        *,
        workers: Workers | None = None,
        writes: bool = True,
        agree: Callable[[Any], Any] = lambda value: value,
    ):
        self.values, self.workdir = values, workdir
        self.planner = Planner(values, keys)
        self.settings = self.planner.settings
        self.chosen: dict[tuple[str, str], Recipe] = {}  # by student's name and task, once the search is finished
        self.searched: list[dict[str, Any]] = []  # every recipe with its dev score, for the report
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}  # by folder, since the recipes of one student share a name
        self._run_stage, self._workers, self._writes, self._agree = run_stage, workers, writes, agree

    def folder(self, stage: Stage) -> pathlib.Path:
        return self.workdir / "stages" / stage.folder

    def done(self, stage: Stage) -> bool:
        """Whether a stage is finished; the report never is, since it costs little and is written anew."""
        return not stage.deferred and stage.command != REPORT and is_there(self.folder(stage) / "DONE")

    def planned(self) -> list[Stage]:
        """All stages, with the recipes that can be chosen by now. Reads which stages are finished and dev scores."""
        self.choose()
        return self.planner.plan(self.chosen)

    def run(self, flops: Callable[[], Mapping[str, float]] = dict, *, quiet: bool = False) -> None:
        """Runs every stage that is not finished, and prints a line at the end of each, with the time left.

        flops(): of the stages by folder, called once the text is prepared. quiet: the output of a stage goes to
        attempts/<stage>.log.
        """
        plan, timing = self.planned(), Timing(together=self._workers.count if self._workers else 1)

        def title(stage: Stage) -> str:
            return f"[{stages.index(stage) + 1}/{len(stages)}] {stage.name}"

        def ended(stage: Stage, ran: bool = True) -> None:
            seconds = self.seconds[stage.folder] = read_seconds(self.folder(stage))
            if not math.isnan(seconds):
                timing.note(stage, seconds, steps_seconds(self.folder(stage)))
            if ran and self._writes:
                if not timing.flops:
                    timing.flops = flops()
                left = timing.left(one for one in stages if not self.done(one))
                print(f"{_fresh_line()}{title(stage)}: {duration(seconds)} · {left}", flush=True)

        with contextlib.ExitStack() as stack:
            outputs = stack.enter_context(switched()) if quiet and self._writes else None
            if self._workers:
                stack.callback(self._workers.close)
            for phase in PHASES[:-1]:
                if phase == "finetuning":
                    plan = self.planned()  # the search has ended, so the recipes are known now
                    timing.flops = flops() if self._writes else {}
                stages = [stage for stage in plan if stage.phase != REPORT]
                mine = [stage for stage in stages if stage.phase == phase]
                for stage in interruptible(mine, phase):
                    if self._workers:
                        # A stage that runs alone gets all cores, and nothing else runs while latency is measured.
                        left = [one for one in mine if one.command != "latency" and not self.done(one)]
                        waits = {one.key for one in left}
                        if sum(waits.isdisjoint(one.needs) for one in left) > 1:
                            self._workers.run(left, ended)
                    if stage.folder not in self.seconds:
                        ended(stage, self.run_one(stage, title(stage), outputs))
                if phase == "teachers":
                    self.check_teachers()

    def run_stage(self, key: str) -> None:
        """Runs the stage of that key; before the report that is `run`, which only reads what is finished.

        Raises UserError for an unknown key, and when a stage that it needs is not finished.
        """
        stages = {stage.key: stage for stage in self.planned()}
        # A stage that was planned before the search ended, under its plain name, has a folder by now.
        names = {stage.name: stage for stage in stages.values() if stage.phase == "finetuning"}
        stage = stages.get(key) or names.get(key)
        if stage is None:
            raise UserError(
                f"--stage: this config has no stage {key}; use a key of plan.json, and plan again with --plan if the "
                "config has changed since"
            )
        missing = [need for need in stage.needs if not self.done(stages[need])]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"--stage={key}: it needs {', '.join(missing[:3])}{more}, not finished (no DONE under "
                f"{self.workdir / 'stages'}); run the missing stages first"
            )
        if stage.command == REPORT:
            self.run()
            return
        self.check_teachers()
        title = f"[{stage.phase}] {stage.name}"
        if self._writes:
            print(title, flush=True)
        self.run_one(stage, title)

    def run_one(self, stage: Stage, title: str, outputs: "tuple[Output, ...] | None" = None) -> bool:
        """Runs one stage unless it is finished; returns whether it ran. Raises UserError if another process runs it.

        outputs: standard output and error, which go to a log while the stage runs.
        """
        folder = self.folder(stage)
        if self._agree(self.done(stage)):
            if self._writes:
                self._make_up(stage)
            return False
        with attempt(self.workdir, stage.folder, writes=self._writes):
            if self._agree(self.done(stage)):  # finished by the process that had the lock until now
                return False
            started = time.monotonic()
            with _logged(path_of(self.workdir, stage.folder).with_suffix(".log"), title, outputs):
                self._run_stage(stage.command, resolve_stages(stage.config, self.workdir / "stages"), folder)
            if stage.command in ("pretrain", "distill"):
                gc.collect()  # cycles hold the run's arrays and up to twenty open files
            if self._writes:
                if not self.done(stage):
                    raise UserError(
                        f"stage {stage.name}: {folder} has no DONE marker; start the study again to resume it"
                    )
                write_json(folder / SECONDS, round(time.monotonic() - started, 2))
        return True

    def _make_up(self, stage: Stage) -> None:
        """Writes the records about a finished stage that a kill after its end has prevented."""
        folder = self.folder(stage)

        def ended() -> float:
            return datetime.datetime.fromisoformat(read_json(folder / "DONE")["finished"]).timestamp()

        seconds = make_up(self.workdir, stage.folder, ended)
        if seconds is not None and not is_there(folder / SECONDS):
            write_json(folder / SECONDS, round(seconds, 2))

    def check_teachers(self) -> None:
        """Refuses a finished generic teacher whose loss on task text is no better than a unigram's; notes an adapted
        one. Skipped unless logits are distilled: inner states may be worth something all the same.
        """
        if not self.planner.distill.kl.used:
            return
        for name, stage in self.planner.teachers().items():
            if not self.done(stage):
                continue
            rows = [row for row in self.heldout(stage) if row["kind"] == "task"]
            if not rows:  # its masked-LM head was never trained
                continue
            count = sum(row["count"] for row in rows)
            loss, unigram = (sum(row[key] * row["count"] for row in rows) / count for key in ("loss", "unigram_loss"))
            if loss < unigram:
                continue
            problem = (
                f"the {name} teacher's held-out loss on task text ({loss:.2f} nats per masked token) is no better than "
                f"a unigram's ({unigram:.2f}), so it has nothing to teach there"
            )
            if self.settings.require_teacher_better_than_unigram and name == "generic":
                raise UserError(
                    f"{problem}; raise config.pretrain.steps or give more generic text, or set "
                    "config.study.require_teacher_better_than_unigram=False to go on nevertheless"
                )
            self.notes.append(problem[0].upper() + problem[1:] + ".")

    def heldout(self, stage: Stage) -> list[dict[str, Any]]:
        """The held-out masked-LM losses of a stage; none where its head was never trained."""
        return read_json(whole(self.folder(stage) / "heldout.json"))

    def choose(self) -> None:
        """Fills `chosen` with the recipe of the best dev score, the first of equals, wherever the search is finished;
        `searched` gets all scores.
        """
        self.chosen, self.searched = {}, []
        students = [one for one in self.planner.students if one.kind not in FITTED]  # those choose C themselves
        pairs = list(itertools.product(self.settings.tasks, students))
        # All processes take one process's view, since a file can reach their file systems at different times.
        found = self._agree([self._dev_scores(student, task) for task, student in pairs])
        for (task, student), scores in zip(pairs, found, strict=True):
            if scores is None:
                continue
            best = max(range(len(scores)), key=lambda index: scores[index] or 0.0)
            recipes = self.planner.recipes_of(student)
            self.chosen[student.name, task] = recipes[best]
            for index, (recipe, score) in enumerate(zip(recipes, scores, strict=True)):
                tried = {**dataclasses.asdict(recipe), "dev_score": score, "chosen": index == best}
                self.searched.append({"student": student.name, "task": task, **tried})

    def _dev_scores(self, student: Student, task: str) -> list[float | None] | None:
        """The dev score of each recipe; [None] if there is only one, and None while the search is not finished."""
        search = self.planner.search(student, task)
        if not all(self.done(stage) for stage in search):
            return None
        return [read_json_object(self.folder(stage) / "dev.json")["score"] for stage in search] or [None]


class Output:
    """Standard output or error, or a file in its place; objects that hold it, like `logging` handlers, stay valid."""

    def __init__(self, stream: Any):
        self.stream = self.target = stream

    def write(self, text: str) -> int:
        return self.target.write(text)

    def flush(self) -> None:
        self.target.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)


@contextlib.contextmanager
def switched() -> Iterator[tuple[Output, ...]]:
    """Standard output and error as outputs that can be redirected to a file."""
    outputs = Output(sys.stdout), Output(sys.stderr)
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        yield outputs


@contextlib.contextmanager
def _logged(file: pathlib.Path, title: str, outputs: tuple[Output, ...] | None) -> Iterator[None]:
    """Appends the outputs to the file; a terminal shows a line meanwhile, and a failure is printed everywhere."""
    if outputs is None:
        yield
        return
    if sys.stdout.isatty():
        print(f"{_fresh_line()}{title}: running, see {file}", end="", flush=True)
    try:
        with open(file, "a", encoding="utf-8", buffering=1) as log:
            try:
                for one in outputs:
                    one.target = log
                yield
            finally:
                for one in outputs:
                    one.target = one.stream
    except BaseException:  # a preemption too
        print(f"{_fresh_line()}{title}: not finished, see {file}", flush=True)
        raise


def _fresh_line() -> str:
    """The escape sequence that clears the line of a running stage on a terminal."""
    return "\r\033[K" if sys.stdout.isatty() else ""


def resolve_stages(value: Any, stages: pathlib.Path) -> Any:
    """Replaces every "stage:<folder>" in a config by the directory below `stages`."""
    if isinstance(value, dict):
        return {key: resolve_stages(item, stages) for key, item in value.items()}
    if isinstance(value, str) and STAGE in value:
        parts = value.split(",")  # several teachers
        return ",".join(str(stages / one.removeprefix(STAGE)) if one.startswith(STAGE) else one for one in parts)
    return value


def steps_seconds(folder: pathlib.Path) -> float:
    """The seconds that a training stage's steps took, from its DONE; 0 for other stages."""
    try:
        return read_json_object(folder / "DONE").get("steps_seconds", 0.0)
    except UserError:  # an older study's, which may be empty
        return 0.0


def read_seconds(folder: pathlib.Path) -> float:
    """A stage's wall time; NaN if its process was killed between the stage's end and the note of its time."""
    file = folder / SECONDS
    seconds = read_json(file) if is_there(file) else None
    return float(seconds) if isinstance(seconds, int | float) else float("nan")
