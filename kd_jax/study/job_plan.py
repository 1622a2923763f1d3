"""A study as jobs that several machines may run at once: plan.json, and plan.tsv for launchers."""

import pathlib
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kd_jax.config import fingerprint, identity
from kd_jax.runtime.files import write_atomically, write_json
from kd_jax.runtime.paths import make_folder
from kd_jax.study.plan import REPORT, Stage
from kd_jax.study.run import Study

FILE, TABLE = "plan.json", "plan.tsv"

_MOST_IN_ARRAY = 1000  # stages; SLURM numbers an array's jobs below MaxArraySize, which is 1001 unless raised
_SWITCHES = ("--plan", "--dry-run", "--status", "--stage")


def arguments(argv: Sequence[str] | None = None) -> list[str]:
    """This process's command line as one that --stage can be added to, without the switches of `study`."""
    given = list(sys.argv[1:] if argv is None else argv)
    kept = [word for word in given if word.split("=")[0] not in _SWITCHES]
    if not any(word.split("=")[0] in ("--workdir", "-workdir") for word in kept):
        kept.append("--workdir=WORKDIR")
    return ["python", "-m", "kd_jax.main.study", *kept]


def command_line(arguments: Sequence[str], key: str) -> str:
    """The shell command that runs one stage."""
    return shlex.join([*arguments, f"--stage={key}"])


def plan(
    study: Study, arguments: Sequence[str], resources: Callable[[Stage], Mapping[str, Any]] = lambda stage: {}
) -> dict[str, Any]:
    """The plan as JSON values.

    arguments: the command that each stage's command line is made from. resources(stage): its estimated cost.
    """
    stages = study.planned()
    done = {stage.key: study.done(stage) for stage in stages}
    return {
        "study": study.settings.name,
        "config": fingerprint(identity(study.values)),
        "workdir": str(study.workdir),
        "recipes_chosen": not any(stage.deferred for stage in stages),
        "stages": [
            {
                "key": stage.key,
                "name": stage.name,
                "phase": stage.phase,
                "command": stage.command,
                "folder": None if stage.command == REPORT or stage.deferred else str(study.folder(stage)),
                "needs": list(stage.needs),
                "done": done[stage.key],
                "command_line": command_line(arguments, stage.key),
                "resources": {
                    "accelerator": stage.accelerator,
                    **(resources(stage) if stage.command != REPORT else {}),
                },
            }
            for stage in stages
        ],
        "arrays": arrays([stage for stage in stages if not done[stage.key]]),
    }


def arrays(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The unfinished stages in groups that may run at once: {"name", "needs" (names of arrays), "accelerator",
    "stages" (keys)}, each array after those it needs.

    Stages share an array when they run the same kind of command in the same phase and wait for the same arrays: a
    student without a teacher does not wait for teachers.
    """
    array_of: dict[str, tuple] = {}
    groups: dict[tuple, list[Stage]] = {}
    waits: dict[tuple, frozenset] = {}  # the groups that a group waits for, directly or through another
    for stage in stages:
        direct = frozenset(array_of[need] for need in stage.needs if need in array_of)
        before = frozenset().union(*(waits[other] for other in direct))
        group = (stage.phase, stage.command.split("_")[0], direct - before, stage.accelerator)
        array_of[stage.key] = group
        groups.setdefault(group, []).append(stage)
        waits[group] = direct | before
    names: dict[tuple, list[str]] = {}
    found = []
    for number, (group, members) in enumerate(groups.items(), start=1):
        parts = [members[start : start + _MOST_IN_ARRAY] for start in range(0, len(members), _MOST_IN_ARRAY)]
        phase, kind, direct, _ = group
        label = f"{number:02d}-{phase}" if kind == phase else f"{number:02d}-{phase}-{kind}"
        names[group] = [label if len(parts) == 1 else f"{label}-{part}" for part in range(1, len(parts) + 1)]
        found += [
            {
                "name": name,
                "needs": sorted(need for other in direct for need in names[other]),
                "accelerator": members[0].accelerator,
                "stages": [stage.key for stage in part],
            }
            for name, part in zip(names[group], parts, strict=True)
        ]
    return found


def write_plan(workdir: pathlib.Path, values: Mapping[str, Any]) -> pathlib.Path:
    """Writes plan.json, and plan.tsv with one array per line: name, needed arrays, cpu or accelerator, keys."""
    make_folder(workdir)
    lines = []
    for one in values["arrays"]:
        kind = "accelerator" if one["accelerator"] else "cpu"
        lines.append("\t".join((one["name"], ",".join(one["needs"]) or "-", kind, " ".join(one["stages"]))) + "\n")
    write_atomically(workdir / TABLE, "".join(lines))
    write_json(workdir / FILE, values)
    return workdir / FILE
