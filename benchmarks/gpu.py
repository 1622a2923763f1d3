"""Measures the distillation step on one accelerator with random weights and texts: fused against plain attention.

python -m benchmarks.gpu --config=configs/paper_scale.py:mmbert_small_17m --workdir=DIR [--config.compile_check.rows=64]

Nothing is read or downloaded. Writes DIR/gpu.json and prints a table.
"""

import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax.compile_check.hlo import Program
from kd_jax.compile_check.traffic import kernel_traffic
from kd_jax.config import require
from kd_jax.config.execution import Mesh
from kd_jax.jobs.abstract_job import AbstractJob, abstract_job
from kd_jax.jobs.masked_lm import resolve_dtype
from kd_jax.main import command
from kd_jax.runtime.files import write_json
from kd_jax.text_tables import markdown_table
from kd_jax.trainer.mesh import make_mesh

RESULT = "gpu.json"
SECONDS = 10.0  # of measuring per variant
AGREE = 0.02  # largest relative difference between the losses of the variants


def measure(config: ConfigDict, seconds: float) -> dict[str, Any]:
    """The content of gpu.json: {"device", "jax", "dtype", "rows", "length", "gemm_peak", "variants": {kernels: ...}}.

    For each variant "losses" of the first steps, "seconds" per step (median), "tokens_per_second", "share" of the peak,
    "bytes" of device memory, "compile_seconds" and "kernels". Raises UserError if the losses disagree.
    """
    config = config.copy_and_resolve_references()
    device, config.compute_dtype = jax.devices()[0], resolve_dtype(config.compute_dtype)
    mesh, peak = make_mesh(Mesh(), [device]), gemm_peak(config.compute_dtype)
    variants: dict[str, Any] = {}
    rows = config.compile_check.rows or config.distill.batch_size
    for kernels in ("fused", "plain"):
        config.attention = config.logits = kernels
        job = abstract_job(config, mesh)
        variants[kernels] = one = _variant(job, rows, seconds)
        one["share"] = job.flops(rows) / one["seconds"] / peak
    losses = [one["losses"] for one in variants.values()]
    agree = np.allclose(*losses, rtol=AGREE, atol=0)
    require(agree, "attention", f"fused and plain kernels give the losses {losses}", "report it, and use plain")
    about = {"device": device.device_kind, "jax": jax.__version__, "dtype": config.compute_dtype}
    return {**about, "rows": rows, "length": job.length, "gemm_peak": peak, "variants": variants}


def _variant(job: AbstractJob, rows: int, seconds: float) -> dict[str, Any]:
    began = time.perf_counter()
    compiled: Any = job.lower(rows).compile()
    took = time.perf_counter() - began
    memory = compiled.memory_analysis()
    sizes = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
    state, constants, batch = drawn(job.state), drawn(job.constants), texts(job, rows)
    losses: list[float] = []
    for _ in range(3):
        state, metrics = compiled(state, constants, batch)
        total, weight = metrics["mlm"]
        losses.append(float(total / weight))
    times, ends = [], time.perf_counter() + seconds
    while time.perf_counter() < ends or len(times) < 3:
        began = time.perf_counter()
        for _ in range(5):  # without waiting for each step, as in the trainer
            state, metrics = compiled(state, constants, batch)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - began) / 5)
    each = statistics.median(times)
    return {
        "losses": losses,
        "seconds": each,
        "tokens_per_second": rows * job.length / each,
        "bytes": sum(sizes) - memory.alias_size_in_bytes,
        "compile_seconds": took,
        "kernels": kernel_traffic(Program(compiled.as_text() or "")),
    }


def drawn(shapes: Any) -> Any:
    """Arrays for a state or for constants: small random parameters, scales of 1, and zeros for the optimizer."""

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        words = jax.tree_util.keystr(path)
        if "opt_state" in words or not jnp.issubdtype(leaf.dtype, jnp.floating):
            value = jnp.zeros(leaf.shape, leaf.dtype)
        elif words.endswith("['scale']"):
            value = jnp.ones(leaf.shape, leaf.dtype)
        else:
            key = jax.random.fold_in(jax.random.key(0), len(words))
            value = 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def texts(job: AbstractJob, rows: int) -> dict[str, Any]:
    """A batch of random texts of 5 to 100 tokens, several per row, with padding after the last."""
    rng, length = np.random.default_rng(0), job.length
    batch: dict[str, Any] = {name: np.zeros((rows, *shape), dtype) for name, (shape, dtype) in job.fields.items()}
    most = max(min(100, length // 2), 6)
    for row in range(rows):
        start, segment = 0, 1
        while (size := int(rng.integers(5, most))) <= length - start:
            batch["segment_ids"][row, start : start + size] = segment
            batch["positions"][row, start : start + size] = np.arange(size)
            start, segment = start + size, segment + 1
    slots = job.fields["masked_positions"][0][0]
    batch["tokens"] = rng.integers(5, 60, (rows, length)).astype(np.int32)
    batch["masked_positions"] = np.sort(rng.permuted(np.tile(np.arange(length), (rows, 1)), axis=1)[:, :slots])
    batch["masked_positions"] = batch["masked_positions"].astype(np.int32)
    batch["masked_targets"] = rng.integers(5, 60, (rows, slots)).astype(np.int32)
    batch["masked_weights"] = np.ones((rows, slots), np.float32)
    return batch


def gemm_peak(dtype: str) -> float:
    """FLOP/s of the product of two large square matrices, the best of several runs."""
    size = 512 if jax.default_backend() == "cpu" else 8192
    left = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    multiply = jax.jit(jnp.matmul)
    multiply(left, left).block_until_ready()
    times = []
    for _ in range(5):
        began, product = time.perf_counter(), left
        for _ in range(4):
            product = multiply(left, product)
        product.block_until_ready()
        times.append((time.perf_counter() - began) / 4)
    return 2.0 * size**3 / min(times)


def table(result: Mapping[str, Any]) -> str:
    """What was measured, in Markdown."""
    header = ("attention", "tokens/s", "ms per step", "% of measured peak", "memory, GiB", "compile, s", "kernels")
    rows = [
        (
            *(name, f"{one['tokens_per_second']:,.0f}", f"{1e3 * one['seconds']:.1f}", f"{100 * one['share']:.1f}"),
            *(f"{one['bytes'] / 2**30:.2f}", f"{one['compile_seconds']:.1f}"),
            ", ".join(f"{kernel} {runs:g}" for kernel, (runs, _) in one["kernels"].items()) or "none",
        )
        for name, one in result["variants"].items()
    ]
    head = (
        f"{result['device']}, jax {result['jax']}, {result['dtype']}, {result['rows']} rows of {result['length']} "
        f"tokens; a product of matrices: {result['gemm_peak'] / 1e12:.1f} TFLOP/s"
    )
    return f"{head}\n\n{markdown_table(header, rows)}"


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Measures, writes DIR/gpu.json and prints the table."""
    workdir.mkdir(parents=True, exist_ok=True)
    result = measure(config, 1.0 if jax.default_backend() == "cpu" else SECONDS)
    write_json(workdir / RESULT, result)
    print(table(result))


if __name__ == "__main__":
    command.main(run, description="Measures fused attention against plain on one accelerator.")
