"""Running a study: finished stages are skipped, broken ones resume, recipes are chosen on dev, and all is collected."""

import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import from_dict, to_dict
from kd_jax.runtime.files import read_json, write_json
from kd_jax.runtime.preemption import interruptible
from kd_jax.study.attempts import attempt
from kd_jax.study.plan import STAGE, Planner, Recipe, Stage, Student, recipes, students
from kd_jax.types import UserError

# Runs one ordinary command: (command, its config, its directory).
RunStage = Callable[[str, ConfigDict, pathlib.Path], None]
Keys = Mapping[str, Callable[[ConfigDict], Iterable[str]]]


class Study:
    """The stages of one study under `workdir/stages`, and what they left behind.

    Where several processes run it together, `writes` is True in the one that keeps the study's own notes, and
    agree(value) gives its value to all of them.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: pathlib.Path,
        run_stage: RunStage,
        keys: Keys,
        *,
        writes: bool = True,
        agree: Callable[[Any], Any] = lambda value: value,
    ):
        self.config = config
        self.workdir = workdir
        self.planner = Planner(config, keys)
        self.chosen: dict[tuple[str, str], Recipe] = {}
        self.searched: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}  # by folder, since recipes of one student share a name
        self._run_stage = run_stage
        self._writes, self._agree = writes, agree

    def folder(self, stage: Stage) -> pathlib.Path:
        return self.workdir / "stages" / stage.folder

    def done(self, stage: Stage) -> bool:
        return (self.folder(stage) / "DONE").is_file()

    def run(self) -> None:
        """Runs every stage that is not finished, in an order in which each finds what it needs."""
        self._run_all(self.planner.teacher_stages(), "teachers")
        self.check_teachers()
        self._run_all(self.planner.cache_stages(), "teacher's predictions")
        self._run_all(self.planner.before_recipes(), "students")
        self._choose_recipes()
        self._run_all(self.planner.after_recipes(self.chosen), "finetuning")

    def _run_all(self, stages: list[Stage], phase: str) -> None:
        for number, stage in enumerate(interruptible(stages, phase), start=1):
            self.run_one(stage, f"[{phase} {number}/{len(stages)}] {stage.name}")
            self.seconds[stage.folder] = read_seconds(self.folder(stage))

    def run_one(self, stage: Stage, title: str) -> None:
        """Runs one stage, unless it is finished. UserError when another process runs it."""
        folder = self.folder(stage)
        if self._agree(self.done(stage)):
            return
        with attempt(self.workdir, stage.folder, writes=self._writes):
            if self._agree(self.done(stage)):  # whoever had the lock before finished it
                return
            if self._writes:
                print(title, flush=True)
            started = time.monotonic()
            config = resolve_stages(stage.config, self.workdir / "stages")
            self._run_stage(stage.command, config, folder)
            if self._writes:
                if not self.done(stage):
                    raise UserError(
                        f"stage {stage.name}: {folder} has no DONE marker; start the study again to resume it"
                    )
                write_seconds(folder, time.monotonic() - started)

    def check_teachers(self) -> None:
        """A finished teacher that predicts task text no better than a unigram has nothing to teach: an error, or a
        note. Where no logits are distilled it may have none to speak of.
        """
        kl = self.config.distill.kl
        if max(kl.weight, kl.final_weight) <= 0:
            return
        for name, stage in self.planner.teachers().items():
            if not self.done(stage):
                continue
            rows = [row for row in self.heldout(stage) if row["kind"] == "task"]
            count = sum(row["count"] for row in rows)
            loss, unigram = (sum(row[key] * row["count"] for row in rows) / count for key in ("loss", "unigram_loss"))
            if loss < unigram:
                continue
            problem = (
                f"the {name} teacher's held-out loss on task text ({loss:.2f} nats a masked token) is no better than a "
                f"unigram's ({unigram:.2f}): it has nothing to teach there"
            )
            if self.config.study.require_teacher_better_than_unigram and name == "generic":
                raise UserError(
                    f"{problem}; raise config.pretrain.steps or give more generic text, or set "
                    "config.study.require_teacher_better_than_unigram=False to go on all the same"
                )
            self.notes.append(problem[0].upper() + problem[1:] + ".")

    def heldout(self, stage: Stage) -> list[dict[str, Any]]:
        return read_json(self.folder(stage) / "heldout.json")

    def _choose_recipes(self) -> None:
        """For each student and task, the recipe with the best dev score of the first seed; ties go to the first."""
        options = recipes(self.config)
        for task in self.config.study.tasks:
            for student in students(self.config):
                scores = self._agree(self.dev_scores(student, task))
                best = best_of(scores)
                self.chosen[student.name, task] = options[best]
                for index, (recipe, score) in enumerate(zip(options, scores)):
                    self.searched.append(
                        {
                            "student": student.name,
                            "task": task,
                            "learning_rate": recipe.learning_rate,
                            "epochs": recipe.epochs,
                            "dev_score": score,
                            "chosen": index == best,
                        }
                    )

    def dev_scores(self, student: Student, task: str) -> list[float | None]:
        """The dev score of each recipe with the first seed; [None] where there is only one, which needs no search.

        FileNotFoundError before the search has finished.
        """
        options = recipes(self.config)
        if len(options) == 1:
            return [None]
        stages = [self.planner.finetune(student, self.config.study.seeds[0], task, recipe) for recipe in options]
        return [read_json(self.folder(stage) / "dev.json")["score"] for stage in stages]


def best_of(scores: list[float | None]) -> int:
    """The place of the highest score, the first of equals."""
    return max(range(len(scores)), key=lambda index: scores[index] or 0.0)


def resolve_stages(config: ConfigDict, stages: pathlib.Path) -> ConfigDict:
    """Replaces every "stage:<folder>" by the directory it stands for."""

    def resolve(value):
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        if isinstance(value, str) and STAGE in value:
            parts = value.split(",")  # several teachers
            return ",".join(str(stages / one.removeprefix(STAGE)) if one.startswith(STAGE) else one for one in parts)
        return value

    return from_dict(resolve(to_dict(config)))


def write_seconds(folder: pathlib.Path, seconds: float) -> None:
    """Keeps a stage's wall time beside it."""
    write_json(folder / "seconds.json", round(seconds, 2))


def read_seconds(folder: pathlib.Path) -> float:
    """A stage's wall time, NaN where it was killed between its end and the note of it."""
    file = folder / "seconds.json"
    return read_json(file) if file.exists() else float("nan")
