"""The whole comparison: prepare, pretrain, adapt, distill, finetune, evaluate, report.

python -m kd_jax.main.study --config=configs/FILE.py --workdir=DIR
    --status     the state of a study that is under way, in one line
    --dry-run    what it would run and take
    --plan       DIR/plan.json: its stages as jobs, which --stage=KEY runs one by one (docs/launch.md)
"""

import pathlib
import shlex
import time
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from kd_jax.data.prepared import Prepared
from kd_jax.evaluation.similarity import jensen_shannon, matched_jsd, vocabulary_overlap
from kd_jax.jobs import finetune, teachers
from kd_jax.jobs.cache import SUMMARY, check_temperature
from kd_jax.main import (
    cache_teacher,
    command,
    distill,
    evaluate,
    finetune_dc,
    finetune_icner,
    import_model,
    latency,
    prepare,
    pretrain,
)
from kd_jax.runtime import distributed
from kd_jax.runtime.files import read_json
from kd_jax.study import job_plan, study_jobs
from kd_jax.study.plan import may_cache
from kd_jax.study.report.collect import collect
from kd_jax.study.report.numbers import HEADLINE, Numbers
from kd_jax.study.report.report import summary_text, write_report
from kd_jax.study.run import Study
from kd_jax.trainer.run_directory import provenance

COMMANDS = {
    "prepare": prepare,
    "import_model": import_model,
    "pretrain": pretrain,
    "cache_teacher": cache_teacher,
    "distill": distill,
    "finetune_dc": finetune_dc,
    "finetune_icner": finetune_icner,
    "evaluate": evaluate,
    "latency": latency,
}


_STAGE = flags.DEFINE_string("stage", None, "Runs one stage of the plan, by its key in plan.json, in place of all.")


def check(config: ConfigDict) -> None:
    """Refuses what some stage would refuse, before the first one is run."""
    distill.check_settings(config)
    teachers.check_shapes_of(config)
    if config.study.cache and may_cache(config):
        check_temperature(config)
    finetune.check(config)


def open_study(config: ConfigDict, workdir: pathlib.Path, **together: Any) -> Study:
    """The study of a config, checked; together: how several processes share it."""
    check(config)

    def run_stage(name: str, stage_config: ConfigDict, folder: pathlib.Path) -> None:
        COMMANDS[name].run(stage_config, folder)

    return Study(config, workdir, run_stage, {name: module.keys for name, module in COMMANDS.items()}, **together)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Runs or resumes the study, writes its report and prints the result table."""
    started = time.monotonic()
    study = open_study(config, workdir, writes=jax.process_index() == 0, agree=distributed.from_first)
    study.run()
    if jax.process_index() == 0:
        report(study, started)


def run_stage(config: ConfigDict, workdir: pathlib.Path, key: str) -> None:
    """Runs the one stage of that key; the stage "report" is what `run` does when all stages are finished."""
    study = open_study(config, workdir, writes=jax.process_index() == 0, agree=distributed.from_first)
    job_plan.run_stage(study, key, lambda: run(config, workdir))


def report(study: Study, started: float) -> None:
    """Writes the report of a finished study and prints the result table."""
    prepared = Prepared(str(study.folder(study.planner.prepare())))
    about = {**provenance(), "left out, equal to a dev or test utterance": left_out(prepared)}
    about |= cached_predictions(study)
    inputs = collect(study, domains_against_generic(prepared), about)
    write_report(study.workdir, inputs)
    print(summary_text(inputs))
    if models := best_models(study, inputs.numbers):
        print("\nAsk the distilled students with the lowest test error (first seed):")
        print(f"  python -m kd_jax.main.predict --model={shlex.quote(','.join(map(str, models)))} TEXT")
    print(f"\nReport: {study.workdir / 'report.html'} and {study.workdir / 'report.md'}")
    print(
        f"This start took {time.monotonic() - started:.0f} s; all stages together {sum(study.seconds.values()):.0f} s."
    )


def best_models(study: Study, numbers: Numbers) -> list[pathlib.Path]:
    """For each task the directory of the model, of the first seed, whose distilled student has the lowest mean test
    error."""
    found = []
    for task in numbers.tasks():
        means = {
            student: mean.mean
            for student in numbers.students
            if student.kind == "distilled" and (mean := numbers.mean(student, task, HEADLINE[task].error)) is not None
        }
        if means:
            best = min(means, key=means.__getitem__)
            recipe = study.chosen[best.name, task]
            found.append(study.folder(study.planner.finetune(best, study.config.study.seeds[0], task, recipe)))
    return found


def cached_predictions(study: Study) -> dict[str, str]:
    """What was cached of each teacher, and how often a task row comes again with the same masks."""
    found = {}
    for stage in study.planner.cache_stages():
        cache = read_json(study.folder(stage) / SUMMARY)
        most = max(one["masks_repeat"] for one in cache["runs"])
        found[f"predictions of the {stage.name.removeprefix('cache-')} teacher"] = (
            f"{cache['rows']:,} rows, {cache['bytes'] / 2**20:.1f} MiB, {cache['bytes_per_position']:.0f} bytes a "
            f"masked position, {cache['mass_kept']:.1%} of its mass; a mask comes {most:.1f} times at the most in a run"
        )
    return found


def left_out(prepared: Prepared) -> str:
    """How many texts of which store the decontamination removed."""
    stores = [store for store in prepared.manifest["stores"] if store["removed"].get("decontaminated")]
    return ", ".join(f"{store['name']} {store['removed']['decontaminated']}" for store in stores) or "no text"


def domains_against_generic(prepared: Prepared) -> list[dict]:
    """The similarity of each domain's train text to the generic train text, by token counts."""
    vocabulary = prepared.tokenizer.vocab_size
    generic = np.zeros(vocabulary, np.int64)
    for store in prepared.stores("train"):
        if store.kind == "generic":
            generic += store.token_counts(vocabulary)
    by_domain: dict[str, list[str]] = {}
    for utterance in prepared.utterances:
        if utterance.partition == "train":
            by_domain.setdefault(utterance.domain, []).append(utterance.text)
    counts = {
        domain: np.bincount(np.concatenate(prepared.tokenizer.encode(texts)), minlength=vocabulary)
        for domain, texts in sorted(by_domain.items())
    }
    # The divergence of two samples falls with their size, so domains are also compared at the size of the smallest.
    size = int(min(of_domain.sum() for of_domain in counts.values()))
    return [
        {
            "domain": domain,
            "jsd": jensen_shannon(of_domain, generic),
            "jsd_matched": matched_jsd(of_domain, generic, size, seed=0),
            "overlap": vocabulary_overlap(of_domain, generic),
            "tokens": int(of_domain.sum()),
        }
        for domain, of_domain in counts.items()
    ]


def run_or_stage(config: ConfigDict, workdir: pathlib.Path) -> None:
    """What the command does: all stages, or the one of --stage."""
    if _STAGE.value:
        run_stage(config, workdir, _STAGE.value)
    else:
        run(config, workdir)


INSTEAD: dict[str, tuple[command.Instead, str]] = {
    "status": (
        lambda config, workdir: study_jobs.show_status(open_study(config, study_jobs.place(workdir))),
        "The state of a study that is under way, in one line; on a terminal it is kept up to date.",
    ),
    "dry-run": (
        lambda config, workdir: study_jobs.show_dry_run(open_study(config, workdir or study_jobs.NOWHERE)),
        "Prints what would be run and what it takes; reads no data and needs no network.",
    ),
    "plan": (
        lambda config, workdir: study_jobs.make_plan(open_study(config, study_jobs.place(workdir))),
        "Writes plan.json into the workdir: every stage as a job, which --stage=KEY runs.",
    ),
}

if __name__ == "__main__":
    command.main(run_or_stage, description="Compares transfer sets from start to report.", instead=INSTEAD)
