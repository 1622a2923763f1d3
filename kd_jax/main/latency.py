"""Size and latency of a study's teacher and students, for choosing a student: latency.json.

python -m kd_jax.main.latency --config=configs/FILE.py --workdir=DIR --config.prepared=DIR

Timed is one call as `predict` makes it, from packed rows in host memory to classes in host memory, on one device;
reading and tokenizing text add the same time for all models. Parameters are random: how long a call takes depends only
on shapes. The models are called in turns, so that other load on the machine affects all of them.
"""

import itertools
import os
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import require, resolved
from kd_jax.config.commands import Latency
from kd_jax.config.data import Vocabulary
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.data.labeled import LabeledSet, packed
from kd_jax.data.prepared import Prepared
from kd_jax.data.text.utterances import LabelMaps, Utterance
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.evaluation.predictions import compiled_predict
from kd_jax.jobs import finetune, masked_lm, serving
from kd_jax.main import command
from kd_jax.models.functional import Functional, parameter_count
from kd_jax.models.int8 import weight_bytes
from kd_jax.runtime.files import read_json_object, write_sealed
from kd_jax.runtime.preemption import interruptible
from kd_jax.trainer.run_directory import RunDirectory, run_once
from kd_jax.types import Batch, Params, UserError

LATENCY = "latency.json"
BATCHES = (1, 64)  # utterances
ENCODERS = ("teacher", "intermediate", "student")  # blocks of the config
_UNTIMED = 3  # first calls: compilation, and caches that are still cold
_LEAST = 5  # timed calls, however long they take


class Measured(NamedTuple):
    """A model, its parameters on the device, and for each of BATCHES the packed rows of so many utterances."""

    model: Functional
    params: Params | None  # None if one device is too small for them
    batches: Mapping[int, Batch]


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command measures."""
    return ("prepared", "latency", "vocabulary", "compute_dtype", *config.latency.models)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Measures the encoders that config.latency.models names, with the heads of config.latency.task."""
    settings, vocabulary = read(Latency, config.latency, "latency"), read(Vocabulary, config.vocabulary, "vocabulary")
    execution, dtype = read_execution(config), masked_lm.resolve_dtype(config.compute_dtype)
    known = bool(settings.models) and all(name in ENCODERS for name in settings.models)
    require(known, "latency.models", f"{settings.models!r} names no encoder", f"name some of {', '.join(ENCODERS)}")
    encoders = {name: config[name].to_dict() for name in settings.models}

    def work(directory: RunDirectory) -> dict[str, Any]:
        directory.start()
        if jax.process_index() == 0:
            found = measure(encoders, settings, vocabulary, Prepared(config.prepared), dtype)
            write_sealed(directory.path / LATENCY, found)
        return {}

    run_once(workdir, "latency", resolved(config, keys(config)), execution, work)


def measure(
    encoders: Mapping[str, Mapping[str, Any]],
    settings: Latency,
    vocabulary: Vocabulary,
    prepared: Prepared,
    dtype: Any = "float32",
) -> dict[str, Any]:
    """The content of latency.json: {"task", "length", "dtype", "device", "cores", "models": [...]}.

    encoders: name -> keys of its block of the config. Each model has its name, layers, hidden size, vocabulary,
    "parameters" and "without_embeddings", "bytes" (float32 and int8), and "batches": utterances, rows, calls, and p50
    and p95 of their times in milliseconds; none for a model that one device is too small for.
    """
    device = jax.local_devices()[0]
    maps = LabelMaps.from_train(prepared.utterances)
    utterances = sample(prepared.utterances, max(BATCHES))
    found: dict[str, Measured] = {}
    for name, encoder in encoders.items():
        seen = prepared if name == "teacher" else seen_by_student(prepared, vocabulary)
        shape = masked_lm.encoder_model(encoder, seen, dtype, name).config
        sizes: dict[str, Any] = finetune.class_counts(settings.task, maps)
        pooling = cast(Any, settings.pooling)
        model = Functional(cast(Any, settings.task), shape, compute_dtype=dtype, pooling=pooling, **sizes)
        params = random_params(model, device) if fits(model, device) else None
        found[name] = Measured(model, params, batches_of(utterances, seen, maps, settings.task))
    times: dict[str, dict[int, list[float]]] = {name: {} for name in found}
    runnable = {name: one for name, one in found.items() if one.params is not None}
    for count in interruptible(BATCHES, "the latencies", alone=True):
        for name, seconds in timed(runnable, count, settings.calls, settings.seconds, device).items():
            times[name][count] = seconds
    return {
        "task": settings.task,
        "length": prepared.settings.rows.length,
        "dtype": dtype,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "models": [describe(name, one, times[name]) for name, one in found.items()],
    }


def sample(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """`count` utterances of the test partition, evenly spaced, repeated from the start if there are fewer."""
    test = [one for one in utterances if one.partition == "test"]
    if not test:
        raise UserError("config.prepared: its data have no test partition, whose utterances would be measured")
    spaced = test[:: max(1, len(test) // count)]
    return list(itertools.islice(itertools.cycle(spaced), count))


def batches_of(utterances: Sequence[Utterance], prepared: Prepared, maps: LabelMaps, task: str) -> dict[int, Batch]:
    """For each of BATCHES one batch with that many utterances, in as few packed rows as hold them."""
    length, found = prepared.settings.rows.length, {}
    for count in BATCHES:
        labeled = LabeledSet(utterances[:count], prepared.tokenizer, maps, task, length)
        rows = [batch for batch, _ in packed(labeled, length, batch_rows=1)]
        found[count] = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return found


def random_params(model: Functional, device: Any) -> Params:
    """Parameters on the device: a few thousand small normal numbers, repeated."""
    # Small, so that no activation overflows; repeated, since drawing billions would take longer than the measurement.
    some = 0.02 * np.random.default_rng(0).standard_normal(8191, np.float32)
    return jax.device_put(jax.tree.map(lambda leaf: np.resize(some, leaf.shape), model.abstract()), device)


def fits(model: Functional, device: Any) -> bool:
    """Whether the parameters take at most half of the device's memory, or of this machine's if the device is a CPU."""
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return weight_bytes(model.abstract())["float32"] <= memory / 2


def timed(
    models: Mapping[str, Measured], count: int, calls: int, seconds: float, device: Any
) -> dict[str, list[float]]:
    """Seconds of each call of each model with `count` utterances: `calls` in turns, or as many as fit in `seconds` per
    model, at least _LEAST.
    """
    found: dict[str, list[float]] = {name: [] for name in models}
    ready = {}
    for name, one in models.items():
        heads = {"domains": one.model.domains, "intents": one.model.intents, "tags": one.model.tags}
        sizes = {head: size for head, size in heads.items() if head in serving.CLASSES[one.model.kind]}
        ready[name] = compiled_predict(one.model), jax.device_put(finetune.class_masks(sizes, sizes), device)

    def call(name: str) -> float:
        predict, masks = ready[name]
        started = time.perf_counter()
        batch = jax.device_put(models[name].batches[count], device)
        jax.device_get(predict(models[name].params, masks, batch))
        return time.perf_counter() - started

    for name in models:
        for _ in range(_UNTIMED):
            call(name)
    begun = time.perf_counter()
    for number in range(calls):
        if number >= _LEAST and time.perf_counter() - begun > seconds * len(models):
            break
        for name in models:
            found[name].append(call(name))
    return found


def describe(name: str, one: Measured, times: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """The entry of one model in latency.json."""
    shape, abstract = one.model.config, one.model.abstract()
    counts = parameter_count(abstract)
    return {
        "name": name,
        "layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "vocabulary": shape.vocab_size,
        "parameters": counts["total"],
        "without_embeddings": counts["without_embeddings"],
        "bytes": weight_bytes(abstract),
        "batches": [
            {
                "utterances": count,
                "rows": len(one.batches[count]["tokens"]),
                "calls": len(seconds),
                "p50_ms": 1000 * float(np.percentile(seconds, 50)),
                "p95_ms": 1000 * float(np.percentile(seconds, 95)),
            }
            for count, seconds in times.items()
        ],
    }


def run_and_print(config: ConfigDict, workdir: pathlib.Path) -> None:
    """`run`, then a line for each model."""
    run(config, workdir)
    if jax.process_index() != 0:
        return
    for one in read_json_object(workdir / LATENCY)["models"]:
        times = ", ".join(
            f"{batch['utterances']} at a time {batch['p50_ms']:.2f} ms (p95 {batch['p95_ms']:.2f})"
            for batch in one["batches"]
        )
        sizes = f"{one['bytes']['float32'] / 1e6:.2f} MB, in int8 {one['bytes']['int8'] / 1e6:.2f} MB"
        print(f"{one['name']:<12} {one['parameters']:>12,} parameters, {sizes}, {times}")


if __name__ == "__main__":
    command.main(run_and_print, description="Measures size and latency of teacher and students.")
