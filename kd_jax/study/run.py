"""Running a study: finished stages are skipped, broken ones resume, recipes are chosen on dev, and all is collected."""

import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import from_dict, to_dict
from kd_jax.study.plan import STAGE, Planner, Recipe, Stage, Student, recipes, students
from kd_jax.types import UserError

# Runs one ordinary command: (command, its config, its directory).
RunStage = Callable[[str, ConfigDict, pathlib.Path], None]
Keys = Mapping[str, Callable[[ConfigDict], Iterable[str]]]


class Study:
    """The stages of one study under `workdir/stages`, and what they left behind."""

    def __init__(self, config: ConfigDict, workdir: pathlib.Path, run_stage: RunStage, keys: Keys):
        self.config = config
        self.workdir = workdir
        self.planner = Planner(config, keys)
        self.chosen: dict[tuple[str, str], Recipe] = {}
        self.searched: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.seconds: dict[str, float] = {}
        self._run_stage = run_stage

    def folder(self, stage: Stage) -> pathlib.Path:
        return self.workdir / "stages" / stage.folder

    def run(self) -> None:
        """Runs every stage that is not finished, in an order in which each finds what it needs."""
        self._run_all(self.planner.teacher_stages(), "teachers")
        self._check_teachers()
        self._run_all(self.planner.cache_stages(), "teacher's predictions")
        self._run_all(self.planner.before_recipes(), "students")
        self._choose_recipes()
        self._run_all(self.planner.after_recipes(self.chosen), "finetuning")

    def _run_all(self, stages: list[Stage], phase: str) -> None:
        total = len(stages)
        for number, stage in enumerate(stages, start=1):
            folder = self.folder(stage)
            if not (folder / "DONE").exists():
                print(f"[{phase} {number}/{total}] {stage.name}", flush=True)
                started = time.monotonic()
                config = resolve_stages(stage.config, self.workdir / "stages")
                self._run_stage(stage.command, config, folder)
                if not (folder / "DONE").exists():
                    raise UserError(
                        f"stage {stage.name}: {folder} has no DONE marker; start the study again to resume it"
                    )
                write_seconds(folder, time.monotonic() - started)
            self.seconds[stage.name] = read_seconds(folder)

    def _check_teachers(self) -> None:
        """A teacher that predicts task text no better than a unigram has nothing to teach: an error, or a note."""
        for name, stage in self.planner.teachers().items():
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
                scores = [self._dev_score(student, task, recipe) for recipe in options] if len(options) > 1 else [None]
                best = max(range(len(scores)), key=lambda index: scores[index] or 0.0)
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

    def _dev_score(self, student: Student, task: str, recipe: Recipe) -> float:
        stage = self.planner.finetune(student, self.config.study.seeds[0], task, recipe)
        return read_json(self.folder(stage) / "dev.json")["score"]


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


def read_json(file: pathlib.Path) -> Any:
    """The value that a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))


def write_seconds(folder: pathlib.Path, seconds: float) -> None:
    """Keeps a stage's wall time beside it."""
    (folder / "seconds.json").write_text(json.dumps(round(seconds, 2)), encoding="utf-8")


def read_seconds(folder: pathlib.Path) -> float:
    """A stage's wall time, NaN where it was killed between its end and the note of it."""
    file = folder / "seconds.json"
    return read_json(file) if file.exists() else float("nan")
