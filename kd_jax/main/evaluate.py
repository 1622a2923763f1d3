"""Scores a finetuned model on one partition: records.jsonl (one object an utterance), and from it results.jsonl.

python -m kd_jax.main.evaluate --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.evaluate.checkpoint=DIR
"""

import pathlib
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.commands import Evaluate
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.data.prepared import Prepared
from kd_jax.evaluation.results import RECORDS, RESULTS, results
from kd_jax.jobs import finetune, serving, trained
from kd_jax.main import command
from kd_jax.runtime.files import read_json_lines, read_json_object, write_json_lines
from kd_jax.runtime.paths import as_path
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.run_directory import RunDirectory


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    del config
    return ("prepared", "evaluate", "compute_dtype")


def work(config: ConfigDict, workdir: pathlib.Path) -> command.Work:
    """Predicts every utterance of config.evaluate.partition with the model of config.evaluate.checkpoint."""
    settings, execution = read(Evaluate, config.evaluate, "evaluate"), read_execution(config)
    del workdir
    prepared, mesh = Prepared(config.prepared), make_mesh(execution.mesh)
    utterances = finetune.scored_utterances(as_path(settings.checkpoint), prepared, settings.partition, "")
    problem = f"{settings.partition} has no utterance in {config.prepared}"
    require(len(utterances) > 0, "evaluate.partition", problem, "score the other one, or prepare data that has it")

    def score(directory: RunDirectory) -> dict[str, Any]:
        directory.start()
        which = (mesh, settings.partition, config.compute_dtype, execution.progress)
        records = finetune.predict_partition(as_path(settings.checkpoint), prepared, *which)
        if jax.process_index() == 0:
            write_json_lines(directory.path / RECORDS, records)
            rows = results(records, identity=lineage(settings.checkpoint), mode=settings.mode)
            write_json_lines(directory.path / RESULTS, rows)
        return {}

    return score


def show(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints the results over all locales and domains, a line each."""
    del config
    if jax.process_index() != 0:
        return
    for row in read_json_lines(workdir / RESULTS):
        if row["scope"] == "all" and row["value"] is not None:
            print(f"{row['test_set']:<12} {row['metric']:<24} {row['value']:.4f}  ({row['count']})")


def lineage(checkpoint: str) -> dict:
    """Whose results these are, read from the configs of the runs that the finetuned model came from."""
    if serving.is_served(checkpoint):
        record = read_json_object(as_path(checkpoint) / serving.RECORD)
        return lineage(record["config"]["export"]["checkpoint"])
    config = trained.run_config(checkpoint, "evaluate.checkpoint")
    start = config.finetune.init_from
    labeled = "labeled" if config.finetune.labels else ""
    who = {"student": "scratch", "transfer_set": "", "teacher": labeled, "seed": config.seed}
    if start:
        encoder = trained.run_config(start, "finetune.init_from")
        if "import_model" in encoder:
            return who | {"student": "imported", "teacher": pathlib.Path(start).name}
        if trained.run_command(start) == "initialize":
            return who | {"student": "initialized"}
        distilled = "distill" in encoder
        who["student"] = "distilled" if distilled else "mlm"
        who["transfer_set"] = f"task_share={encoder.transfer.task_share:g}"
        who["teacher"] = pathlib.Path(encoder.teacher_checkpoint).name if distilled else ""
    return who


COMMAND = command.Command("evaluate", "Scores a finetuned model.", keys, work, show=show)
run = COMMAND.run

if __name__ == "__main__":
    COMMAND.main()
