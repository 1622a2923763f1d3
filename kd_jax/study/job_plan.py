"""A study as jobs that several machines may run at once: plan.json, and one stage of it by its key.

A stage's key is its folder. Which recipe a student is finetuned with is known only when the search on dev is done:
until then the stages after it have their name as key, and the one who runs such a stage chooses the recipe first.
"""

import pathlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import fingerprint, identity, to_dict
from kd_jax.runtime.files import write_atomically, write_json
from kd_jax.runtime.paths import make_folder
from kd_jax.study.plan import Planner, Recipe, Stage, Student, recipes, students
from kd_jax.study.run import Study, best_of
from kd_jax.types import UserError

FILE = "plan.json"
TABLE = "plan.tsv"
REPORT = "report"
PHASES = ("teachers", "predictions", "students", "recipes", "finetuning", REPORT)

HOST_COMMANDS = ("prepare", REPORT)  # what computes on the host alone
_MOST_IN_ARRAY = 1000  # stages: SLURM numbers an array's jobs below MaxArraySize, 1001 where nobody raised it


@dataclass(frozen=True)
class Planned:
    """A stage of the plan, with the keys of those that must be finished before it.

    stage: None for the report. deferred: the recipe is not chosen yet, and `stage` is that of the first recipe.
    """

    phase: str
    key: str
    stage: Stage | None
    needs: tuple[str, ...]
    deferred: bool = False

    @property
    def command(self) -> str:
        return self.stage.command if self.stage else REPORT

    @property
    def name(self) -> str:
        return self.stage.name if self.stage else REPORT


def planned(study: Study) -> list[Planned]:
    """All stages of a study, each after what it needs, and the report. Reads which are finished, nothing else."""
    planner = study.planner
    found: dict[str, Planned] = {}

    def add(phase: str, stage: Stage) -> None:
        found.setdefault(stage.folder, Planned(phase, stage.folder, stage, stage.needs))

    for stage in planner.teacher_stages():
        add("teachers", stage)
    for stage in planner.cache_stages():
        add("predictions", stage)
    for stage in planner.before_recipes():
        add("recipes" if stage.command.startswith("finetune_") else "students", stage)
    for one in _after_recipes(study):
        found.setdefault(one.key, one)
    latency = planner.latency()
    if latency is not None:
        add("finetuning", latency)
    needed = {need for one in found.values() for need in one.needs}
    return [*found.values(), Planned(REPORT, REPORT, None, tuple(key for key in found if key not in needed))]


def _after_recipes(study: Study) -> Iterator[Planned]:
    """Finetuning and evaluation of every student and seed."""
    config, planner = study.config, study.planner
    for task in config.study.tasks:
        for student in students(config):
            recipe = choice(study, student, task)
            searched = tuple(stage.folder for stage in _search(planner, config, student, task))
            for seed in config.study.seeds:
                finetuned = planner.finetune(student, seed, task, recipe or recipes(config)[0])
                scored = planner.evaluate(finetuned)
                if recipe is not None:
                    yield Planned("finetuning", finetuned.folder, finetuned, finetuned.needs)
                    yield Planned("finetuning", scored.folder, scored, scored.needs)
                    continue
                before = (*finetuned.needs, *searched)
                if seed != config.study.seeds[0]:  # the first seed's is one of the search
                    yield Planned("finetuning", finetuned.name, finetuned, before, deferred=True)
                    before = (finetuned.name, *searched)
                yield Planned("finetuning", scored.name, scored, before, deferred=True)


def _search(planner: Planner, config: ConfigDict, student: Student, task: str) -> list[Stage]:
    options = recipes(config)
    if len(options) == 1:
        return []
    return [planner.finetune(student, config.study.seeds[0], task, recipe) for recipe in options]


def choice(study: Study, student: Student, task: str) -> Recipe | None:
    """The recipe of a student and a task, None while its search is not finished."""
    search = _search(study.planner, study.config, student, task)
    if not all(study.done(stage) for stage in search):
        return None
    return recipes(study.config)[best_of(study.dev_scores(student, task))]


def is_done(study: Study, one: Planned) -> bool:
    """Whether a stage is finished; the report never is, since it costs little and is written anew."""
    return one.stage is not None and not one.deferred and study.done(one.stage)


def run_stage(study: Study, key: str, report: Callable[[], None]) -> None:
    """Runs the stage of that key. Raises UserError for an unknown key, and when a stage it needs is not finished."""
    stages = {one.key: one for one in planned(study)}
    if key not in stages:
        # What was planned by its name before the search has a folder now.
        by_name = {one.name: one for one in stages.values() if one.phase == "finetuning"}
        if key not in by_name:
            raise UserError(
                f"--stage: this config has no stage {key}; the keys are those of {FILE}, made from the same config by "
                "--plan: if the config was changed since, plan again"
            )
        stages[key] = by_name[key]
    one = stages[key]
    missing = [need for need in one.needs if not is_done(study, stages[need])]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"--stage={key}: it needs {', '.join(missing[:3])}{more}, not finished (no DONE under "
            f"{study.workdir / 'stages'}); run what is missing first"
        )
    if one.stage is None:
        report()
        return
    study.check_teachers()
    study.run_one(one.stage, f"[{one.phase}] {one.name}")


def plan(
    study: Study, arguments: Sequence[str], resources: Callable[[Stage], Mapping[str, Any]] = lambda stage: {}
) -> dict[str, Any]:
    """The plan as JSON values.

    arguments: the command that plans, without --plan; each stage's command line is made from it. resources(stage):
    what a stage is estimated to take.
    """
    stages = planned(study)
    done = {one.key: is_done(study, one) for one in stages}
    return {
        "study": study.config.study.name,
        "config": fingerprint(identity(to_dict(study.config))),
        "workdir": str(study.workdir),
        "recipes_chosen": not any(one.deferred for one in stages),
        "stages": [
            {
                "key": one.key,
                "name": one.name,
                "phase": one.phase,
                "command": one.command,
                "folder": None if one.stage is None or one.deferred else str(study.folder(one.stage)),
                "needs": list(one.needs),
                "done": done[one.key],
                "command_line": command_line(arguments, one.key),
                "resources": {
                    "accelerator": one.command not in HOST_COMMANDS,
                    **(resources(one.stage) if one.stage else {}),
                },
            }
            for one in stages
        ],
        "arrays": arrays([one for one in stages if not done[one.key]]),
    }


def whole_command(arguments: Sequence[str]) -> str:
    """What runs all stages, for a shell."""
    return shlex.join(arguments)


def command_line(arguments: Sequence[str], key: str) -> str:
    """What runs one stage, for a shell."""
    return shlex.join([*arguments, f"--stage={key}"])


def arrays(stages: Sequence[Planned]) -> list[dict[str, Any]]:
    """The unfinished stages in groups that may run at once: {"name", "needs" (names of arrays), "accelerator",
    "stages" (keys)}, each array after those it needs.

    Stages are in one array when they run the same kind of command in the same phase and wait for the same arrays: a
    student without a teacher does not wait for teachers.
    """
    array_of: dict[str, tuple] = {}
    groups: dict[tuple, list[Planned]] = {}
    waits: dict[tuple, frozenset] = {}  # what a group waits for, directly or by way of another
    for one in stages:
        direct = frozenset(array_of[need] for need in one.needs if need in array_of)
        before = frozenset().union(*(waits[other] for other in direct))
        group = (one.phase, one.command.split("_")[0], direct - before)
        array_of[one.key] = group
        groups.setdefault(group, []).append(one)
        waits[group] = direct | before
    names: dict[tuple, list[str]] = {}
    found = []
    for number, (group, members) in enumerate(groups.items(), start=1):
        parts = [members[start : start + _MOST_IN_ARRAY] for start in range(0, len(members), _MOST_IN_ARRAY)]
        phase, kind, direct = group
        label = f"{number:02d}-{phase}" if kind == phase else f"{number:02d}-{phase}-{kind}"
        names[group] = [label if len(parts) == 1 else f"{label}-{part}" for part in range(1, len(parts) + 1)]
        found += [
            {
                "name": name,
                "needs": sorted(need for other in direct for need in names[other]),
                "accelerator": members[0].command not in HOST_COMMANDS,
                "stages": [one.key for one in part],
            }
            for name, part in zip(names[group], parts, strict=True)
        ]
    return found


def write_plan(workdir: pathlib.Path, values: Mapping[str, Any]) -> pathlib.Path:
    """Writes plan.json, and beside it plan.tsv for launchers: name, arrays it waits for, cpu or accelerator, keys."""
    make_folder(workdir)
    rows = [
        "\t".join(
            (
                one["name"],
                ",".join(one["needs"]) or "-",
                "accelerator" if one["accelerator"] else "cpu",
                " ".join(one["stages"]),
            )
        )
        for one in values["arrays"]
    ]
    write_atomically(workdir / TABLE, "".join(f"{row}\n" for row in rows))
    write_json(workdir / FILE, values)
    return workdir / FILE
