"""Caches of a teacher's predictions: what they hold and for which rows, writing one, and training from one."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from kd_jax.config import require
from kd_jax.config.data import Cache, Masking, Transfer, Vocabulary
from kd_jax.config.execution import Execution
from kd_jax.config.training import Distill
from kd_jax.data.batches import MaskedRows, process_slice
from kd_jax.data.masking import sample_uniforms
from kd_jax.data.parts import PartsWriter
from kd_jax.data.prepared import Prepared
from kd_jax.data.teacher_cache import CachedBatches, CacheWriter, Layout, TeacherCache, visited
from kd_jax.data.transfer_set import TransferSet
from kd_jax.jobs import trained
from kd_jax.jobs.job import sharding_lines
from kd_jax.jobs.masked_lm import transfer_set_of
from kd_jax.jobs.teachers import KEY, Teacher, TeacherSide, placed_shapes, teacher_form
from kd_jax.runtime import distributed
from kd_jax.runtime.files import write_sealed
from kd_jax.runtime.preemption import interruptible
from kd_jax.runtime.progress import Count
from kd_jax.steps.teacher_predictions import make_prediction_step
from kd_jax.trainer.mesh import gathered, global_batch, on_mesh, placed, process_share, row_multiple
from kd_jax.trainer.run_directory import RunDirectory

SUMMARY = "cache.json"
DECODER = ("decoder_table", "decoder_bias")  # arrays next to the parts of a cache of hidden states


def check_temperature(cache: Cache, distill: Distill) -> None:
    """Refuses a temperature that moves where the cache keeps only a part of the distribution."""
    kl = distill.kl
    fixed = cache.format == "hidden" or kl.final_temperature in (0, kl.temperature)
    problem = f"for a temperature that moves, {cache.format} keeps too little of the teacher"
    require(fixed, "cache.format", problem, "use hidden, or set distill.kl.final_temperature to 0")


def check_tokens(cache: Cache, vocab_size: int) -> None:
    """Refuses to keep more tokens per position than there are."""
    fits = cache.format != "top_k" or 1 <= cache.k <= vocab_size
    require(fits, "cache.k", f"{cache.k} of {vocab_size} tokens", f"give 1 to {vocab_size}")


def form_of(cache: Cache) -> dict[str, Any]:
    """The settings that decide the values of a record."""
    form: dict[str, Any] = {"format": cache.format, "dtype": cache.dtype, "tail": ""}
    if cache.format == "hidden":
        return form
    form["temperature"] = cache.temperature
    if cache.format == "top_k":
        return {**form, "k": cache.k, "tail": cache.tail}
    return {**form, "samples": cache.samples, "power": cache.power}


def identity(
    masking: Masking, vocabulary: Vocabulary, prepared: Prepared, teacher: Teacher, form: dict[str, Any]
) -> dict[str, Any]:
    """What a cache and the runs that read it must share."""
    return {
        "teacher": trained.parameters_fingerprint(teacher.workdir, KEY),
        "tokenizer": prepared.tokenizer.fingerprint,
        "vocabulary policy": vocabulary.dropped if vocabulary.trim else "",
        # Older caches lack this key: there the teacher read <unk> for tokens that the student's vocabulary lacks.
        **({"reading of dropped tokens": "as themselves"} if teacher.kept is not None else {}),
        "rows": {store.name: store.fingerprint for store in prepared.stores("train")},
        "masking": dataclasses.asdict(masking),
        "form": form,
    }


def cached_side(
    folder: str,
    teacher: Teacher,
    distill: Distill,
    masking: Masking,
    vocabulary: Vocabulary,
    prepared: Prepared,
    mesh: jax.sharding.Mesh,
) -> TeacherSide:
    """The predictions that cache_teacher wrote, as targets of a student; no teacher is in memory."""
    cache = TeacherCache(folder)
    kept = cache.identity["form"]
    cache.check(identity(masking, vocabulary, prepared, teacher, kept))
    if kept["format"] != "hidden":
        ours, theirs = distill.kl.temperature, kept["temperature"]
        problem = f"{folder} was written at temperature {theirs}, not {ours}"
        require(ours == theirs, "distill.kl.temperature", problem, "go back to it, or write another cache")
    form = teacher_form(vocabulary, prepared, kept["format"], tail=kept["tail"], cached=True)
    decoder = teacher.model.decoder(placed_shapes(teacher, mesh)) if form.kind == "hidden" else ()

    def constants() -> dict[str, Any]:
        parts = [cache.attached(name) for name in DECODER[: len(decoder)]]
        arrays = tuple(
            None if values is None or shape is None else placed(values, shape.sharding)
            for values, shape in zip(parts, decoder)
        )
        return {**teacher.constants(), **({"decoder": arrays} if decoder else {})}

    def batches(transfer_set: TransferSet) -> CachedBatches:
        return CachedBatches(cache, transfer_set, masking, distill.batch_size, distill.steps)

    tables = tuple(sharding_lines(decoder, "teacher's decoder, frozen:")) if decoder else ()
    return TeacherSide(form, ((0, (), constants),), batches, None, tables)


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


def visits_of(
    cache: Cache, transfer: Transfer, seed: int, masking_epochs: int, prepared: Prepared
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """For each train store the rows and masking epochs that the runs visit together; and what each run sees of it."""
    shares = cache.task_shares or (transfer.task_share,)
    kinds = cache.generic or (transfer.generic,) * len(shares)
    limits = cache.task_texts or (transfer.task_texts,) * len(shares)
    rows = cache.steps * cache.batch_size
    stores = prepared.stores("train")
    together = {store.name: np.zeros((masking_epochs, store.num_rows), bool) for store in stores}
    each = []
    for share, kind, limit in zip(shares, kinds, limits, strict=True):
        for run_seed in cache.seeds or (seed,):
            one = dataclasses.replace(transfer, task_share=float(share), generic=kind, task_texts=limit)
            transfer_set = transfer_set_of(one, prepared, run_seed)
            names = [store.name for store in transfer_set.stores]
            counts = transfer_set.drawn(rows).tolist()
            for name, mask, drawn in zip(names, visited(transfer_set, rows, masking_epochs), counts):
                together[name] |= mask
                if drawn:
                    # How often a (row, masks) of this source comes again within the run.
                    repeat = drawn / max(int(mask.sum()), 1)
                    run = {"task_share": float(share), "seed": run_seed, "store": name}
                    each.append({**run, "rows": drawn, "masks_repeat": repeat})
    return [together[store.name] for store in stores], each


def write_cache(
    directory: RunDirectory,
    cache: Cache,
    transfer: Transfer,
    masking: Masking,
    vocabulary: Vocabulary,
    seed: int,
    teacher: Teacher,
    prepared: Prepared,
    mesh: jax.sharding.Mesh,
    execution: Execution,
) -> dict[str, Any] | None:
    """Writes the parts that are missing; returns what DONE is to say, or None while other machines write theirs."""
    rows = MaskedRows(prepared.stores("train"), masking, prepared.tokenizer, teacher.kept)
    form = form_of(cache)
    visits, each = visits_of(cache, transfer, seed, masking.epochs, prepared)
    layout = layout_of(prepared, teacher, form, rows)
    same = identity(masking, vocabulary, prepared, teacher, form)
    with distributed.first_goes_ahead():
        writer = CacheWriter(directory.path, rows.stores, visits, layout, same, cache.rows_per_part)
    directory.start(tokenizer_fingerprint=prepared.tokenizer.fingerprint)
    attached = DECODER[: 2 if teacher.model.config.decoder_bias else 1] if form["format"] == "hidden" else ()
    wanted = distributed.from_first(writer.missing(execution.cache_part, execution.cache_parts))
    first = jax.process_index() == 0
    if distributed.from_first(bool(wanted) or not all(map(writer.attached, attached))):
        predict = _Predictor(cache, teacher_form(vocabulary, prepared), form, teacher, rows, layout, masking.seed, mesh)
        if attached:  # turns hidden states into logits; the students need nothing else of the teacher
            for name, values in zip(attached, gathered(teacher.model.decoder(predict.params))):
                if first:
                    writer.attach(name, values)
        write_parts(directory, writer, wanted, predict.part, execution.progress)
    return finished(directory, writer, attached, lambda manifest: summary(manifest, layout, each))


def write_parts(
    directory: RunDirectory,
    writer: Any,
    wanted: Sequence[int],
    part: Callable[..., tuple[np.ndarray, dict[str, float]] | None],
    shown: bool,
) -> None:
    """Writes the parts with these numbers. part(*rows, count) returns (array, statistics) of a part; None if another
    process writes it."""
    total = sum(len(writer.rows_of(number)[1]) for number in wanted)
    with Count(directory.path.name, "rows", total, shown=shown) as count:
        for number in wanted:  # every finished part is saved, whatever ends the command
            found = part(*writer.rows_of(number), count)
            if found is not None:
                writer.write(number, *found)


def finished(
    directory: RunDirectory,
    writer: PartsWriter,
    attached: Sequence[str],
    summarize: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any] | None:
    """Writes manifest and summary once every part exists, and returns the content of DONE; None while other machines
    still write theirs."""
    first = jax.process_index() == 0
    manifest = writer.finish(attached) if first else None
    left = distributed.from_first(len(writer.missing(0, 1)) if manifest is None else 0)
    if left:
        if first:
            print(f"{directory.path}: {left} parts are left to the other machines")
        return None
    if manifest is not None:
        write_sealed(directory.path / SUMMARY, summarize(manifest))
    return {"fingerprint": manifest["fingerprint"] if manifest is not None else ""}


class _Predictor:
    """The teacher on its mesh, and the records of any rows."""

    def __init__(self, cache: Cache, form, settings: dict, teacher: Teacher, rows, layout: Layout, seed: int, mesh):
        self.params = teacher.params(mesh)
        self._mesh, self._rows, self._layout, self._settings, self._seed = mesh, rows, layout, settings, seed
        self._constants = teacher.constants()
        multiple = row_multiple(mesh)
        self._batch_rows = -(-cache.batch_rows // multiple) * multiple
        self._step = compiled_prediction_step(teacher.model, form, tuple(sorted(settings.items())), mesh)

    def part(
        self, store: int, rows: np.ndarray, epochs: np.ndarray, done: Count
    ) -> tuple[np.ndarray, dict[str, float]] | None:
        """(records [n], sums for the report) of rows of one store. Raises Preempted when asked to stop.

        Each of several processes takes its part of a batch to the devices; process 0 reads all rows and gets the
        records, the others read theirs and get None.
        """
        first = jax.process_index() == 0
        mine = slice(*process_slice(self._batch_rows, *process_share(self._mesh)))
        blocks, positions, mass = [], 0.0, 0.0
        for start in interruptible(range(0, len(rows), self._batch_rows), "the teacher's predictions"):
            count = len(rows[start : start + self._batch_rows])
            fill = np.resize(np.arange(start, start + count), self._batch_rows)  # the last batch repeats its rows
            if not first:
                fill = fill[mine]
            batch = dict(self._rows(np.full(len(fill), store), rows[fill], epochs[fill]))
            if self._settings["format"] == "sampled":
                shape = (self._layout.slots, self._settings["samples"])
                of_store = self._rows.stores[store].fingerprint
                batch["uniforms"] = sample_uniforms(self._seed, of_store, rows[fill], epochs[fill], shape)
            local = {name: values[mine] for name, values in batch.items()} if first else batch
            fields, held = gathered(self._step(self.params, self._constants, global_batch(self._mesh, local)))
            done.update(count)
            if not first:
                continue
            records = self._layout.pack(batch, fields)
            weights = batch["masked_weights"][:count]
            positions, mass = positions + float(weights.sum()), mass + float((held[:count] * weights).sum())
            blocks.append(records[:count])
        return (np.concatenate(blocks), {"positions": positions, "mass": mass}) if first else None


@functools.cache
def compiled_prediction_step(model, form, settings: tuple, mesh: jax.sharding.Mesh):
    """The same jitted function for all parts and runs with equal settings."""
    return jax.jit(on_mesh(make_prediction_step(model, form, dict(settings)), mesh))


def summary(manifest: dict[str, Any], layout: Layout, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
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
    size = sum(one["bytes"] for one in stores.values())
    return {
        "rows": sum(one["rows"] for one in stores.values()),
        "positions": positions,
        "bytes": size,
        "bytes_per_position": size / max(positions, 1),
        "mass_kept": sum(one["mass_kept"] * one["positions"] for one in stores.values()) / max(positions, 1),
        "stores": stores,
        "runs": list(runs),
    }
