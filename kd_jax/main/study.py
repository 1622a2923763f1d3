"""The whole comparison: prepare, pretrain, adapt, distill, finetune, evaluate, report.

python -m kd_jax.main.study --config=configs/FILE.py --workdir=DIR
    --status     the state of a running study, in one line
    --dry-run    what it would run, and the estimated cost
    --plan       DIR/plan.json: its stages as jobs, which --stage=KEY runs one by one (docs/launch.md)
"""

import pathlib
import shlex
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from kd_jax.config import from_dict, require, to_dict
from kd_jax.config.commands import Baseline
from kd_jax.config.commands import Study as StudySettings
from kd_jax.config.execution import Execution
from kd_jax.config.settings import read
from kd_jax.config.training import Finetune
from kd_jax.data.prepared import Prepared
from kd_jax.jobs import teachers
from kd_jax.jobs.cache import check_temperature
from kd_jax.main import (
    baseline,
    cache_states,
    cache_teacher,
    command,
    distill,
    evaluate,
    finetune_dc,
    finetune_icner,
    import_model,
    initialize,
    latency,
    prepare,
    pretrain,
)
from kd_jax.models.encoder_config import encoder_config
from kd_jax.runtime import distributed
from kd_jax.runtime.copies import keep_copies_in
from kd_jax.runtime.files import write_json
from kd_jax.runtime.lock import tidy
from kd_jax.runtime.paths import as_path
from kd_jax.study import overview
from kd_jax.study.plan import MODELS, REPORT
from kd_jax.study.report import facts
from kd_jax.study.report.collect import collect
from kd_jax.study.report.report import summary_text, write_report
from kd_jax.study.run import Study, switched
from kd_jax.study.workers import Workers, serve
from kd_jax.trainer.run_directory import command_line, provenance

_MODULES = (
    *(prepare, import_model, pretrain, initialize, cache_teacher, cache_states, distill),
    *(baseline, finetune_dc, finetune_icner, evaluate, latency),
)
COMMANDS = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
KEYS = {name: lambda values, of=module.keys: of(from_dict(values)) for name, module in COMMANDS.items()}

# Runs `work_for_study` with this interpreter.
WORKER = (sys.executable, "-c", "from kd_jax.main.study import work_for_study; raise SystemExit(work_for_study())")


def check(study: Study) -> None:
    """Refuses what some stage would refuse, before the first one is run."""
    values, terms = study.values, study.planner.distill
    for _, part in terms.parts:
        teachers.check(part, read(Execution, values, ""), values["teacher_checkpoint"], values["teacher_cache"])
    remedy = "set study.cache, and give only hidden, relations and sentence a weight"
    require(study.planner.caches or not terms.center, "distill.center", "the mean is that of a cache of states", remedy)
    # Their students have no cache, and a schedule changes the teacher, perhaps not when the text changes.
    looped = [name for name in ("schedule", "average", "chain") if getattr(study.settings, f"{name}_sets")]
    fits = not looped or not (terms.center or terms.masked_from < 1)
    key = f"study.{(looped or ['chain'])[0]}_sets"
    remedy = "set it to (), or distill.center to False and distill.masked_from to 1"
    require(fits, key, "these students have their teacher in the loop, not a cache", remedy)
    student, teacher = (encoder_config(values[name], 1) for name in ("student", "teacher"))
    teachers.check_shapes_of(terms, student, teacher, values["vocabulary"]["trim"])
    if study.planner.caches and terms.trains_head:
        check_temperature(study.planner.cache_settings, terms)
    read(Finetune, values["finetune"], "finetune")
    read(Baseline, values["baseline"], "baseline")


def open_study(config: ConfigDict, workdir: pathlib.Path, **together: Any) -> Study:
    """The study of a config, checked. together: arguments for several processes that share it, or for workers."""

    def run_stage(name: str, values: dict[str, Any], folder: pathlib.Path) -> None:
        COMMANDS[name].run(from_dict(values), folder)

    study = Study(to_dict(config), workdir, run_stage, KEYS, **together)
    check(study)
    return study


def run(config: ConfigDict, workdir: pathlib.Path, key: str | None = None) -> None:
    """Runs or resumes all stages, or the one with that key; then writes the report unless the key is another's."""
    started = time.monotonic()
    together = {"writes": jax.process_index() == 0, "agree": distributed.from_first}
    study = open_study(config, workdir, workers=workers_of(config, workdir), **together)
    if jax.process_index() == 0:
        tidy(workdir)
    if key is None:
        study.run(lambda: overview.flops_of(study), quiet=logging.get_verbosity() <= logging.WARNING)
    else:
        study.run_stage(key)
    if key in (None, REPORT) and jax.process_index() == 0:
        report(study, started)


def workers_of(config: ConfigDict, workdir: pathlib.Path) -> Workers | None:
    """The processes of config.study.workers; None if this one runs all stages."""
    count, device = read(StudySettings, config.study, "study").workers, jax.default_backend()
    alone = device == "cpu" and jax.process_count() == 1
    problem = f"{count} workers would share {'the device' if device != 'cpu' else 'the processes of one job'}"
    require(count == 1 or alone, "study.workers", problem, "set it to 1; --plan runs stages as jobs of their own")
    about = {"config": to_dict(config), "workdir": str(workdir), "command_line": command_line()}
    return Workers(WORKER, about, count) if count > 1 else None


def work_for_study() -> int:
    """Runs a worker of a study, see `kd_jax.study.workers.serve`."""
    logging.set_verbosity(logging.WARNING)

    def opened(about: Mapping[str, Any]) -> Study:
        sys.argv = shlex.split(about["command_line"])  # for run.json, which records how to run it again
        config = from_dict(about["config"])
        keep_copies_in(config.storage.local)
        return open_study(config, as_path(about["workdir"]))

    return serve(opened, switched)


def report(study: Study, started: float) -> None:
    """Writes the report of a finished study and prints the result table."""
    prepared = Prepared(str(study.folder(study.planner.prepare())))
    about = {
        **provenance(),
        **facts.about_data(prepared, study.values["finetune"]["max_train"]),
        **facts.cached_predictions(study),
    }
    inputs = collect(study, facts.domains_against_generic(prepared), about)
    write_report(study.workdir, inputs)
    print(f"\n{summary_text(inputs)}")
    print(f"\nReport: {study.workdir / 'report.html'} and {study.workdir / 'report.md'}")
    if models := facts.best_models(study, inputs.numbers):
        write_json(study.workdir / MODELS, [one.relative_to(study.workdir).as_posix() for one in models])
        print("Query the distilled students with the lowest test error (first seed):")
        print(f"  python -m kd_jax.main.predict --model={shlex.quote(str(study.workdir))} TEXT")
    took, work = time.monotonic() - started, sum(study.seconds.values())
    print(f"This start took {took:.0f} s; all stages together {work:.0f} s.")


INSTEAD: dict[str, tuple[command.Instead, str]] = {
    "status": (
        lambda config, workdir: overview.show_status(open_study(config, overview.given(workdir))),
        "Prints the state of a running study in one line; on a terminal the line is kept up to date.",
    ),
    "dry-run": (
        lambda config, workdir: overview.show_dry_run(open_study(config, workdir or overview.NOWHERE)),
        "Prints what would be run and its estimated cost; reads at most the labeled files, and needs no network.",
    ),
    "plan": (
        lambda config, workdir: overview.make_plan(open_study(config, overview.given(workdir))),
        "Writes plan.json into the workdir: every stage as a job, which --stage=KEY runs.",
    ),
}

if __name__ == "__main__":
    # Here, since `advise` imports this module and has no such flag.
    stage = flags.DEFINE_string("stage", None, "Runs one stage of the plan, by its key in plan.json, instead of all.")
    command.main(
        lambda config, workdir: run(config, workdir, stage.value),
        description="Compares transfer sets from start to report.",
        instead=INSTEAD,
    )
