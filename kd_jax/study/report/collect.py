"""From what the stages left behind to results.jsonl and the inputs of the report."""

import pathlib
from typing import Any

from kd_jax.config import fingerprint, identity
from kd_jax.evaluation.records import read_records
from kd_jax.evaluation.results import IDENTITY, RECORDS, RESULTS
from kd_jax.jobs.baseline import ABOUT
from kd_jax.jobs.trained import whole
from kd_jax.runtime.files import read_json, read_json_lines, read_json_object, write_json_lines
from kd_jax.study.plan import FITTED, Student, task_shares
from kd_jax.study.report.numbers import TASK_NAMES, ReportInputs
from kd_jax.study.run import Study
from kd_jax.study.status import METRICS


def collect(study: Study, similarity: list[dict[str, Any]], provenance: dict[str, Any]) -> ReportInputs:
    """Reads every finished stage, writes results.jsonl, and returns the inputs of the report."""
    objects: list[dict[str, Any]] = []
    records, curves, realized = {}, {}, {}
    recipes, remarks = list(study.searched), list[str]()
    settings = study.settings
    for name, stage in study.planner.teachers().items():
        who = {"student": "teacher", "transfer_set": "", "teacher": name, "seed": study.values["seed"]}
        objects += heldout_results(study.heldout(stage), who)
        curves[f"teacher, {name}"] = read_curve(study.folder(stage))
    for student in study.planner.students:
        for seed in study.planner.seeds(student) or (None,):
            named = (student.kind, student.transfer_set, student.teacher, seed)
            who: dict[str, Any] = dict(zip(IDENTITY, named, strict=True))
            encoder = None if seed is None else study.planner.encoder(student, seed)
            if encoder is not None and student.kind != "finetuned":  # whose encoder is the teacher
                objects += heldout_results(study.heldout(encoder), who)
                curves[f"{student.name}, seed {seed}"] = read_curve(study.folder(encoder))
                if student.transfer_set:
                    realized[student.transfer_set] = read_json_object(study.folder(encoder) / "run.json")["realized"]
            for task in settings.tasks:
                scored = scored_folder(study, student, seed, task)
                objects += [{**row, **who} for row in read_json_lines(whole(scored / RESULTS))]
                records[*named, task] = read_records(whole(scored / RECORDS))
                if student.kind in FITTED:
                    about = read_json_object(scored.parent / ABOUT)[task]
                    recipes += [{"student": student.name, "task": task, **trial} for trial in about["trials"]]
                    remarks += [f"{student.name}, {TASK_NAMES[task]}: {note}." for note in about["notes"]]
    write_json_lines(study.workdir / RESULTS, objects)
    latency = study.planner.latency()
    measured = study.folder(latency) / "latency.json" if latency else None
    return ReportInputs(
        name=settings.name,
        config=dict(study.values),
        provenance={**provenance, "config": fingerprint(identity(study.values)), "seconds": study.seconds},
        results=objects,
        records=records,
        task_shares=task_shares(settings),
        selected=tuple(settings.selected_sets),
        task_texts=dict(settings.task_texts),
        realized=realized,
        curves=curves,
        similarity=similarity,
        recipes=recipes,
        notes=study.notes,
        remarks=remarks,
        latency=read_json(measured) if measured and measured.is_file() else None,
    )


def scored_folder(study: Study, student: Student, seed: int | None, task: str) -> pathlib.Path:
    """Where the test records and results of one row, seed and task are."""
    if seed is None:
        return study.folder(study.planner.baseline(student, task)) / task
    finetuned = study.planner.finetune(student, seed, task, study.chosen[student.name, task])
    return study.folder(study.planner.evaluate(finetuned))


def read_curve(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; none for a teacher that was imported and not trained."""
    return read_json_lines(folder / METRICS, growing=True)


def heldout_results(rows: list[dict[str, Any]], who: dict[str, Any]) -> list[dict[str, Any]]:
    """heldout.json as result objects: by language and over all languages, on held-out task and generic text."""
    found = []
    for kind in sorted({row["kind"] for row in rows}):
        of_kind = [row for row in rows if row["kind"] == kind]
        groups = {"all": of_kind}
        for row in of_kind:
            groups.setdefault(row["language"], []).append(row)
        for locale, group in groups.items():
            count = sum(row["count"] for row in group)
            place = {"scope": "all" if locale == "all" else "locale", "locale": locale, "domain": "all"}
            for metric in ("loss", "accuracy", "unigram_loss"):
                value = sum(row[metric] * row["count"] for row in group) / count
                scored = {"test_set": f"heldout_{kind}", "metric": metric, "value": value, "count": count}
                found.append({**who, "task": "mlm", **place, **scored})
    return found
