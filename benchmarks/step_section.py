"""The section "step": this project's distillation step against itself and against PyTorch, on three kinds of text."""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Callable, Mapping, Sequence
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
from kd_jax.models.flops import distill_flops
from kd_jax.models.functional import Functional, parameter_count

Say = Callable[[str], None]

# Variant -> what it is; the numbers are those of docs/performance.md.
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


def has_pytorch() -> bool:
    """Whether the optional extra is installed."""
    return importlib.util.find_spec("torch") is not None


def variants() -> tuple[str, ...]:
    """The variants that can be measured here."""
    return tuple(name for name in LABELS if has_pytorch() or not name.startswith("pytorch"))


def run(config: ConfigDict, prepared: Prepared, folder: pathlib.Path, say: Say) -> dict[str, Any]:
    """Measures config.benchmark.texts one after the other; everything that the workers read is written to `folder`."""
    block = config.benchmark
    shapes = {
        name: workloads.encoder_of(config, name, prepared.tokenizer.vocab_size) for name in ("student", "teacher")
    }
    models = {name: Functional("mlm", shape) for name, shape in shapes.items()}
    workloads.write_weights(folder / "weights", models, config.seed)
    if not has_pytorch():
        say("PyTorch is not installed: variants 5 and 6 are left out (pip install torch adds them)")
    texts = {}
    for name, share in sorted(block.texts.items(), key=lambda item: -item[1]):
        packed = workloads.masked_batches(config, prepared, share)
        write_batches(folder / f"{name}.npz", packed)
        workloads.write_predictions(folder, name, models["teacher"], packed)
        spec = {
            "cached_batches": str(folder / f"{name}-cached.npz"),
            "batches": str(folder / f"{name}.npz"),
            "weights": str(folder / "weights"),
            "models": {key: dataclasses.asdict(shape) for key, shape in shapes.items()},
            "job": to_dict(config)["distill"],
            "temperature": config.distill.kl.temperature,
            "kl_weight": config.distill.kl.weight,
            "mlm_weight": config.distill.mlm.weight,
            "block": config.distill.block_positions,
            "pad_id": prepared.tokenizer.pad_id,
            **{key: block[key] for key in ("threads", "gemm_size", "gemm_steps")},
        }
        say(f"{name}: {counts(packed)}")
        texts[name] = {"task_share": share, **measure_text(block, spec, packed, shapes, folder / name, say)}
    return {
        "parameters": {name: parameter_count(model.abstract()) for name, model in models.items()},
        "vocabulary": prepared.tokenizer.vocab_size,
        "labels": {name: LABELS[name] for name in variants()},
        "gemm_peak": max(text["gemm_peak"] for text in texts.values()),
        "texts": with_shares(texts),
    }


def measure_text(
    block: ConfigDict, spec: Mapping[str, Any], packed: Sequence, shapes: Mapping, folder: pathlib.Path, say: Say
) -> dict[str, Any]:
    """All variants on one text, in processes of their own."""
    names = variants()
    peaks = ("gemm_jax", "gemm_pytorch") if has_pytorch() else ("gemm_jax",)
    passes = {**dict.fromkeys(names, len(packed)), **dict.fromkeys(peaks, block.gemm_steps)}
    agreed: dict[str, float] = {}

    def check(found: Mapping[str, Measured]) -> None:
        values = {name: found[name].first_values for name in names}
        agreed.update(check_agreement(values, REFERENCE, block.check_steps, block.tolerance))

    with running({name: Worker(name, name, spec, folder) for name in passes}) as workers:
        measurement = measure(workers, passes, block.rounds, check, say)
    found = measurement.workers
    held = counts(packed)
    rows, length = packed[0]["tokens"].shape
    slots = packed[0]["masked_positions"].shape[1]
    useful = distill_flops(shapes["student"], shapes["teacher"], rows, length, slots, narrow=True) * len(packed)
    return {
        "held": held,
        "others_busy": measurement.others_busy,
        "useful_flops": useful,
        "gemm_peak": max(found[name].prepared["flops"] / min(found[name].passes) for name in peaks),
        "variants": {name: summary(found[name], held) | {"difference": agreed[name]} for name in names},
        "ratios": {
            f"{fast}/{slow}": ratio(found[slow], found[fast]) for slow, fast in RATIOS if {slow, fast} <= set(names)
        },
    }


def summary(one: Measured, held: Mapping[str, Any]) -> dict[str, Any]:
    """What is reported of a variant: rates a second, seconds, bytes."""
    return {
        **{key: one.prepared[key] for key in ("framework", "rows", "length", "flops")},
        "tokens_per_second": spread([held["tokens"] / seconds for seconds in one.passes]),
        "seconds_per_step": spread([seconds / held["batches"] for seconds in one.passes]),
        "compile_seconds": one.compile_seconds,
        "memory": one.step_memory - one.base_memory,
        "process_memory": one.step_memory,
        "first_losses": one.first_values[0],
    }


def with_shares(texts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Adds each variant's share of the highest GEMM rate seen in the run: of what it computes, and of the useful part
    alone (what packed rows with logits at the masked positions need).
    """
    peak = max(text["gemm_peak"] for text in texts.values())
    for text in texts.values():
        for one in text["variants"].values():
            seconds = one["seconds_per_step"]["median"] * text["held"]["batches"]
            one["gemm_share"] = one["flops"] / seconds / peak
            one["useful_share"] = text["useful_flops"] / seconds / peak
    return dict(texts)
