"""Gathers what the stages left behind into results.jsonl and the inputs of the report."""

import pathlib
from collections.abc import Iterable
from typing import Any

from kd_jax.config import fingerprint, identity, to_dict
from kd_jax.evaluation.records import read_records
from kd_jax.runtime.files import read_json, read_json_lines, write_json_lines
from kd_jax.study.plan import Student, students, task_shares
from kd_jax.study.report.report import ReportInputs
from kd_jax.study.run import Study


def student_identity(student: Student, seed: int) -> dict[str, Any]:
    """The fields that tell whose result it is, in every object of results.jsonl."""
    return {"student": student.kind, "transfer_set": student.transfer_set, "teacher": student.teacher, "seed": seed}


def heldout_results(rows: Iterable[dict[str, Any]], who: dict[str, Any]) -> list[dict[str, Any]]:
    """heldout.json as result objects: by language and for all, on held-out task and generic text."""
    rows = list(rows)
    found = []
    for kind in sorted({row["kind"] for row in rows}):
        of_kind = [row for row in rows if row["kind"] == kind]
        groups = {"all": of_kind}
        for row in of_kind:
            groups.setdefault(row["language"], []).append(row)
        for locale, group in groups.items():
            count = sum(row["count"] for row in group)
            for metric in ("loss", "accuracy", "unigram_loss"):
                found.append(
                    {
                        **who,
                        "task": "mlm",
                        "scope": "all" if locale == "all" else "locale",
                        "locale": locale,
                        "domain": "all",
                        "test_set": f"heldout_{kind}",
                        "metric": metric,
                        "value": sum(row[metric] * row["count"] for row in group) / count,
                        "count": count,
                    }
                )
    return found


def collect(study: Study, similarity: list[dict[str, Any]], provenance: dict[str, Any]) -> ReportInputs:
    """Reads every finished stage, writes results.jsonl, and returns what the report is made from."""
    objects: list[dict[str, Any]] = []
    records, curves, realized = {}, {}, {}
    config = study.config
    for name, stage in study.planner.teachers().items():
        who = {"student": "teacher", "transfer_set": "", "teacher": name, "seed": config.seed}
        objects += heldout_results(study.heldout(stage), who)
        curves[f"teacher, {name}"] = read_curve(study.folder(stage))
    for student in students(config):
        for seed in config.study.seeds:
            encoder = study.planner.encoder(student, seed)
            if encoder is not None:
                objects += heldout_results(study.heldout(encoder), student_identity(student, seed))
                curves[f"{student.name}, seed {seed}"] = read_curve(study.folder(encoder))
                realized[student.transfer_set] = read_json(study.folder(encoder) / "run.json")["realized"]
            for task in config.study.tasks:
                finetuned = study.planner.finetune(student, seed, task, study.chosen[student.name, task])
                scored = study.folder(study.planner.evaluate(finetuned))
                who = student_identity(student, seed)
                objects += [{**row, **who} for row in read_json_lines(scored / "results.jsonl")]
                of_run = read_records(scored / "records.jsonl")
                records[student.kind, student.transfer_set, student.teacher, seed, task] = of_run
    write_json_lines(study.workdir / "results.jsonl", objects)
    return ReportInputs(
        name=config.study.name,
        config=to_dict(config),
        provenance={**provenance, "config": fingerprint(identity(to_dict(config))), "seconds": study.seconds},
        results=objects,
        records=records,
        task_shares=task_shares(config),
        selected=tuple(config.study.selected_sets),
        realized=realized,
        curves=curves,
        similarity=similarity,
        recipes=study.searched,
        notes=study.notes,
        latency=measured_latency(study),
    )


def measured_latency(study: Study) -> dict[str, Any] | None:
    """What the stage `latency` measured; None where the study has none or it was not run."""
    stage = study.planner.latency()
    file = study.folder(stage) / "latency.json" if stage else None
    return read_json(file) if file and file.is_file() else None


def read_curve(folder: pathlib.Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of each row of a run's metrics.jsonl; none for a teacher that was imported and not trained."""
    rows = read_json_lines(folder / "metrics.jsonl", growing=True)
    return [(row.pop("step"), row) for row in rows]
