"""The section "scaling": the time of a distillation step against one size at a time."""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from benchmarks import workloads
from benchmarks.rounds import Measured, measure, spread
from benchmarks.workers import Worker, running
from kd_jax.config import to_dict
from kd_jax.data.masking import num_slots
from kd_jax.data.prepared import Prepared

# Axis -> what it counts.
AXES = {
    "batch": "rows a step",
    "length": "tokens a row, at the same tokens a step",
    "vocabulary": "pieces",
    "layers": "layers of the student",
    "devices": "virtual devices on the same cores",
}


def sizes(config: ConfigDict, vocabulary: int) -> dict[str, list[tuple[int, dict[str, int]]]]:
    """Axis -> its points, each the value on the axis and all sizes of the step there."""
    base = {
        "rows": config.distill.batch_size,
        "length": config.rows.length,
        "vocabulary": vocabulary,
        "layers": config.student.num_layers,
        "devices": 1,
    }
    points: dict[str, list[tuple[int, dict[str, int]]]] = {}
    for axis in AXES:
        points[axis] = []
        for value in config.benchmark.scaling[axis]:
            size = {**base, {"batch": "rows"}.get(axis, axis): value}
            if axis == "length":
                size["rows"] = max(1, base["rows"] * base["length"] // value)
            size["slots"] = num_slots(size["length"], config.masking.rate)
            points[axis].append((value, size))
    return points


def run(config: ConfigDict, prepared: Prepared, folder: pathlib.Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures the points of one axis in alternation, then those of the next."""
    block = config.benchmark
    vocabulary = prepared.tokenizer.vocab_size
    spec = {
        "models": {
            name: dataclasses.asdict(workloads.encoder_of(config, name, vocabulary)) for name in ("student", "teacher")
        },
        "job": to_dict(config)["distill"],
        "temperature": config.distill.kl.temperature,
        "kl_weight": config.distill.kl.weight,
        "mlm_weight": config.distill.mlm.weight,
        "block": config.distill.block_positions,
        "threads": block.threads,
    }
    result = {}
    for axis, points in sizes(config, vocabulary).items():
        workers = {}
        for value, size in points:
            name = f"{axis}-{value}"
            workers[name] = Worker(name, "scaling", {**spec, "size": size}, folder, devices=size["devices"])
        with running(workers):
            measurement = measure(workers, dict.fromkeys(workers, block.batches), block.rounds, lambda _: None, say)
        found = measurement.workers
        result[axis] = {
            "counts": AXES[axis],
            "others_busy": measurement.others_busy,
            "points": [point(value, size, found[f"{axis}-{value}"], block.batches) for value, size in points],
        }
    return {"axes": result}


def point(value: int, size: Mapping[str, int], one: Measured, steps: int) -> dict[str, Any]:
    """What is reported of a point: seconds a step, FLOPs a step, bytes."""
    return {
        "value": value,
        "size": dict(size),
        "seconds_per_step": spread([seconds / steps for seconds in one.passes]),
        "flops": one.prepared["flops"],
        "flops_per_second": one.prepared["flops"] * steps / statistics.median(one.passes),
        "compile_seconds": one.compile_seconds,
        "memory": one.step_memory - one.base_memory,
    }
