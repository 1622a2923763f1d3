"""The stages of a study: which command runs with which config, and what must be finished before it.

Everything here is a function of the config; nothing is read from disk.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kd_jax.config import EXECUTION_KEYS, commands, fingerprint, identity, require
from kd_jax.config.data import Cache
from kd_jax.config.settings import read
from kd_jax.config.training import STATE_TERMS, Distill, Finetune, Hidden, Pretrain, Relations, Training
from kd_jax.models.layer_map import layer_map, read_layers

REPORT = "report"
MODELS = "models.json"  # in a study's folder: the runs in it that `predict` uses
PHASES = ("teachers", "predictions", "students", "recipes", "finetuning", REPORT)  # in this order they run
HOST_COMMANDS = ("prepare", REPORT)  # these need no accelerator

# Teachers other than the generic one; config.study.<name>_sets names the transfer sets that are distilled from each:
# the adapted one; first the generic, then the adapted; both averaged; an intermediate student of the generic one.
OTHER_TEACHERS = ("adapted", "schedule", "average", "chain")

# Rows of the result table without a student. They are deterministic, so they have no seed.
FITTED = {"ngrams": "ngrams", "probe": "teacher"}  # kind -> config.baseline.features
LABELED = "labeled"  # as teacher of a row: the finetuned teacher labeled the rest of its train utterances
INITIALIZED = (
    "initialized"  # a student that started from its teacher; as teacher of a row: training continued from there
)

# The transfer set of teachers, and of every student unless it says otherwise.
GENERIC = {"transfer.task_share": 0.0, "transfer.generic": "generic", "transfer.task_texts": 0}

# Keys of config.cache that say for which runs a cache is written, not what is predicted.
CACHED_RUNS = ("task_shares", "generic", "task_texts", "seeds", "steps", "batch_size")
CACHED_ROWS = ("kinds", "rows_per_part", "batch_rows")  # the same of config.states

STAGE = "stage:"  # the value "stage:<folder>" stands for a stage's directory, so that a study can be moved

# keys[command](values): the top-level keys of the config that decide what the command computes.
Keys = Mapping[str, Callable[[Mapping[str, Any]], Iterable[str]]]


@dataclass(frozen=True)
class Stage:
    """One command of the study with its config as plain values.

    needs: keys of the stages that must be finished first. folder: its name under stages/, which ends in the hash of
    what decides the stage's results. phase: one of PHASES. deferred: the recipe is not chosen yet, and config and
    folder are those of the first recipe.
    """

    name: str
    command: str
    config: dict[str, Any]
    needs: tuple[str, ...]
    folder: str
    phase: str = ""
    deferred: bool = False

    @property
    def key(self) -> str:
        """The stage's name for --stage: its folder, or its plain name while the folder is not known."""
        return self.name if self.deferred else self.folder

    @property
    def accelerator(self) -> bool:
        """Whether the command has work for an accelerator."""
        fitted = self.command == "baseline" and self.config["baseline"]["features"] == "ngrams"
        return self.command not in HOST_COMMANDS and not fitted

    @property
    def job(self) -> Training | None:
        """The settings of a training stage; None for other commands."""
        name = self.command.split("_")[0]
        kind = {"pretrain": Pretrain, "distill": Distill, "finetune": Finetune}.get(name)
        return read(kind, self.config[name], name) if kind else None


@dataclass(frozen=True)
class Student:
    """One row of the result table: how the encoder was trained before finetuning."""

    kind: str  # ngrams | probe | finetuned (teacher) | scratch | initialized | mlm | distilled
    transfer_set: str = ""
    teacher: str = ""  # distilled: generic | adapted | schedule | average | chain; mlm: initialized; else: labeled

    @property
    def name(self) -> str:
        return "-".join(part for part in (self.kind, self.transfer_set, self.teacher) if part)


@dataclass(frozen=True)
class Recipe:
    """The settings of finetuning that are searched on dev."""

    learning_rate: float
    epochs: int
    pooling: str = "first"
    encoder_rate: float = 1.0


def starts_from_teacher(distill: Distill) -> bool:
    """Whether distilled students start from their teacher, and so need controls that do too."""
    return distill.init == "teacher"


def students(settings: commands.Study, initialized: bool = False) -> list[Student]:
    """The compared students; from scratch and MLM alone are always among them.

    initialized: distilled students start from their teacher, so rows that start there without distillation are added.
    """
    sets = task_shares(settings)
    for key in ("mlm_sets", *(f"{teacher}_sets" for teacher in OTHER_TEACHERS)):
        for name in getattr(settings, key):
            require(name in sets, f"study.{key}", f"{name!r} is not a transfer set", f"name one of {', '.join(sets)}")
    require(len(settings.mlm_sets) > 0, "study.mlm_sets", "the no-teacher baseline is missing", "name a transfer set")
    labeled = ("", LABELED) if settings.label_unlabeled else ("",)
    rows = [Student("ngrams", "", given) for given in labeled if settings.ngrams]
    rows += [Student("probe")] if settings.probe else []
    rows += [Student("finetuned")] if settings.finetune_teacher else []
    rows += [Student("scratch", "", given) for given in labeled]
    rows += [Student(INITIALIZED)] if initialized else []
    starts = ("",) if not initialized else ("", INITIALIZED) if settings.mlm_random else (INITIALIZED,)
    rows += [Student("mlm", name, start) for start in starts for name in settings.mlm_sets]
    rows += [Student("distilled", name, "generic") for name in sets]
    for teacher in OTHER_TEACHERS:
        rows += [Student("distilled", name, teacher) for name in getattr(settings, f"{teacher}_sets")]
    return rows


def task_shares(settings: commands.Study) -> dict[str, float]:
    """The share of task text of every transfer set, those with selected generic text last."""
    both = {**settings.transfer_sets, **settings.selected_sets}
    return {name: float(share) for name, share in both.items()}


class Planner:
    """Turns a study's config, as plain values, into stages. Raises UserError for students that cannot be compared."""

    def __init__(self, values: Mapping[str, Any], keys: Keys):
        self.values = values
        self.settings = read(commands.Study, values["study"], "study")
        self.distill = read(Distill, values["distill"], "distill")
        self.cache_settings = read(Cache, values["cache"], "cache")
        selects = not self.settings.selected_sets or values["select"]["share"] > 0
        require(selects, "study.selected_sets", "no text is selected", "set config.select.share above 0")
        self.students = students(self.settings, starts_from_teacher(self.distill))
        limited = self.values["finetune"]["max_train"] > 0 or not self.settings.label_unlabeled
        problem = "every train utterance has its given label"
        require(limited, "study.label_unlabeled", problem, "set it to False, or give finetune.max_train")
        self.poolings = self.settings.recipe_poolings or (values["finetune"]["pooling"],)
        rates = self.settings.recipe_encoder_rates or (values["finetune"]["encoder_rate"],)
        searched = (self.settings.recipe_learning_rates, self.settings.recipe_epochs, self.poolings, rates)
        self.recipes = [
            Recipe(float(rate), int(epochs), pooling, float(encoder_rate))
            for rate, epochs, pooling, encoder_rate in itertools.product(*searched)
        ]
        # A cache holds logits at the masked positions, or states of unmasked text: all that these terms need.
        self.caches = self.settings.cache and all(
            set(part.features) <= set(STATE_TERMS)
            if part.clean
            else not part.features and part.kd_positions == "masked"
            for _, part in self.distill.parts
        )
        self._keys = keys
        # Cache -> hash of what it predicts, whichever rows it holds. A student's folder depends on this hash and not on
        # the cache's own, so that a finished student stays finished when a seed or a transfer set is added.
        self._predictions: dict[str, str] = {}
        self._made: dict[str, Stage] = {}  # hashing a config takes milliseconds, and a stage is asked for many times

    def plan(self, chosen: Mapping[tuple[str, str], Recipe]) -> list[Stage]:
        """All stages, each after those that it needs, and the report last.

        chosen: (student's name, task) -> recipe. Where it is missing, the stages after the search are deferred.
        """
        found: dict[str, Stage] = {}

        def add(phase: str, stages: Iterable[Stage | None]) -> None:
            for stage in stages:
                if stage is not None:
                    found.setdefault(stage.key, replace(stage, phase=phase))

        tasks, teachers = self.settings.tasks, self.teachers()
        add("teachers", (self.prepare(), self.imported(), *teachers.values()))
        # The adapted teacher of schedules and averages alone has no students that could read its cache.
        for name in teachers:
            if name == "generic" or self.settings.adapted_sets:
                add("predictions", self.cached(name))
        chains = [student for student in self.students if student.teacher == "chain"]
        add("students", (self.intermediate(one.transfer_set, seed) for one in chains for seed in self.settings.seeds))
        finetuned = [one for one in self.students if one.kind not in FITTED]
        add("students", (self.encoder(one, seed) for one in finetuned for seed in self.seeds(one)))
        if self.settings.label_unlabeled:
            for task in tasks:
                add("students", self._labels(task))
        for task, student in itertools.product(tasks, finetuned):
            add("recipes", self.search(student, task))
        for student, task in itertools.product(self.students, tasks):
            if student.kind in FITTED:
                add("finetuning", [self.baseline(student, task)])
        for task, student in itertools.product(tasks, finetuned):
            for seed in self.seeds(student):
                add("finetuning", self._finetuned(student, seed, task, chosen.get((student.name, task))))
        add("finetuning", (self.latency(),))  # last, when no other stage disturbs the measurement
        needed = {need for stage in found.values() for need in stage.needs}
        last = tuple(key for key in found if key not in needed)
        return [*found.values(), Stage(REPORT, REPORT, {}, last, REPORT, REPORT)]

    def seeds(self, student: Student) -> tuple[int, ...]:
        """The seeds of a row: none if it is deterministic, only the first for the finetuned teacher."""
        if student.kind in FITTED:
            return ()
        return self.settings.seeds[:1] if student.kind == "finetuned" else self.settings.seeds

    def recipes_of(self, student: Student) -> list[Recipe]:
        """The recipes tried for a student; the teacher has its own."""
        settings = self.settings
        pace = (settings.teacher_learning_rate, settings.teacher_epochs)
        own = Recipe(*pace, settings.teacher_pooling, settings.teacher_encoder_rate)
        return [own] if student.kind == "finetuned" else self.recipes

    def search(self, student: Student, task: str) -> list[Stage]:
        """The runs that the recipe is chosen from, one per recipe with the first seed; none if there is one recipe."""
        recipes = self.recipes_of(student)
        if len(recipes) == 1 or student.kind in FITTED:  # the latter choose C in their only stage
            return []
        return [self.finetune(student, self.settings.seeds[0], task, recipe) for recipe in recipes]

    def _finetuned(self, student: Student, seed: int, task: str, recipe: Recipe | None) -> list[Stage]:
        """Finetuning and evaluation with a recipe, or both deferred until it is chosen."""
        finetuned = self.finetune(student, seed, task, recipe or self.recipes_of(student)[0])
        scored = self.evaluate(finetuned)
        if recipe is not None:
            return [finetuned, scored]
        searched = tuple(stage.folder for stage in self.search(student, task))
        later = replace(finetuned, needs=(*finetuned.needs, *searched), deferred=True)
        if seed == self.settings.seeds[0]:  # the search has finetuned it already
            return [replace(scored, needs=later.needs, deferred=True)]
        return [later, replace(scored, needs=(later.key, *searched), deferred=True)]

    def _stage(self, command: str, name: str, needs: Iterable[Stage], changes: Mapping[str, Any]) -> Stage:
        key = str((command, name, dict(changes)))
        if key not in self._made:
            whole = _changed(self.values, changes)
            config = {top: whole[top] for top in (*self._keys[command](whole), *EXECUTION_KEYS)}
            slug = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-")
            hashed = identity(config)
            if hashed.get("teacher_cache"):
                caches: list[str] = hashed["teacher_cache"].split(",")
                hashed["teacher_cache"] = ",".join(self._predictions.get(one, one) for one in caches)
            folder = f"{slug}-{fingerprint([command, hashed])}"
            self._made[key] = Stage(name, command, config, tuple(need.folder for need in needs), folder)
        return self._made[key]

    def _after(self, command: str, name: str, needs: Iterable[Stage], changes: Mapping[str, Any]) -> Stage:
        """A stage that reads the prepared folder and needs `prepare` next to `needs`."""
        prepared = self.prepare()
        return self._stage(command, name, (prepared, *needs), {"prepared": STAGE + prepared.folder, **changes})

    def prepare(self) -> Stage:
        return self._stage("prepare", "prepare", (), {})

    def imported(self) -> Stage | None:
        """The model of `transformers` that the teacher is; None if it is pretrained here."""
        changes = {"seed": 0, "import_model.path": self.settings.teacher_import}
        return self._after("import_model", "import-teacher", (), changes) if self.settings.teacher_import else None

    def teacher(self) -> Stage:
        """The generic teacher, the same for all seeds: masked-LM pretraining on generic text alone, or an imported
        model, whose masked-LM head is trained on generic text if study.train_head says so.
        """
        imported, changes = self.imported(), {**GENERIC, "pretrain.model": "teacher"}
        if imported is None:
            return self._after("pretrain", "pretrain-teacher", (), changes)
        if not self.settings.train_head:
            return imported
        changes |= {"seed": 0, "pretrain.init_from": STAGE + imported.folder, "train_body": False}
        return self._after("pretrain", "train-teacher-head", (imported,), changes)

    def adapted_teacher(self) -> Stage:
        """The generic teacher, with pretraining continued on task text."""
        teacher = self.teacher()
        job = {**self.values["adapt"], "model": "teacher", "init_from": STAGE + teacher.folder}
        changes = {**GENERIC, "transfer.task_share": 1.0, "pretrain": job}
        return self._after("pretrain", "adapt-teacher", (teacher,), changes)

    def teachers(self) -> dict[str, Stage]:
        """The teachers that the study trains or imports, by the name that students call them."""
        wanted = self.settings.adapted_sets or self.settings.schedule_sets or self.settings.average_sets
        return {"generic": self.teacher(), **({"adapted": self.adapted_teacher()} if wanted else {})}

    def transfer(self, transfer_set: str) -> dict[str, Any]:
        """The changes that make config.transfer that of a transfer set."""
        kind = "selected" if transfer_set in self.settings.selected_sets else "generic"
        share = task_shares(self.settings)[transfer_set]
        limit = self.settings.task_texts.get(transfer_set, self.values["transfer"]["task_texts"]) if share else 0
        return {"transfer.task_share": share, "transfer.generic": kind, "transfer.task_texts": int(limit)}

    def cached(self, teacher: str) -> list[Stage]:
        """The caches of a teacher's states, predictions, or both, for all its students and seeds, in the order of the
        parts of their loss; empty if none is used."""
        if not self.caches or teacher not in ("generic", "adapted"):
            return []
        return [self._cache(teacher, part.clean) for _, part in self.distill.parts]

    def _cache(self, teacher: str, clean: bool) -> Stage:
        sets = task_shares(self.settings) if teacher == "generic" else self.settings.adapted_sets
        transfers = [self.transfer(name) for name in sets]
        of = self.teachers()[teacher]
        if clean:
            stage = self._after("cache_states", f"states-{teacher}", (of,), self._states(of, transfers))
            return self._predicted(stage, "states", CACHED_ROWS)
        changes = {
            "seed": 0,
            "teacher_checkpoint": STAGE + of.folder,
            **GENERIC,
            "cache.task_shares": tuple(one["transfer.task_share"] for one in transfers),
            "cache.generic": tuple(one["transfer.generic"] for one in transfers),
            "cache.task_texts": tuple(one["transfer.task_texts"] for one in transfers),
            "cache.seeds": self.settings.seeds,
            "cache.steps": self.distill.steps,
            "cache.batch_size": self.distill.batch_size,
            # Hidden states serve any temperature, so theirs must not change the folder.
            "cache.temperature": 1.0 if self.cache_settings.format == "hidden" else self.distill.kl.temperature,
        }
        return self._predicted(self._after("cache_teacher", f"cache-{teacher}", (of,), changes), "cache", CACHED_RUNS)

    def _states(self, teacher: Stage, transfers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The config changes by which config.states covers what the students of these transfer sets read."""
        shares = [(one["transfer.task_share"], one["transfer.generic"]) for one in transfers]
        kinds = {"task" for share, _ in shares if share > 0} | {kind for share, kind in shares if share < 1}
        ours, theirs = (self.values[name]["num_layers"] for name in ("student", "teacher"))

        def layers(term: Hidden | Relations, key: str) -> str:
            if not term.used:
                return "none"
            pairs = layer_map(read_layers(term.layers, key), ours, theirs, key)
            return ",".join(str(layer) for layer in sorted({layer for _, layer in pairs}))

        return {
            "seed": 0,
            "teacher_checkpoint": STAGE + teacher.folder,
            "states.layers": layers(self.distill.hidden, "distill.hidden.layers"),
            "states.relations": layers(self.distill.relations, "distill.relations.layers"),
            "states.kinds": tuple(sorted(kinds)),
        }

    def _predicted(self, stage: Stage, block: str, rows: Iterable[str]) -> Stage:
        """The stage of a cache, whose identity is recorded; rows: the keys of its block that only select rows."""
        if STAGE + stage.folder not in self._predictions:
            values = identity(stage.config)
            for key in rows:
                del values[block][key]
            self._predictions[STAGE + stage.folder] = fingerprint(values)
        return stage

    def intermediate(self, transfer_set: str, seed: int) -> Stage:
        """The intermediate student of a chain, distilled from the generic teacher over the same transfer set."""
        teacher = self.teacher()
        changes = {
            "seed": seed,
            "teacher_checkpoint": STAGE + teacher.folder,
            "student": self.values["intermediate"],
            "distill": {**self.values["distill"], **self.values["chain"]},
            **self.transfer(transfer_set),
        }
        return self._after("distill", f"intermediate-{transfer_set}-seed{seed}", (teacher,), changes)

    def initialized(self, seed: int) -> Stage:
        """The student with which distillation starts, from the generic teacher."""
        teacher = self.teacher()
        changes = {"seed": seed, "teacher_checkpoint": STAGE + teacher.folder}
        return self._after("initialize", f"{INITIALIZED}-seed{seed}", (teacher,), changes)

    def encoder(self, student: Student, seed: int) -> Stage | None:
        """The stage that trains the student's encoder; None for from-scratch. A finetuned teacher is its own."""
        if student.kind == "scratch":
            return None
        if student.kind == "finetuned":
            return self.teacher()
        if student.kind == INITIALIZED:
            return self.initialized(seed)
        name, changes = f"{student.name}-seed{seed}", {"seed": seed, **self.transfer(student.transfer_set)}
        if student.kind == "mlm":
            # The same text, steps, batch and schedule as the distilled students; only the teacher is missing.
            job = {key: self.values["distill"][key] for key in self.values["adapt"]}
            start = [self.initialized(seed)] if student.teacher == INITIALIZED else []
            if not start:
                job["table_rate"] = 1.0  # a slower table is meant for one taken from the teacher
            changes["pretrain"] = {**job, "model": "student", "init_from": "".join(STAGE + one.folder for one in start)}
            return self._after("pretrain", name, start, changes)
        teachers = self.teachers()
        if student.teacher == "chain":
            needs = [self.intermediate(student.transfer_set, seed)]
        elif student.teacher in teachers:
            needs = [teachers[student.teacher]]
        else:
            needs = [teachers["generic"], teachers["adapted"]]
        changes["teacher_checkpoint"] = ",".join(STAGE + one.folder for one in needs)
        if student.teacher == "schedule":
            steps = self.distill.steps
            switch = min(max(round(self.settings.schedule_switch * steps), 1), steps - 1)
            changes["distill.teacher_steps"] = (0, switch)
        caches = self.cached(student.teacher)
        if caches:
            changes["teacher_cache"] = ",".join(STAGE + one.folder for one in caches)
            needs += caches
        return self._after("distill", name, needs, changes)

    def finetune(self, student: Student, seed: int, task: str, recipe: Recipe) -> Stage:
        encoder = self.encoder(student, seed)
        changes = {"seed": seed, "finetune.init_from": STAGE + encoder.folder if encoder else ""}
        changes |= {"finetune.learning_rate": recipe.learning_rate, "finetune.epochs": recipe.epochs}
        changes |= {"finetune.pooling": recipe.pooling, "finetune.encoder_rate": recipe.encoder_rate}
        needs = [encoder] if encoder else []
        if student.teacher == LABELED:
            labels = self._labels(task)[-1]
            changes["finetune.labels"] = STAGE + labels.folder
            needs.append(labels)
        return self._after(f"finetune_{task}", f"{task}-{student.name}-seed{seed}", needs, changes)

    def evaluate(self, finetuned: Stage, partition: str = "test") -> Stage:
        changes = {"prepared": STAGE + self.prepare().folder, "evaluate.checkpoint": STAGE + finetuned.folder}
        changes["evaluate.partition"] = partition
        name = "label" if partition == "unlabeled" else partition
        return self._stage("evaluate", f"{name}-{finetuned.name}", (finetuned,), changes)

    def _labels(self, task: str) -> list[Stage]:
        """The finetuned teacher of a task, and its labels for the train utterances that it was not trained on."""
        teacher = Student("finetuned")
        finetuned = self.finetune(teacher, self.settings.seeds[0], task, self.recipes_of(teacher)[0])
        return [finetuned, self.evaluate(finetuned, "unlabeled")]

    def baseline(self, student: Student, task: str) -> Stage:
        """The stage that fits and scores a row of FITTED: all tasks at once, unless its labels are for one task."""
        tasks, needs, name = self.settings.tasks, list[Stage](), student.name
        changes: dict[str, Any] = {"baseline.features": FITTED[student.kind]}
        if student.teacher == LABELED:
            labels = self._labels(task)[-1]
            changes["baseline.labels"] = STAGE + labels.folder
            tasks, name = (task,), f"{name}-{task}"
            needs.append(labels)
        if student.kind == "probe":
            teacher = self.teacher()
            changes["teacher_checkpoint"] = STAGE + teacher.folder
            needs.append(teacher)
        changes |= {f"baseline.{name}": self.values["finetune"][name] for name in ("max_train", "max_dev")}
        changes |= {"baseline.tasks": tasks, "baseline.c_values": self.c_values}
        return self._after("baseline", name, needs, changes)

    @property
    def c_values(self) -> tuple[float, ...]:
        """As many values of C as students have recipes, and at least the three of config.baseline."""
        given = tuple(float(c) for c in self.values["baseline"]["c_values"])
        count = len(self.recipes)
        if count <= len(given):
            return given
        step = (max(given) / min(given)) ** (1 / (count - 1))
        return tuple(float(f"{min(given) * step**number:.3g}") for number in range(count))

    def latency(self) -> Stage | None:
        """Size and latency of the shapes that the study trains; None if study.latency is off."""
        if not self.settings.latency:
            return None
        models = ("teacher", *(("intermediate",) if self.settings.chain_sets else ()), "student")
        task = "icner" if "icner" in self.settings.tasks else "dc"
        changes = {"latency.models": models, "latency.task": task, "latency.pooling": self.poolings[0]}
        return self._after("latency", "latency", (), changes)


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values with some dotted keys replaced; blocks without a change are shared with `values`, not copied."""
    whole = dict(values)
    for key, value in changes.items():
        *parents, last = key.split(".")
        block = whole
        for parent in parents:
            block[parent] = dict(block[parent])
            block = block[parent]
        block[last] = value
    return whole
