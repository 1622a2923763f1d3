"""The section "finetune": ICNER finetuning and prediction, packed rows against one utterance a row."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from benchmarks import workloads
from benchmarks.agreement import check_agreement
from benchmarks.handover import write_batches
from benchmarks.layouts import counts
from benchmarks.rounds import Measured, measure, ratio, spread
from benchmarks.workers import Worker, running
from kd_jax.config import to_dict
from kd_jax.data.prepared import Prepared
from kd_jax.models.functional import Functional

# Layout -> what it is.
LABELS = {
    "packed": "packed rows",
    "padded": "one a row: to the row length",
    "longest": "one a row: to the longest in the batch",
}
JOBS = ("finetune", "predict")


def run(config: ConfigDict, prepared: Prepared, folder: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures both jobs; everything that the workers read is written to `folder`."""
    block = config.benchmark
    shape = workloads.encoder_of(config, "student", prepared.tokenizer.vocab_size)
    training, predicting, sizes = workloads.labeled_batches(config, prepared)
    model = Functional("icner", shape, intents=sizes["intents"], tags=sizes["tags"])
    workloads.write_weights(folder / "weights", {"icner": model}, config.seed)
    result = {}
    for job, batches in zip(JOBS, (training, predicting)):
        write_batches(folder / f"{job}.npz", batches)
        spec = {
            "batches": str(folder / f"{job}.npz"),
            "weights": str(folder / "weights"),
            "models": {"student": dataclasses.asdict(shape)},
            "sizes": sizes,
            "job": to_dict(config)["finetune"],
            "pad_id": prepared.tokenizer.pad_id,
            "threads": block.threads,
        }
        held = counts(batches)
        say(f"{job}: {held}")
        agreed: dict[str, float] = {}

        def check(found: Mapping[str, Measured], agreed: dict[str, float] = agreed) -> None:
            values = {name: one.first_values for name, one in found.items()}
            agreed.update(check_agreement(values, "packed", block.check_steps, block.tolerance))

        with running({name: Worker(f"{job}_{name}", f"{job}_{name}", spec, folder) for name in LABELS}) as workers:
            measurement = measure(workers, dict.fromkeys(LABELS, len(batches)), block.rounds, check, say)
        found = measurement.workers
        result[job] = {
            "held": held,
            "others_busy": measurement.others_busy,
            "variants": {name: summary(one, held) | {"difference": agreed[name]} for name, one in found.items()},
            "ratios": {f"packed/{name}": ratio(found[name], found["packed"]) for name in LABELS if name != "packed"},
        }
    return {"labels": LABELS, "classes": sizes, "jobs": result}


def summary(one: Measured, held: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of a variant: rates a second, seconds, bytes."""
    return {
        **{key: one.prepared[key] for key in ("framework", "rows", "length", "flops")},
        "utterances_per_second": spread([held["texts"] / seconds for seconds in one.passes]),
        "tokens_per_second": spread([held["tokens"] / seconds for seconds in one.passes]),
        "compile_seconds": one.compile_seconds,
        "memory": one.step_memory - one.base_memory,
    }
