"""What the benchmark measures and reports: a distillation step, finetuning and prediction, and growth with size."""

import dataclasses
import importlib.util
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from benchmarks import workloads
from benchmarks.layouts import counts
from benchmarks.rounds import Measured, check_agreement, measure, ratio, spread
from benchmarks.worker import Worker, running
from kd_jax.config import to_dict
from kd_jax.data.masking import num_slots
from kd_jax.data.prepared import Prepared
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.flops import distill_flops
from kd_jax.models.functional import Functional, parameter_count

Say = Callable[[str], None]
HAS_PYTORCH = importlib.util.find_spec("torch") is not None  # an optional extra

# Variant of the step -> what it is; the numbers are those of docs/performance.md.
LABELS = {
    "padded_all": "1 kd_jax: padded, all logits",
    "packed_all": "2 kd_jax: packed, all logits",
    "packed_masked": "3 kd_jax: packed, masked",
    "packed_cached": "4 kd_jax: packed, masked, cached",
    "pytorch_eager": "5a PyTorch: padded, all logits",
    "pytorch_compiled": "5b PyTorch: the same, compiled",
    "pytorch_best": "6a PyTorch: packed, masked, compiled",
    "pytorch_narrow": "6b PyTorch: the same, last layer narrow",
}
REFERENCE = "packed_masked"
# (slower, faster): the ratios that are reported where both were measured.
RATIOS = (
    *((name, REFERENCE) for name in LABELS if name not in (REFERENCE, "packed_cached")),
    (REFERENCE, "packed_cached"),
)

# Layout of finetuning batches -> what it is.
LAYOUTS = {
    "packed": "packed rows",
    "padded": "one a row: to the row length",
    "longest": "one a row: to the longest in the batch",
}

# Axis of the scaling section -> what it counts.
AXES = {
    "batch": "rows a step",
    "length": "tokens a row, at the same tokens a step",
    "vocabulary": "tokens in the vocabulary",
    "layers": "layers of the student",
    "devices": "virtual devices on the same cores",
}


def variants() -> tuple[str, ...]:
    """The variants of the step that can be measured here."""
    return tuple(name for name in LABELS if HAS_PYTORCH or not name.startswith("pytorch"))


def shapes_of(config: ConfigDict, vocabulary: int) -> dict[str, EncoderConfig]:
    """Student and teacher, for that many tokens in the vocabulary."""
    return {name: workloads.encoder_of(config, name, vocabulary) for name in ("student", "teacher")}


def distill_spec(config: ConfigDict, shapes: Mapping[str, EncoderConfig]) -> dict[str, Any]:
    """What every worker that distills reads."""
    return {
        "models": {name: dataclasses.asdict(shape) for name, shape in shapes.items()},
        "job": to_dict(config)["distill"],
        "temperature": config.distill.kl.temperature,
        "kl_weight": config.distill.kl.weight,
        "mlm_weight": config.distill.mlm.weight,
        "block": config.distill.block_positions,
        "threads": config.benchmark.threads,
        "device": config.benchmark.device,
        "dtype": config.compute_dtype,
    }


def measure_step(config: ConfigDict, prepared: Prepared, folder: pathlib.Path, say: Say) -> dict[str, Any]:
    """This project's distillation step against itself and against PyTorch, on each of config.benchmark.texts."""
    block = config.benchmark
    shapes = shapes_of(config, prepared.tokenizer.vocab_size)
    models = {name: Functional("mlm", shape) for name, shape in shapes.items()}
    workloads.write_weights(folder / "weights", models, config.seed)
    if not HAS_PYTORCH:
        say("PyTorch is not installed: variants 5 and 6 are left out (pip install torch adds them)")
    texts = {}
    for name, share in sorted(block.texts.items(), key=lambda item: -item[1]):
        packed = workloads.masked_batches(config, prepared, share)
        workloads.write_batches(folder / f"{name}.npz", packed)
        workloads.write_predictions(folder, name, models["teacher"], packed)
        spec = {
            **distill_spec(config, shapes),
            "cached_batches": str(folder / f"{name}-cached.npz"),
            "batches": str(folder / f"{name}.npz"),
            "weights": str(folder / "weights"),
            "pad_id": prepared.tokenizer.pad_id,
            **{key: block[key] for key in ("gemm_size", "gemm_steps")},
        }
        say(f"{name}: {counts(packed)}")
        texts[name] = {"task_share": share, **measure_text(block, spec, packed, shapes, folder / name, say)}
    return {
        "parameters": {name: parameter_count(model.abstract()) for name, model in models.items()},
        "vocabulary": prepared.tokenizer.vocab_size,
        "labels": {name: LABELS[name] for name in variants()},
        "gemm_peak": max(text["gemm_peak"] for text in texts.values()),
        "dtype": config.compute_dtype,
        "texts": with_shares(texts),
    }


def measure_text(
    block: ConfigDict, spec: Mapping[str, Any], packed: Sequence, shapes: Mapping, folder: pathlib.Path, say: Say
) -> dict[str, Any]:
    """All variants of the step on one text."""
    names = variants()
    peaks = ("gemm_jax", "gemm_pytorch") if HAS_PYTORCH else ("gemm_jax",)
    passes = {**dict.fromkeys(names, len(packed)), **dict.fromkeys(peaks, block.gemm_steps)}
    agreed: dict[str, float] = {}

    def check(found: Mapping[str, Measured]) -> None:
        values = {name: found[name].first_values for name in names}
        agreed.update(check_agreement(values, REFERENCE, block.check_steps, block.tolerance))

    with running({name: Worker(name, name, spec, folder) for name in passes}) as workers:
        measurement = measure(workers, passes, block.rounds, check, say)
    found, held = measurement.workers, counts(packed)
    sizes = (held["rows"], held["length"], packed[0]["masked_positions"].shape[1])
    return {
        "held": held,
        "others_busy": measurement.others_busy,
        "useful_flops": distill_flops(shapes["student"], shapes["teacher"], *sizes, narrow=True) * len(packed),
        "gemm_peak": max(found[name].prepared["flops"] / min(found[name].passes) for name in peaks),
        "variants": {name: step_summary(found[name], held) | {"difference": agreed[name]} for name in names},
        "ratios": {
            f"{fast}/{slow}": ratio(found[slow], found[fast]) for slow, fast in RATIOS if {slow, fast} <= set(names)
        },
    }


def step_summary(one: Measured, held: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of a variant of the step."""
    return {
        **one.summary(),
        "tokens_per_second": spread([held["tokens"] / seconds for seconds in one.passes]),
        "seconds_per_step": spread([seconds / held["batches"] for seconds in one.passes]),
        "process_memory": one.step_memory,
        "first_losses": one.first_values[0],
    }


def with_shares(texts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Adds each variant's share of the highest GEMM rate in the run: counting all that it computes, and only the useful
    part, which packed rows with logits at the masked positions need.
    """
    peak = max(text["gemm_peak"] for text in texts.values())
    for text in texts.values():
        for one in text["variants"].values():
            seconds = one["seconds_per_step"]["median"] * text["held"]["batches"]
            one["gemm_share"] = one["flops"] / seconds / peak
            one["useful_share"] = text["useful_flops"] / seconds / peak
    return dict(texts)


def measure_finetune(config: ConfigDict, prepared: Prepared, folder: pathlib.Path, say: Say) -> dict[str, Any]:
    """ICNER finetuning and prediction, packed rows against one utterance a row."""
    block = config.benchmark
    shape = workloads.encoder_of(config, "student", prepared.tokenizer.vocab_size)
    training, predicting, sizes = workloads.labeled_batches(config, prepared)
    model = Functional("icner", shape, intents=sizes["intents"], tags=sizes["tags"])
    workloads.write_weights(folder / "weights", {"icner": model}, config.seed)
    result = {}
    for job, batches in {"finetune": training, "predict": predicting}.items():
        workloads.write_batches(folder / f"{job}.npz", batches)
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

        started = {name: Worker(f"{job}_{name}", job, {**spec, "layout": name}, folder) for name in LAYOUTS}
        with running(started) as workers:
            measurement = measure(workers, dict.fromkeys(LAYOUTS, len(batches)), block.rounds, check, say)
        found = measurement.workers
        result[job] = {
            "held": held,
            "others_busy": measurement.others_busy,
            "variants": {
                name: {
                    **one.summary(),
                    "utterances_per_second": spread([held["texts"] / seconds for seconds in one.passes]),
                    "tokens_per_second": spread([held["tokens"] / seconds for seconds in one.passes]),
                    "difference": agreed[name],
                }
                for name, one in found.items()
            },
            "ratios": {f"packed/{name}": ratio(found[name], found["packed"]) for name in LAYOUTS if name != "packed"},
        }
    return {"labels": LAYOUTS, "classes": sizes, "jobs": result}


def scaling_sizes(config: ConfigDict, vocabulary: int) -> dict[str, list[tuple[int, dict[str, int]]]]:
    """Axis -> its points: the value on the axis, and all sizes of the step there."""
    base = {
        "rows": config.distill.batch_size,
        "length": config.rows.length,
        "vocabulary": vocabulary,
        "layers": config.student.num_layers,
        "devices": 1,
    }
    points: dict[str, list[tuple[int, dict[str, int]]]] = {axis: [] for axis in AXES}
    for axis in AXES:
        for value in config.benchmark.scaling[axis]:
            size = {**base, {"batch": "rows"}.get(axis, axis): value}
            if axis == "length":
                size["rows"] = max(1, base["rows"] * base["length"] // value)
            size["slots"] = num_slots(size["length"], config.masking.rate)
            points[axis].append((value, size))
    return points


def measure_scaling(config: ConfigDict, prepared: Prepared, folder: pathlib.Path, say: Say) -> dict[str, Any]:
    """The time of a distillation step against one size at a time; the points of an axis take turns."""
    block = config.benchmark
    vocabulary = prepared.tokenizer.vocab_size
    spec = distill_spec(config, shapes_of(config, vocabulary))
    result = {}
    for axis, points in scaling_sizes(config, vocabulary).items():
        workers = {}
        for value, size in points:
            name = f"{axis}-{value}"
            workers[name] = Worker(name, "scaling", {**spec, "size": size}, folder, devices=size["devices"])
        with running(workers):
            measurement = measure(workers, dict.fromkeys(workers, block.batches), block.rounds, lambda _: None, say)
        result[axis] = {"counts": AXES[axis], "others_busy": measurement.others_busy, "points": []}
        for (value, size), one in zip(points, measurement.workers.values(), strict=True):
            summary = one.summary()
            rate = summary["flops"] * block.batches / statistics.median(one.passes)
            per_step = spread([seconds / block.batches for seconds in one.passes])
            point = {"value": value, "size": size, "seconds_per_step": per_step, "flops_per_second": rate}
            result[axis]["points"].append({**point, **{k: summary[k] for k in ("flops", "compile_seconds", "memory")}})
    return {"axes": result}
