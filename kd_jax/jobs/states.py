"""Caches of a teacher's states of unmasked text: writing one, and training from one."""

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kd_jax.config import require
from kd_jax.config.data import States, Vocabulary
from kd_jax.config.execution import Execution, Rules
from kd_jax.config.training import Distill
from kd_jax.data.batches import clean_rows, process_slice
from kd_jax.data.labeled import LabeledSet, packed
from kd_jax.data.prepared import Prepared
from kd_jax.data.rows import RowStore
from kd_jax.data.teacher_states import Block, StateBatches, StatesWriter, TeacherStates
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.text.utterances import LabelMaps, Utterance
from kd_jax.data.transfer_set import TransferSet
from kd_jax.data.vocabulary import TrimmedPrepared
from kd_jax.jobs import trained
from kd_jax.jobs.cache import finished, write_parts
from kd_jax.jobs.masked_lm import encoder_model
from kd_jax.jobs.teachers import KEY, Teacher, TeacherSide, layers_of, teacher_form
from kd_jax.models.attention_kernels import Kernel
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.heads import pooled
from kd_jax.models.layer_map import chosen_layers, read_layers
from kd_jax.runtime import distributed
from kd_jax.runtime.paths import names_in
from kd_jax.runtime.preemption import interruptible
from kd_jax.runtime.progress import Count
from kd_jax.steps.distill import MEANS, RELATIONS, STATES
from kd_jax.steps.teacher_states import make_states_step
from kd_jax.trainer.mesh import gathered, global_batch, on_mesh, process_share, row_multiple
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.types import Batch, Params

MEAN_ROWS = 32  # rows in which utterances are read at a time
SAMPLED_ROWS = 2048  # that principal components are computed from
EXPLAINED = "explained"  # array next to the parts: the share of the variance of each array that its components keep


def find_teacher(
    workdir: str, prepared: Prepared, states: States, compute_dtype: str, rules: Rules, attention: Kernel
) -> tuple[Teacher, Prepared]:
    """The teacher of config.teacher_checkpoint, and the prepared folder in the ids that it reads: the tokenizer's, or
    those of its own trimmed vocabulary, regardless of the student's.

    A teacher with another tokenizer comes with the prepared folder of its own run; only means of texts can be kept
    then.
    """
    require(
        bool(workdir) and "," not in workdir, KEY, f"a cache holds one teacher's states, not {workdir!r}", "name one"
    )
    block, seen = trained.encoder_block(workdir, KEY), prepared
    recorded = trained.tokenizer_fingerprint(workdir)
    if recorded != prepared.tokenizer.fingerprint:
        seen = trained.run_prepared(workdir, prepared, KEY)
        if states.layers == states.relations == "none" and recorded != seen.tokenizer.fingerprint:
            seen = trained.own_prepared(workdir, KEY)
        trained.check_tokenizer(workdir, seen, KEY)
    model = encoder_model(block, seen, compute_dtype, "teacher", attention)
    return Teacher(workdir, model, rules, None), seen


def identity(teacher: Teacher) -> dict[str, Any]:
    """What a cache and the runs that read it must share, apart from the rows."""
    parameters = trained.parameters_fingerprint(teacher.workdir, KEY)
    return {"teacher": parameters, "tokenizer": trained.tokenizer_fingerprint(teacher.workdir)}


def same_texts(prepared: Prepared, read_by_teacher: Prepared) -> bool:
    """Whether a teacher reads the rows of `prepared`, possibly through its own vocabulary."""
    full = read_by_teacher.full if isinstance(read_by_teacher, TrimmedPrepared) else read_by_teacher
    return full.tokenizer.fingerprint == prepared.tokenizer.fingerprint


def kept_layers(states: States, teacher: EncoderConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The layers of config.states.layers and of config.states.relations. Raises UserError."""

    def read(written: str, key: str) -> tuple[int, ...]:
        return chosen_layers(read_layers(written, key), teacher.num_layers, key)

    return read(states.layers, "states.layers"), read(states.relations, "states.relations")


def stores_of(states: States, prepared: Prepared) -> list[RowStore]:
    """The train stores of config.states.kinds. Raises UserError when there are none."""
    found = [store for store in prepared.stores("train") if not states.kinds or store.kind in states.kinds]
    require(bool(found), "states.kinds", f"config.prepared has no train rows of {', '.join(states.kinds)}", "use ()")
    return found


def check_part(states: States, execution: Execution, folder: pathlib.Path) -> None:
    """Raises UserError for starting with another part than the first if components are kept."""
    # Two machines could get different last bits, and each would write parts in its own basis.
    ready = not states.components or execution.cache_part == 0 or f"{EXPLAINED}.npy" in names_in(folder)
    remedy = f"start part 0, and this one when {folder / EXPLAINED}.npy is there"
    require(ready, "cache_part", "part 0 computes the components", remedy)


def write_states(
    directory: RunDirectory,
    states: States,
    teacher: Teacher,
    prepared: Prepared,
    read_by_teacher: Prepared,
    mesh: jax.sharding.Mesh,
    execution: Execution,
) -> dict[str, Any] | None:
    """Writes the missing parts; returns the content of DONE, or None while other machines still write theirs.

    prepared: of the students. read_by_teacher: in the teacher's ids, see `find_teacher`.
    """
    other = None if same_texts(prepared, read_by_teacher) else read_by_teacher
    stores, shape = stores_of(states, prepared if other else read_by_teacher), teacher.model.config
    (layers, relations), width = kept_layers(states, shape), states.components or shape.hidden_size
    same = identity(teacher)
    size, components = states.rows_per_part, states.components
    with distributed.first_goes_ahead():
        writer = StatesWriter(directory.path, stores, layers, width, states.dtype, same, size, components, relations)
    directory.start(tokenizer_fingerprint=read_by_teacher.tokenizer.fingerprint)
    wanted = distributed.from_first(writer.missing(execution.cache_part, execution.cache_parts))
    bases = [*(f"basis_layer_{layer}" for layer in layers), "basis_texts"] if states.components else []
    attached = [*bases, EXPLAINED] if bases else []
    ready = distributed.from_first(all(map(writer.attached, attached)))
    if wanted or not ready:
        reader = _Reader(states, teacher, writer, mesh)
        if other is not None:
            reader = _TextReader(states, teacher, writer, mesh, prepared.tokenizer, other)
        if not ready:
            for name, values in zip(attached, reader.components(states.components), strict=True):
                if jax.process_index() == 0:
                    writer.attach(name, values)
        if bases and jax.process_index() == 0:
            reader.bases = [writer.read_attached(name) for name in bases]
        write_parts(directory, writer, wanted, reader.part, execution.progress)

    def summarize(manifest: dict[str, Any]) -> dict[str, Any]:
        return summary(manifest, writer.read_attached(EXPLAINED).tolist() if bases else [])

    return finished(directory, writer, attached, summarize)


class _Reader:
    """The teacher on its mesh, and the vectors of any rows."""

    def __init__(self, states: States, teacher: Teacher, writer: StatesWriter, mesh: jax.sharding.Mesh):
        self.bases: list[np.ndarray] = []
        self._params, self._writer, self._mesh = teacher.params(mesh), writer, mesh
        multiple = row_multiple(mesh)
        self._batch_rows = -(-states.batch_rows // multiple) * multiple
        # Projected in float32, and only then rounded.
        self._dtype = "float32" if states.components else states.dtype
        self._step = compiled_states_step(
            teacher.model, writer.layers, writer.texts, self._dtype, mesh, writer.relations
        )

    def part(self, store: int, rows: np.ndarray, done: Count) -> tuple[np.ndarray, dict[str, float]] | None:
        """(vectors of rows of one store, sums for the report) on process 0, None on the others. Raises Preempted."""
        blocks = []
        for inside, tokens, texts in self._batches(store, rows, done):
            *tokens, texts = self._reduced([*tokens, texts])
            blocks.append(self._writer.pack(store, rows[inside], tokens, texts))
        if jax.process_index() != 0:
            return None
        vectors = np.concatenate(blocks)
        # NumPy rounds what is too large for float16 to infinity, which would surface as a loss that is not finite.
        problem = f"some states of {self._writer.stores[store].name} do not fit {self._writer.dtype.name}"
        require(bool(np.isfinite(vectors).all()), "states.dtype", problem, "use float32")
        tokens, texts = self._writer.used(store, rows)
        return vectors, {"rows": len(rows), "tokens": int(tokens.sum()), "texts": int(texts.sum())}

    def _batches(self, store: int, rows: np.ndarray, done: Count | None):
        """(slice of `rows`, vectors of each block, means of the texts), batch by batch, on process 0; nothing on the
        others."""
        first, mine = jax.process_index() == 0, slice(*process_slice(self._batch_rows, *process_share(self._mesh)))
        for start in interruptible(range(0, len(rows), self._batch_rows), "the teacher's states"):
            count = len(rows[start : start + self._batch_rows])
            fill = np.resize(np.arange(start, start + count), self._batch_rows)[mine]  # the last repeats its rows
            batch = clean_rows(self._writer.stores, np.full(len(fill), store), rows[fill])
            blocks, texts = gathered(self._step(self._params, global_batch(self._mesh, batch)))
            if done is not None:
                done.update(count)
            if first:
                yield slice(start, start + count), [one[:count] for one in blocks], texts[:count]

    def _reduced(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [one @ basis for one, basis in zip(arrays, self.bases, strict=True)] if self.bases else arrays

    def components(self, count: int) -> list[np.ndarray]:
        """The basis float32 [H, count] of each array that is kept, and the share of its variance that it explains, from
        a sample of rows. On process 0; empty arrays on the others."""
        names = len(self._writer.layers) + 1
        moments: list[Any] = [0.0] * names
        sums: list[Any] = [0.0] * names
        sizes = [0] * names
        for store, rows in self._writer.sample(SAMPLED_ROWS):
            for inside, layers, texts in self._batches(store, rows, None):
                vectors = self._writer.real(store, rows[inside], layers, texts)
                for number, one in enumerate(vectors):
                    one = one.astype(np.float64)
                    moments[number], sums[number] = moments[number] + one.T @ one, sums[number] + one.sum(axis=0)
                    sizes[number] += len(one)
        if jax.process_index() != 0:
            return [np.zeros(0)] * (names + 1)
        found = [principal(*one, count) for one in zip(moments, sums, sizes)]
        return [*(basis for basis, _ in found), np.array([share for _, share in found])]


def principal(moments_HxH: np.ndarray, sums_H: np.ndarray, count: int, components: int) -> tuple[np.ndarray, float]:
    """(basis float32 [H, components], share of the variance that it keeps) of vectors given by their sums.

    The directions of the largest second moments, not of the largest variances: vectors lose what lies outside the basis
    but are not shifted, so distances and cosines approximate those of the whole vectors.
    """
    _, vectors = np.linalg.eigh(moments_HxH)
    basis = vectors[:, ::-1][:, :components]
    basis = basis * np.where(basis[np.abs(basis).argmax(axis=0), np.arange(components)] < 0, -1.0, 1.0)
    covariance = moments_HxH / count - np.outer(sums_H, sums_H) / count**2
    kept = np.trace(basis.T @ covariance @ basis) / max(np.trace(covariance), 1e-300)
    return basis.astype(np.float32), float(kept)


class _TextReader(_Reader):
    """A teacher with another tokenizer, which reads the text of every segment on its own."""

    def __init__(self, states, teacher: Teacher, writer: StatesWriter, mesh, tokenizer: Tokenizer, other: Prepared):
        super().__init__(states, teacher, writer, mesh)
        self._model, self._tokenizer, self._other = teacher.model, tokenizer, other

    def _batches(self, store: int, rows: np.ndarray, done: Count | None):
        for start in interruptible(range(0, len(rows), self._batch_rows), "the teacher's states"):
            inside = slice(start, min(start + self._batch_rows, len(rows)))
            tokens, segment_ids = self._writer.stores[store].rows(rows[inside])
            places = [(row, text) for row, ids in enumerate(segment_ids) for text in range(ids.max())]
            segments = [tokens[row][segment_ids[row] == text + 1] for row, text in places]
            texts = [Utterance("", "", "", "", "", text, (text,), ("O",)) for text in self._tokenizer.decode(segments)]
            found = mean_states(self._model, self._params, self._other, texts, self._mesh)
            means = np.zeros((len(tokens), self._writer.texts, found.shape[1]), np.float32)
            means[tuple(np.array(places).T)] = found
            if done is not None:
                done.update(len(tokens))
            if jax.process_index() == 0:
                yield inside, [], means.astype(self._dtype)


def mean_states(
    model: Functional,
    params: Params,
    prepared: Prepared,
    utterances: Sequence[Utterance],
    mesh: jax.sharding.Mesh,
    done: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """float32 [utterances, H]: the mean of the last layer over the tokens of each utterance, special ones included.

    The same in every process. Utterances longer than a row of `prepared` are cut. Raises Preempted.
    """
    length, rows = prepared.settings.rows.length, math.lcm(MEAN_ROWS, row_multiple(mesh))
    texts = LabeledSet(utterances, prepared.tokenizer, LabelMaps((), (), ()), "dc", length)
    found = np.zeros((len(utterances), model.config.hidden_size), np.float32)
    mean, mine = compiled_means(model), slice(*process_slice(rows, *process_share(mesh)))
    for batch, index_RxS in interruptible(packed(texts, length, rows), "the teacher's states"):
        local = {name: batch[name][mine] for name in ("tokens", "segment_ids", "positions", "first_positions")}
        mean_RxSxH = mean(params, global_batch(mesh, local))
        chosen = index_RxS >= 0
        found[index_RxS[chosen]] = np.asarray(multihost_utils.process_allgather(mean_RxSxH, tiled=True))[chosen]
        done(int(chosen.sum()))
    return found


@functools.cache
def compiled_means(model: Functional) -> Callable[[Params, Batch], jax.Array]:
    """Jitted (params, packed rows) -> float32 [R, S, H]: the mean state of the tokens of each utterance."""

    def means(params: Params, batch: Batch) -> jax.Array:
        hidden_RxLxH = model.hidden(params, batch).astype(jnp.float32)
        segments_RxL, firsts_RxS = jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["first_positions"])
        return pooled(hidden_RxLxH, segments_RxL, firsts_RxS, "mean")

    return jax.jit(means)


@functools.cache
def compiled_states_step(
    model: Functional,
    layers: tuple[int, ...],
    texts: int,
    dtype: str,
    mesh: jax.sharding.Mesh,
    relations: tuple[int, ...] = (),
):
    """The same jitted function for all parts and runs with equal settings."""
    return jax.jit(on_mesh(make_states_step(model, layers, texts, dtype, relations), mesh))


def summary(manifest: dict[str, Any], explained: Sequence[float]) -> dict[str, Any]:
    """Rows, tokens, texts and bytes of a cache, and the variance that its components keep, by array."""
    totals = {name: sum(part[name] for part in manifest["parts"]) for name in ("rows", "tokens", "texts", "bytes")}
    names = [*(f"layer {layer}" for layer in manifest["layers"]), "texts"]
    return {
        **totals,
        "layers": manifest["layers"],
        "width": manifest["width"],
        "dtype": manifest["dtype"],
        "bytes_per_token": totals["bytes"] / max(totals["tokens"], 1),
        "explained": dict(zip(names, explained)),
    }


def cached_states(
    folder: str, teacher: Teacher, distill: Distill, vocabulary: Vocabulary, prepared: Prepared, student: EncoderConfig
) -> TeacherSide:
    """The states that cache_states wrote, as a student's targets, without a teacher in memory."""
    cache = TeacherStates(folder)
    cache.check(identity(teacher))

    def needed(term: str, written: str, held: tuple[int, ...], key: str) -> list[int]:
        pairs = layers_of(term, written, student, teacher.model.config)
        layers = sorted({theirs for _, theirs in pairs})
        lacking = [layer for layer in layers if layer not in held]
        problem = f"it needs the teacher's layers {lacking}, and {folder} has {list(held)}"
        remedy = f"pair those, or write another cache with config.states.{key}"
        require(not lacking, f"distill.{term}.layers", problem, remedy)
        return layers

    states: dict[str, Block] = {}
    if distill.hidden.used:
        found = needed("hidden", distill.hidden.layers, cache.layers, "layers")
        states = {STATES.format(layer): layer for layer in found}
    blocks = dict(states)
    if distill.relations.used:
        for layer in needed("relations", distill.relations.layers, cache.relations, "relations"):
            blocks |= {RELATIONS.format(part, layer): (layer, part) for part in distill.relations.parts}
    texts = MEANS if distill.sentence.used else ""

    def batches(transfer_set: TransferSet) -> StateBatches:
        return StateBatches(cache, transfer_set, prepared.tokenizer, blocks, texts, distill.batch_size)

    def constants() -> dict[str, Any]:
        if not distill.center:
            return {}
        of_blocks, of_texts = cache.centers()
        centers = {name: of_blocks[block] for name, block in states.items()}
        return {"centers": centers | ({texts: of_texts} if texts else {})}

    form = teacher_form(vocabulary, prepared, "states", cached=True)
    return TeacherSide(form, ((0, (), constants),), batches, teacher.model.config, (), cache.width)
