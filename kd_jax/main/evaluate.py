"""Scores a finetuned model on one partition: records.jsonl (one object an utterance), and from it results.jsonl.

python -m kd_jax.main.evaluate --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.evaluate.checkpoint=DIR
"""

import pathlib

import jax
from ml_collections import ConfigDict

from kd_jax.config import EXECUTION_KEYS, require, to_dict
from kd_jax.data.prepared import Prepared
from kd_jax.evaluation.results import RECORDS, RESULTS, results
from kd_jax.evaluation.slots import MODES
from kd_jax.jobs import finetune, serving, trained
from kd_jax.main import command
from kd_jax.runtime.files import read_json, read_json_lines, write_json_lines
from kd_jax.runtime.paths import as_path
from kd_jax.runtime.watchdog import Watchdog
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.run_directory import RunDirectory


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    del config
    return ("prepared", "evaluate", "compute_dtype")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Predicts every utterance of config.evaluate.partition with the model of config.evaluate.checkpoint."""
    block = config.evaluate
    known = block.partition in ("dev", "test")
    require(known, "evaluate.partition", f"{block.partition!r} is no partition to score", "use dev or test")
    require(block.mode in MODES, "evaluate.mode", f"{block.mode!r} is unknown", f"use {' or '.join(MODES)}")
    require(bool(block.checkpoint), "evaluate.checkpoint", "it is empty", "give the workdir of a finetune run")
    dog = Watchdog(config.watchdog_seconds, workdir, exits=config.watchdog_exit)
    prepared = Prepared(config.prepared)
    values = to_dict(config)
    directory = RunDirectory(workdir, "evaluate", {key: values[key] for key in (*keys(config), *EXECUTION_KEYS)})
    if directory.done:
        return
    directory.start()
    which = (make_mesh(config.mesh), block.partition, config.compute_dtype, config.progress)
    with dog:
        records = finetune.predict_partition(as_path(block.checkpoint), prepared, *which)
    if jax.process_index() == 0:
        write_json_lines(workdir / RECORDS, records)
        rows = results(records, identity=lineage(block.checkpoint), mode=block.mode)
        write_json_lines(workdir / RESULTS, rows)
    directory.finish()


def run_and_print(config: ConfigDict, workdir: pathlib.Path) -> None:
    """`run`, and then the results over all locales and domains, a line each."""
    run(config, workdir)
    if jax.process_index() != 0:
        return
    for row in read_json_lines(workdir / RESULTS):
        if row["scope"] == "all" and row["value"] is not None:
            print(f"{row['test_set']:<12} {row['metric']:<24} {row['value']:.4f}  ({row['count']})")


def lineage(checkpoint: str) -> dict:
    """Whose results these are, read from the configs of the runs that the finetuned model came from."""
    if serving.is_served(checkpoint):
        record = read_json(as_path(checkpoint) / serving.RECORD)
        return lineage(record["config"]["export"]["checkpoint"])
    config = trained.run_config(checkpoint, "evaluate.checkpoint")
    start = config.finetune.init_from
    who = {"student": "scratch", "transfer_set": "", "teacher": "", "seed": config.seed}
    if start:
        encoder = trained.run_config(start, "finetune.init_from")
        if "import_model" in encoder:
            return who | {"student": "imported", "teacher": pathlib.Path(start).name}
        distilled = "distill" in encoder
        who["student"] = "distilled" if distilled else "mlm"
        who["transfer_set"] = f"task_share={encoder.transfer.task_share:g}"
        who["teacher"] = pathlib.Path(encoder.teacher_checkpoint).name if distilled else ""
    return who


if __name__ == "__main__":
    command.main(run_and_print, description="Scores a finetuned model.")
