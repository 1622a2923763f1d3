"""The stages of a study: which commands with which configs, and what each needs first."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import EXECUTION_KEYS, fingerprint, identity, require, to_dict

STAGE = "stage:"  # a config value "stage:<folder>" stands for that stage's directory, wherever the study lies


@dataclass(frozen=True)
class Stage:
    """One ordinary command with its resolved config; `folder` is named by the hash of that config."""

    name: str
    command: str
    config: ConfigDict
    needs: tuple[str, ...]
    folder: str


@dataclass(frozen=True)
class Student:
    """One row of the result table: how the encoder came about before finetuning."""

    kind: str  # scratch | mlm | distilled
    transfer_set: str = ""
    teacher: str = ""  # generic | adapted

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.kind, self.transfer_set, self.teacher) if part)


@dataclass(frozen=True)
class Recipe:
    """What of the finetuning is searched on dev."""

    learning_rate: float
    epochs: int


def students(config: ConfigDict) -> list[Student]:
    """The compared students; both baselines are always among them."""
    study = config.study
    sets = list(study.transfer_sets)
    for key in ("adapted_sets", "mlm_sets"):
        for name in study[key]:
            require(name in sets, f"study.{key}", f"{name!r} is no transfer set", f"name one of {', '.join(sets)}")
    require(len(study.mlm_sets) > 0, "study.mlm_sets", "the no-teacher baseline is missing", "name a transfer set")
    rows = [Student("scratch")]
    rows += [Student("mlm", name) for name in study.mlm_sets]
    rows += [Student("distilled", name, "generic") for name in sets]
    rows += [Student("distilled", name, "adapted") for name in study.adapted_sets]
    return rows


def recipes(config: ConfigDict) -> list[Recipe]:
    """All finetuning recipes of the search."""
    return [
        Recipe(float(rate), int(epochs))
        for rate, epochs in itertools.product(config.study.recipe_learning_rates, config.study.recipe_epochs)
    ]


class Planner:
    """Turns a study's config into stages; `keys[command](config)` are the keys that decide what a command computes."""

    def __init__(self, config: ConfigDict, keys: Mapping[str, Callable[[ConfigDict], Iterable[str]]]):
        for name, share in config.study.transfer_sets.items():
            valid = 0.0 <= share <= 1.0
            require(valid, f"study.transfer_sets.{name}", f"{share} is no share", "give a number from 0 to 1")
        require(len(config.study.seeds) > 0, "study.seeds", "there is no seed", "give at least one, better three")
        self._config = config
        self._keys = dict(keys)
        self._made: dict[str, Stage] = {}  # copying a config takes milliseconds, and each stage is asked for many times

    def _stage(self, command: str, name: str, needs: Iterable[Stage], changes: Mapping[str, Any]) -> Stage:
        key = str((command, name, dict(changes)))
        if key not in self._made:
            self._made[key] = self._make(command, name, needs, changes)
        return self._made[key]

    def _make(self, command: str, name: str, needs: Iterable[Stage], changes: Mapping[str, Any]) -> Stage:
        full = self._config.copy_and_resolve_references()
        with full.unlocked():
            for key, value in changes.items():
                target = full
                *parents, last = key.split(".")
                for parent in parents:
                    target = target[parent]
                target[last] = value
        config = ConfigDict({key: full[key] for key in (*self._keys[command](full), *EXECUTION_KEYS)})
        slug = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")
        folder = f"{slug}-{fingerprint([command, identity(to_dict(config))])}"
        return Stage(name, command, config, tuple(need.folder for need in needs), folder)

    def prepare(self) -> Stage:
        return self._stage("prepare", "prepare", (), {})

    def teacher(self) -> Stage:
        """The generic teacher: masked-LM pretraining on generic text alone, once for all seeds."""
        prepared = self.prepare()
        changes = {"prepared": STAGE + prepared.folder, "transfer.task_share": 0.0, "pretrain.model": "teacher"}
        return self._stage("pretrain", "pretrain-teacher", (prepared,), changes)

    def adapted_teacher(self) -> Stage:
        """The same teacher, pretraining continued on task text."""
        prepared, teacher = self.prepare(), self.teacher()
        job = self._config.adapt.copy_and_resolve_references()
        job.unlock()
        job.model, job.init_from = "teacher", STAGE + teacher.folder
        changes = {"prepared": STAGE + prepared.folder, "transfer.task_share": 1.0, "pretrain": job}
        return self._stage("pretrain", "adapt-teacher", (prepared, teacher), changes)

    def teachers(self) -> dict[str, Stage]:
        adapted = {"adapted": self.adapted_teacher()} if self._config.study.adapted_sets else {}
        return {"generic": self.teacher(), **adapted}

    def encoder(self, student: Student, seed: int) -> Stage | None:
        """The stage that makes the student's encoder; None for from-scratch."""
        if student.kind == "scratch":
            return None
        prepared = self.prepare()
        share = self._config.study.transfer_sets[student.transfer_set]
        changes = {"prepared": STAGE + prepared.folder, "transfer.task_share": float(share), "seed": seed}
        if student.kind == "mlm":
            # The same text, steps, batch and schedule as the distilled students; only the teacher is missing.
            job = ConfigDict({key: self._config.distill[key] for key in self._config.adapt})
            job.model, job.init_from = "student", ""
            return self._stage("pretrain", f"{student.name}-seed{seed}", (prepared,), {**changes, "pretrain": job})
        teacher = self.teachers()[student.teacher]
        changes["teacher_checkpoint"] = STAGE + teacher.folder
        return self._stage("distill", f"{student.name}-seed{seed}", (prepared, teacher), changes)

    def finetune(self, student: Student, seed: int, task: str, recipe: Recipe) -> Stage:
        prepared, encoder = self.prepare(), self.encoder(student, seed)
        changes = {
            "prepared": STAGE + prepared.folder,
            "seed": seed,
            "finetune.init_from": STAGE + encoder.folder if encoder else "",
            "finetune.learning_rate": recipe.learning_rate,
            "finetune.epochs": recipe.epochs,
        }
        name = f"{task}-{student.name}-seed{seed}"
        return self._stage(f"finetune_{task}", name, (prepared, encoder) if encoder else (prepared,), changes)

    def evaluate(self, finetuned: Stage) -> Stage:
        changes = {
            "prepared": STAGE + self.prepare().folder,
            "evaluate.checkpoint": STAGE + finetuned.folder,
            "evaluate.partition": "test",
        }
        return self._stage("evaluate", f"test-{finetuned.name}", (finetuned,), changes)

    def teacher_stages(self) -> list[Stage]:
        return [self.prepare(), *self.teachers().values()]

    def before_recipes(self) -> list[Stage]:
        """The students' encoders, and the recipe search, which uses the first seed."""
        rows, seeds = students(self._config), self._config.study.seeds
        stages = [stage for student in rows for seed in seeds if (stage := self.encoder(student, seed))]
        if len(recipes(self._config)) > 1:
            stages += [
                self.finetune(student, seeds[0], task, recipe)
                for task in self._config.study.tasks
                for student in rows
                for recipe in recipes(self._config)
            ]
        return stages

    def after_recipes(self, chosen: Mapping[tuple[str, str], Recipe]) -> list[Stage]:
        """Finetuning and evaluation of every student and seed; `chosen` maps (student's name, task) to a recipe."""
        stages = []
        for task in self._config.study.tasks:
            for student in students(self._config):
                for seed in self._config.study.seeds:
                    finetuned = self.finetune(student, seed, task, chosen[student.name, task])
                    stages += [finetuned, self.evaluate(finetuned)]
        return stages
