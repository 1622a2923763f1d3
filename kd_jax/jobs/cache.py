"""Writing a teacher's predictions for its students: settings, parts, identity and summary of a cache."""

import functools
import pathlib
from typing import Any, get_args

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from kd_jax.config import EXECUTION_KEYS, require, to_dict
from kd_jax.data.batches import MaskedRows, process_slice
from kd_jax.data.masking import sample_uniforms
from kd_jax.data.prepared import Prepared
from kd_jax.data.teacher_cache import CacheWriter, Layout, visited
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import masked_lm, trained
from kd_jax.jobs.teachers import KEY, Teacher, find_teachers, kept_of, teacher_form
from kd_jax.losses.sparse import Tail
from kd_jax.runtime import distributed
from kd_jax.runtime.files import write_json
from kd_jax.runtime.preemption import interruptible
from kd_jax.runtime.progress import Count
from kd_jax.runtime.watchdog import Watchdog
from kd_jax.steps.teacher_predictions import make_prediction_step
from kd_jax.trainer.mesh import global_batch, make_mesh, process_share, row_multiple
from kd_jax.trainer.run_directory import RunDirectory

SUMMARY = "cache.json"
FORMATS = ("hidden", "top_k", "sampled")
TAILS = get_args(Tail)
DECODER = ("decoder_table", "decoder_bias")  # arrays beside the parts of a cache of hidden states


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return ("prepared", "seed", "transfer", "masking", "vocabulary", KEY, "cache", "compute_dtype")


def check_temperature(config: ConfigDict) -> None:
    """Refuses a temperature that moves where the cache keeps only a part of the distribution."""
    kl, kind = config.distill.kl, config.cache.format
    fixed = kind == "hidden" or kl.final_temperature in (0, kl.temperature)
    problem = f"for a temperature that moves, {kind} keeps too little of the teacher"
    require(fixed, "cache.format", problem, "use hidden, or set distill.kl.final_temperature to 0")


def resolved(config: ConfigDict) -> ConfigDict:
    """The config with what config.cache takes from config.distill filled in."""
    block = config.cache
    if block.steps and block.batch_size and block.temperature:
        return config
    check_temperature(config)
    config = config.copy_and_resolve_references()
    config.cache.update(
        {
            "steps": block.steps or config.distill.steps,
            "batch_size": block.batch_size or config.distill.batch_size,
            "temperature": float(block.temperature or config.distill.kl.temperature),
        }
    )
    return config


def check(config: ConfigDict, vocab_size: int) -> None:
    """Refuses impossible cache settings before the teacher is loaded."""
    block = config.cache
    require(block.format in FORMATS, "cache.format", f"{block.format!r} is unknown", f"use {', '.join(FORMATS)}")
    require(
        block.dtype in ("float16", "float32"), "cache.dtype", f"{block.dtype!r} is unknown", "use float16 or float32"
    )
    require(block.tail in TAILS, "cache.tail", f"{block.tail!r} is unknown", f"use {', '.join(TAILS)}")
    if block.format == "top_k":
        fits = 1 <= block.k <= vocab_size
        require(fits, "cache.k", f"{block.k} of {vocab_size} pieces", f"give 1 to {vocab_size}")
    require(block.samples >= 1, "cache.samples", f"{block.samples} is below 1", "64 is usual")
    require(0 < block.power <= 1, "cache.power", f"{block.power} is outside (0, 1]", "1.0 samples from the teacher")
    for name in ("rows_per_part", "batch_rows"):
        require(block[name] >= 1, f"cache.{name}", f"{block[name]} is below 1", "give at least 1")
    kinds, shares = block.generic, block.task_shares
    paired = not kinds or len(kinds) == len(shares)
    require(paired, "cache.generic", f"{len(kinds)} kinds for {len(shares)} shares", "give one for each task share")
    part, parts = config.cache_part, config.cache_parts
    require(0 <= part < parts, "cache_part", f"{part} is none of {parts} parts", "count from 0 to cache_parts - 1")


def form_of(config: ConfigDict) -> dict[str, Any]:
    """What of config.cache decides the values of a record."""
    block = config.cache
    form: dict[str, Any] = {"format": block.format, "dtype": block.dtype, "tail": ""}
    if block.format == "hidden":
        return form
    form["temperature"] = float(block.temperature)
    if block.format == "top_k":
        return {**form, "k": block.k, "tail": block.tail}
    return {**form, "samples": block.samples, "power": float(block.power)}


def identity(config: ConfigDict, prepared: Prepared, teacher: Teacher, form: dict[str, Any]) -> dict[str, Any]:
    """What a cache and the runs that read it must share."""
    return {
        "teacher": trained.parameters_fingerprint(teacher.workdir, KEY),
        "tokenizer": prepared.tokenizer.fingerprint,
        "vocabulary policy": config.vocabulary.dropped if config.vocabulary.trim else "",
        "rows": {store.name: store.fingerprint for store in prepared.stores("train")},
        "masking": to_dict(config.masking),
        "form": form,
    }


def layout_of(prepared: Prepared, teacher: Teacher, form: dict[str, Any], rows: MaskedRows) -> Layout:
    """The shape of a record."""
    vocab_size = prepared.tokenizer.vocab_size
    ids = "uint16" if vocab_size <= 2**16 else "int32"
    if form["format"] == "hidden":
        fields = {"features": (form["dtype"], (teacher.model.config.hidden_size,))}
    elif form["format"] == "top_k":
        fields = {"ids": (ids, (form["k"],)), "log_p": (form["dtype"], (form["k"],))}
    else:
        count = (form["samples"],)
        fields = {"ids": (ids, count), "weights": (form["dtype"], count), "entropy": ("float32", ())}
    return Layout(rows.length, rows.slots, vocab_size, fields)


def visits_of(config: ConfigDict, prepared: Prepared) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """For each train store the rows and masking epochs that the runs visit together; and what each run sees of it."""
    block = config.cache
    shares = block.task_shares or (config.transfer.task_share,)
    kinds = block.generic or (config.transfer.generic,) * len(shares)
    rows = block.steps * block.batch_size
    together, each = None, []
    for share, kind in zip(shares, kinds, strict=True):
        for seed in block.seeds or (config.seed,):
            one = config.copy_and_resolve_references()
            one.transfer.update({"task_share": float(share), "generic": kind})
            transfer_set = masked_lm.transfer_set_of(one, prepared, seed)
            seen = dict(
                zip((store.name for store in transfer_set.stores), visited(transfer_set, rows, config.masking.epochs))
            )
            drawn = dict(zip(seen, transfer_set.drawn(rows).tolist()))
            each += [
                {
                    "task_share": float(share),
                    "seed": seed,
                    "store": name,
                    "rows": drawn[name],
                    # How often a (row, masks) of this source comes again within the run.
                    "masks_repeat": drawn[name] / max(int(mask.sum()), 1),
                }
                for name, mask in seen.items()
                if drawn[name]
            ]
            together = (
                seen
                if together is None
                else {name: together.get(name, False) | seen.get(name, False) for name in {**together, **seen}}
            )
    stores = prepared.stores("train")
    epochs = config.masking.epochs
    nothing = {store.name: np.zeros((epochs, store.num_rows), bool) for store in stores}
    return [{**nothing, **(together or {})}[store.name] for store in stores], each


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the parts that are missing, and DONE when every part is there."""
    config = resolved(config)
    prepared = seen_by_student(Prepared(config.prepared), config.vocabulary)
    check(config, prepared.tokenizer.vocab_size)
    teachers = find_teachers(config, prepared)
    require(len(teachers) == 1, KEY, f"a cache holds one teacher's predictions, not {len(teachers)}", "name one")
    teacher, values = teachers[0], to_dict(config)
    directory = RunDirectory(workdir, "cache_teacher", {key: values[key] for key in (*keys(config), *EXECUTION_KEYS)})
    if directory.done:
        return
    rows = MaskedRows(prepared.stores("train"), config.masking, prepared.tokenizer)
    form, (visits, each) = form_of(config), visits_of(config, prepared)
    layout = layout_of(prepared, teacher, form, rows)
    same = identity(config, prepared, teacher, form)
    with distributed.first_goes_ahead():
        writer = CacheWriter(workdir, rows.stores, visits, layout, same, config.cache.rows_per_part)
    directory.start(tokenizer_fingerprint=prepared.tokenizer.fingerprint)
    beside = DECODER[: 2 if teacher.model.config.decoder_bias else 1] if form["format"] == "hidden" else ()
    wanted = distributed.from_first(writer.missing(config.cache_part, config.cache_parts))
    first = jax.process_index() == 0
    if distributed.from_first(bool(wanted) or not all(map(writer.attached, beside))):
        predict = _Predictor(config, prepared, teacher, form, rows, layout)
        if beside:  # what turns hidden states into logits; the students need no more of the teacher
            for name, values in zip(beside, predict.gathered(teacher.model.decoder(predict.params))):
                if first:
                    writer.attach(name, values)
        total = sum(len(writer.rows_of(number)[1]) for number in wanted)
        dog = Watchdog(config.watchdog_seconds, workdir, exits=config.watchdog_exit)
        with dog, Count(workdir.name, "rows", total, shown=config.progress) as count:
            for number in wanted:  # every finished part is saved, whatever ends the command
                found = predict.part(*writer.rows_of(number), count)
                if found is not None:
                    writer.write(number, *found)
    manifest = writer.finish(beside) if first else None
    left = distributed.from_first(len(writer.missing(0, 1)) if manifest is None else 0)
    if left:
        if first:
            print(f"{workdir}: {left} parts are left to the other machines")
        return
    if manifest is not None:
        write_json(workdir / SUMMARY, summary(manifest, layout, each))
    directory.finish(fingerprint=manifest["fingerprint"] if manifest is not None else "")


class _Predictor:
    """The teacher on its mesh, and the records of any rows."""

    def __init__(self, config, prepared: Prepared, teacher: Teacher, form: dict, rows: MaskedRows, layout: Layout):
        self.mesh = make_mesh(config.mesh)
        self.params = teacher.params(self.mesh)
        self._rows, self._layout, self._form, self._seed = rows, layout, form, config.masking.seed
        kept = kept_of(prepared, teacher)
        self._frozen = {} if kept is None else {"kept": kept}
        multiple = row_multiple(self.mesh)
        self._batch_rows = -(-config.cache.batch_rows // multiple) * multiple
        settings = tuple(sorted(form.items()))
        self._step = compiled_prediction_step(teacher.model, teacher_form(config, prepared), settings)

    def gathered(self, tree: Any) -> Any:
        """The arrays of a tree in NumPy, whole in every process."""
        if jax.process_count() == 1:
            return jax.device_get(tree)
        return multihost_utils.process_allgather(tree, tiled=True)

    def part(
        self, store: int, rows: np.ndarray, epochs: np.ndarray, done: Count
    ) -> tuple[np.ndarray, dict[str, float]] | None:
        """(records [n], sums for the report) of rows of one store. Raises Preempted when asked to stop.

        Each of several processes takes its part of a batch to the devices; process 0 reads all rows and gets the
        records, the others read theirs and get None.
        """
        first = jax.process_index() == 0
        mine = slice(*process_slice(self._batch_rows, *process_share(self.mesh)))
        blocks, positions, mass = [], 0.0, 0.0
        for start in interruptible(range(0, len(rows), self._batch_rows), "the teacher's predictions"):
            inside = slice(start, start + self._batch_rows)
            count = len(rows[inside])
            fill = np.resize(np.arange(start, start + count), self._batch_rows)  # the last batch repeats its rows
            if not first:
                fill = fill[mine]
            batch = dict(self._rows(np.full(len(fill), store), rows[fill], epochs[fill]))
            if self._form["format"] == "sampled":
                shape = (self._layout.slots, self._form["samples"])
                of_store = self._rows.stores[store].fingerprint
                batch["uniforms"] = sample_uniforms(self._seed, of_store, rows[fill], epochs[fill], shape)
            local = {name: values[mine] for name, values in batch.items()} if first else batch
            fields, held = self.gathered(self._step(self.params, self._frozen, global_batch(self.mesh, local)))
            done.update(count)
            if not first:
                continue
            records = self._layout.pack(batch, fields)
            weights = batch["masked_weights"][:count]
            positions, mass = positions + float(weights.sum()), mass + float((held[:count] * weights).sum())
            blocks.append(records[:count])
        return (np.concatenate(blocks), {"positions": positions, "mass": mass}) if first else None


@functools.cache
def compiled_prediction_step(model, form, settings: tuple):
    """The same jitted function for all parts and runs with equal settings."""
    return jax.jit(make_prediction_step(model, form, dict(settings)))


def summary(manifest: dict[str, Any], layout: Layout, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Records, bytes and mass kept by store, and how often masks repeat in each run."""
    stores: dict[str, dict[str, float]] = {}
    for part in manifest["parts"]:
        one = stores.setdefault(part["store"], {"rows": 0, "positions": 0.0, "mass": 0.0})
        one["rows"] += part["records"]
        one["positions"] += part["positions"]
        one["mass"] += part["mass"]
    for one in stores.values():
        one["bytes"] = one["rows"] * layout.record.itemsize
        one["bytes_per_position"] = one["bytes"] / max(one["positions"], 1)
        one["mass_kept"] = one.pop("mass") / max(one["positions"], 1)
    positions = sum(one["positions"] for one in stores.values())
    return {
        "rows": sum(one["rows"] for one in stores.values()),
        "positions": positions,
        "bytes": sum(one["bytes"] for one in stores.values()),
        "bytes_per_position": sum(one["bytes"] for one in stores.values()) / max(positions, 1),
        "mass_kept": sum(one["mass_kept"] * one["positions"] for one in stores.values()) / max(positions, 1),
        "stores": stores,
        "runs": runs,
    }
