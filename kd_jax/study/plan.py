"""The stages of a study: which commands with which configs, and what each needs first."""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import EXECUTION_KEYS, fingerprint, identity, require, to_dict
from kd_jax.config.training import FEATURE_TERMS

# Teachers beside the generic one, each with the transfer sets that are distilled from it in config.study.<name>_sets:
# the adapted one; first the generic and then the adapted; both averaged; an intermediate student of the generic one.
OTHER_TEACHERS = ("adapted", "schedule", "average", "chain")
ADAPTED = ("adapted", "schedule", "average")  # those that need the adapted teacher

# The transfer set of teachers, and of every student unless it says otherwise.
GENERIC = {"transfer.task_share": 0.0, "transfer.generic": "generic"}

CACHED_RUNS = ("task_shares", "generic", "seeds", "steps", "batch_size")  # of config.cache: the runs that it serves

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
    teacher: str = ""  # generic | adapted | schedule | average | chain

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
    sets = [*study.transfer_sets, *study.selected_sets]
    for key in ("mlm_sets", *(f"{teacher}_sets" for teacher in OTHER_TEACHERS)):
        for name in study[key]:
            require(name in sets, f"study.{key}", f"{name!r} is no transfer set", f"name one of {', '.join(sets)}")
    require(len(study.mlm_sets) > 0, "study.mlm_sets", "the no-teacher baseline is missing", "name a transfer set")
    rows = [Student("scratch")]
    rows += [Student("mlm", name) for name in study.mlm_sets]
    rows += [Student("distilled", name, "generic") for name in sets]
    for teacher in OTHER_TEACHERS:
        rows += [Student("distilled", name, teacher) for name in study[f"{teacher}_sets"]]
    return rows


def task_shares(config: ConfigDict) -> dict[str, float]:
    """The share of task text of every transfer set, those with selected generic text last."""
    both = {**config.study.transfer_sets, **config.study.selected_sets}
    return {name: float(share) for name, share in both.items()}


def may_cache(config: ConfigDict) -> bool:
    """Whether cached predictions serve config.distill: terms on logits alone, at the masked positions."""
    block = config.distill
    features = any(max(block[name].weight, block[name].final_weight) > 0 for name in FEATURE_TERMS)
    return not features and block.kd_positions == "masked" and block.init == "random"


def recipes(config: ConfigDict) -> list[Recipe]:
    """All finetuning recipes of the search."""
    return [
        Recipe(float(rate), int(epochs))
        for rate, epochs in itertools.product(config.study.recipe_learning_rates, config.study.recipe_epochs)
    ]


class Planner:
    """Turns a study's config into stages; `keys[command](config)` are the keys that decide what a command computes."""

    def __init__(self, config: ConfigDict, keys: Mapping[str, Callable[[ConfigDict], Iterable[str]]]):
        study = config.study
        for key in ("transfer_sets", "selected_sets"):
            for name, share in study[key].items():
                valid = 0.0 <= share <= 1.0
                require(valid, f"study.{key}.{name}", f"{share} is no share", "give a number from 0 to 1")
        twice = sorted(set(study.transfer_sets) & set(study.selected_sets))
        require(not twice, "study.selected_sets", f"{', '.join(twice)} is a transfer set too", "choose another name")
        selects = not study.selected_sets or config.select.share > 0
        require(selects, "study.selected_sets", "no text is selected", "set config.select.share above 0")
        switch = study.schedule_switch
        require(0 < switch < 1, "study.schedule_switch", f"{switch} is outside (0, 1)", "0.5 switches half-way")
        require(len(config.study.seeds) > 0, "study.seeds", "there is no seed", "give at least one, better three")
        students(config)  # refuses what cannot be compared before a teacher is trained
        self._config = config
        self._keys = dict(keys)
        # A cache -> what it predicts, whatever rows it holds: a student that is finished stays so when seeds are added.
        self._predictions: dict[str, str] = {}
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
        values = identity(to_dict(config))
        if values.get("teacher_cache") in self._predictions:
            values["teacher_cache"] = self._predictions[values["teacher_cache"]]
        folder = f"{slug}-{fingerprint([command, values])}"
        return Stage(name, command, config, tuple(need.folder for need in needs), folder)

    def prepare(self) -> Stage:
        return self._stage("prepare", "prepare", (), {})

    def imported(self) -> Stage | None:
        """The model of `transformers` that the teacher comes from; None where it is pretrained here."""
        path = self._config.study.teacher_import
        if not path:
            return None
        prepared = self.prepare()
        changes = {"prepared": STAGE + prepared.folder, "seed": 0, "import_model.path": path}
        return self._stage("import_model", "import-teacher", (prepared,), changes)

    def teacher(self) -> Stage:
        """The generic teacher, once for all seeds: masked-LM pretraining on generic text alone; or an imported model,
        its masked-LM head trained on generic text where study.train_head says so.
        """
        prepared, imported = self.prepare(), self.imported()
        changes = {"prepared": STAGE + prepared.folder, **GENERIC, "pretrain.model": "teacher"}
        if imported is None:
            return self._stage("pretrain", "pretrain-teacher", (prepared,), changes)
        if not self._config.study.train_head:
            return imported
        changes |= {"seed": 0, "pretrain.init_from": STAGE + imported.folder, "train_body": False}
        return self._stage("pretrain", "train-teacher-head", (prepared, imported), changes)

    def adapted_teacher(self) -> Stage:
        """The same teacher, pretraining continued on task text."""
        prepared, teacher = self.prepare(), self.teacher()
        job = self._config.adapt.copy_and_resolve_references()
        job.unlock()
        job.model, job.init_from = "teacher", STAGE + teacher.folder
        changes = {"prepared": STAGE + prepared.folder, **GENERIC, "transfer.task_share": 1.0, "pretrain": job}
        return self._stage("pretrain", "adapt-teacher", (prepared, teacher), changes)

    def teachers(self) -> dict[str, Stage]:
        wanted = any(self._config.study[f"{name}_sets"] for name in ADAPTED)
        return {"generic": self.teacher(), **({"adapted": self.adapted_teacher()} if wanted else {})}

    def transfer(self, transfer_set: str) -> dict[str, Any]:
        """The changes that make config.transfer that of a transfer set."""
        study = self._config.study
        if transfer_set in study.selected_sets:
            return {"transfer.task_share": float(study.selected_sets[transfer_set]), "transfer.generic": "selected"}
        return {**GENERIC, "transfer.task_share": float(study.transfer_sets[transfer_set])}

    def cache(self, teacher: str) -> Stage | None:
        """The predictions of a teacher for all its students and seeds; None where they are not used."""
        study = self._config.study
        if not study.cache or not may_cache(self._config) or teacher not in ("generic", "adapted"):
            return None
        sets = list(task_shares(self._config)) if teacher == "generic" else list(study.adapted_sets)
        transfers = [self.transfer(name) for name in sets]
        prepared, of = self.prepare(), self.teachers()[teacher]
        distill = self._config.distill
        changes = {
            "prepared": STAGE + prepared.folder,
            "teacher_checkpoint": STAGE + of.folder,
            **GENERIC,
            "seed": 0,
            "cache.task_shares": tuple(one["transfer.task_share"] for one in transfers),
            "cache.generic": tuple(one["transfer.generic"] for one in transfers),
            "cache.seeds": tuple(study.seeds),
            "cache.steps": distill.steps,
            "cache.batch_size": distill.batch_size,
            "cache.temperature": float(distill.kl.temperature) if self._config.cache.format != "hidden" else 1.0,
        }
        stage = self._stage("cache_teacher", f"cache-{teacher}", (prepared, of), changes)
        if STAGE + stage.folder not in self._predictions:
            values = identity(to_dict(stage.config))
            for key in CACHED_RUNS:
                del values["cache"][key]
            self._predictions[STAGE + stage.folder] = fingerprint(values)
        return stage

    def intermediate(self, transfer_set: str, seed: int) -> Stage:
        """The intermediate student of a chain, distilled from the generic teacher over the same transfer set."""
        job = self._config.chain.copy_and_resolve_references()
        distill = self._config.distill.copy_and_resolve_references()
        distill.update(job)
        prepared, teacher = self.prepare(), self.teacher()
        changes = {
            "prepared": STAGE + prepared.folder,
            "seed": seed,
            "student": self._config.intermediate,
            "distill": distill,
            "teacher_checkpoint": STAGE + teacher.folder,
            **self.transfer(transfer_set),
        }
        return self._stage("distill", f"intermediate-{transfer_set}-seed{seed}", (prepared, teacher), changes)

    def encoder(self, student: Student, seed: int) -> Stage | None:
        """The stage that makes the student's encoder; None for from-scratch."""
        if student.kind == "scratch":
            return None
        prepared = self.prepare()
        changes = {"prepared": STAGE + prepared.folder, "seed": seed, **self.transfer(student.transfer_set)}
        if student.kind == "mlm":
            # The same text, steps, batch and schedule as the distilled students; only the teacher is missing.
            job = ConfigDict({key: self._config.distill[key] for key in self._config.adapt})
            job.model, job.init_from = "student", ""
            return self._stage("pretrain", f"{student.name}-seed{seed}", (prepared,), {**changes, "pretrain": job})
        needs, more = self._teachers_of(student, seed)
        stages = (prepared, *needs)
        return self._stage("distill", f"{student.name}-seed{seed}", stages, {**changes, **more})

    def _teachers_of(self, student: Student, seed: int) -> tuple[list[Stage], dict[str, Any]]:
        """(stages that a distilled student needs, the config changes that name its teacher or teachers)."""
        teachers = self.teachers()
        if student.teacher == "chain":
            needs = [self.intermediate(student.transfer_set, seed)]
        elif student.teacher in teachers:
            needs = [teachers[student.teacher]]
        else:
            needs = [teachers["generic"], teachers["adapted"]]
        changes: dict[str, Any] = {"teacher_checkpoint": ",".join(STAGE + one.folder for one in needs)}
        if student.teacher == "schedule":
            steps = self._config.distill.steps
            switch = min(max(round(self._config.study.schedule_switch * steps), 1), steps - 1)
            changes["distill.teacher_steps"] = (0, switch)
        cache = self.cache(student.teacher)
        if cache is not None:
            changes["teacher_cache"] = STAGE + cache.folder
            needs.append(cache)
        return needs, changes

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

    def latency(self) -> Stage | None:
        """Size and latency of the shapes that the study trains; None where it is not wanted."""
        study, prepared = self._config.study, self.prepare()
        if not study.latency:
            return None
        changes = {
            "prepared": STAGE + prepared.folder,
            "latency.models": ("teacher", *(("intermediate",) if study.chain_sets else ()), "student"),
            "latency.task": "icner" if "icner" in study.tasks else "dc",
        }
        return self._stage("latency", "latency", (prepared,), changes)

    def teacher_stages(self) -> list[Stage]:
        imported = self.imported()
        stages = [self.prepare(), *([imported] if imported else []), *self.teachers().values()]
        return list({stage.folder: stage for stage in stages}.values())

    def cache_stages(self) -> list[Stage]:
        """The predictions that are cached, once the teachers are known to be worth it."""
        return [
            stage for name in self.teachers() if (stage := self.cache(name)) is not None and self._has_students(name)
        ]

    def _has_students(self, teacher: str) -> bool:
        return teacher == "generic" or bool(self._config.study[f"{teacher}_sets"])

    def before_recipes(self) -> list[Stage]:
        """The students' encoders, and the recipe search, which uses the first seed."""
        rows, seeds = students(self._config), self._config.study.seeds
        stages = [
            self.intermediate(student.transfer_set, seed)
            for student in rows
            for seed in seeds
            if student.teacher == "chain"
        ]
        stages += [stage for student in rows for seed in seeds if (stage := self.encoder(student, seed))]
        if len(recipes(self._config)) > 1:
            stages += [
                self.finetune(student, seeds[0], task, recipe)
                for task in self._config.study.tasks
                for student in rows
                for recipe in recipes(self._config)
            ]
        return stages

    def after_recipes(self, chosen: Mapping[tuple[str, str], Recipe]) -> list[Stage]:
        """Finetuning and evaluation of every student and seed, then latency; `chosen` maps (student's name, task) to a
        recipe.
        """
        stages = []
        for task in self._config.study.tasks:
            for student in students(self._config):
                for seed in self._config.study.seeds:
                    finetuned = self.finetune(student, seed, task, chosen[student.name, task])
                    stages += [finetuned, self.evaluate(finetuned)]
        latency = self.latency()  # the last one, when nothing else is under way
        return [*stages, *([latency] if latency else [])]
