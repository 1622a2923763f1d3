"""Classifiers that students have to beat, on the same labels: n-grams, or a linear probe of the frozen teacher.

python -m kd_jax.main.baseline --config=configs/FILE.py --workdir=DIR --config.prepared=DIR \\
    [--config.baseline.features=teacher --config.teacher_checkpoint=DIR]
"""

import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.commands import Baseline
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.data.prepared import Prepared
from kd_jax.evaluation.results import RESULTS
from kd_jax.jobs import baseline
from kd_jax.jobs.teachers import KEY, find_teachers
from kd_jax.main import command
from kd_jax.runtime.files import read_json_lines, read_json_object
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.run_directory import RunDirectory


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    return ("prepared", "baseline", *((KEY, "compute_dtype") if config.baseline.features == "teacher" else ()))


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with the numbers of utterances that config.baseline takes from config.finetune filled in."""
    read(Baseline, config.baseline, "baseline")
    config = config.copy_and_resolve_references()
    for key in ("max_train", "max_dev"):
        if config.baseline[key] < 0:
            config.baseline[key] = config.finetune[key]
    return config


def work(config: ConfigDict, workdir: pathlib.Path) -> command.Work:
    """Fits and scores the classifiers of config.baseline."""
    del workdir
    settings, execution = read(Baseline, config.baseline, "baseline"), read_execution(config)
    prepared, mesh = Prepared(config.prepared), make_mesh(execution.mesh)
    data = {task: baseline.labeled(prepared, settings, task) for task in settings.tasks}
    teacher = None
    if settings.features == "teacher":
        found = find_teachers(config[KEY], prepared, config.compute_dtype, execution.sharding.teacher)
        require(len(found) == 1, KEY, f"a probe reads one teacher's states, not {len(found)}", "name one")
        teacher = found[0]

    def fit(directory: RunDirectory) -> dict[str, Any]:
        return baseline.run(directory, settings, data, prepared, teacher, mesh, execution.progress)

    return fit


def show(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints the trials of C, and the results over all locales and domains, one per line."""
    if jax.process_index() != 0:
        return
    about = read_json_object(workdir / baseline.ABOUT)
    for task in config.baseline.tasks:
        for one in about[task]["trials"]:
            dev = "" if one["dev_score"] is None else f"  dev {one['dev_score']:.4f}"
            print(f"{task}: {one['part']:<8} C = {one['c']:g}{dev}{'  chosen' if one['chosen'] else ''}")
        for note in about[task]["notes"]:
            print(f"{task}: {note}")
        for row in read_json_lines(workdir / task / RESULTS):
            if row["scope"] == "all" and row["value"] is not None:
                print(f"{row['test_set']:<12} {row['metric']:<24} {row['value']:.4f}  ({row['count']})")
    print(", ".join(f"{name} {seconds:.0f} s" for name, seconds in about["seconds"].items()))


COMMAND = command.Command("baseline", "Fits and scores n-grams or a probe of the teacher.", keys, work, resolve, show)
run = COMMAND.run

if __name__ == "__main__":
    COMMAND.main()
