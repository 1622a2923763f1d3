"""A teacher's states of unmasked text on disk: written once for each row, read by every student and in every epoch.

The files are those of kd_jax.data.parts. <store>.counts.npy says how many tokens and texts each row has; a part holds
vectors, row after row: those of the row's real tokens for each block, then the mean of each of its texts. A block is
the states after a layer, or the queries, keys or values of one.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax.config import require
from kd_jax.config.training import RELATION_PARTS
from kd_jax.data.batches import CleanBatches, rows_of_batch
from kd_jax.data.packing import runs
from kd_jax.data.parts import KEY, Parts, PartsWriter
from kd_jax.data.permutation import name_key
from kd_jax.data.rows import RowStore
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.transfer_set import TransferSet
from kd_jax.types import Batch, UserError

COUNTS = "{}.counts"
# A layer, for the states after it, or (layer, part) for its queries, keys or values, with all heads concatenated.
Block = int | tuple[int, str]
_CHUNK = 2**10  # rows whose segments are read at a time


def counts_of(store: RowStore) -> np.ndarray:
    """uint16 [rows, 2]: real tokens and texts (segments) of each row of a store."""
    found = np.empty((store.num_rows, 2), np.uint16)
    for first in range(0, store.num_rows, _CHUNK):
        inside = np.arange(first, min(first + _CHUNK, store.num_rows))
        segment_ids = store.rows(inside)[1]
        found[inside] = np.stack([np.count_nonzero(segment_ids, axis=1), segment_ids.max(axis=1)], axis=1)
    return found


def blocks_of(layers: Sequence[int], relations: Sequence[int]) -> tuple[Block, ...]:
    """The blocks of a row in order: the states of `layers`, then queries, keys and values of each of `relations`."""
    return (*layers, *((layer, part) for layer in relations for part in RELATION_PARTS))


class StatesWriter(PartsWriter):
    """The parts of a cache of states: consecutive rows of a store each, and writing them.

    layers: the teacher's layers whose states are kept, `width` numbers each in `dtype`, reduced to `components` unless
    that is 0. relations: layers whose queries, keys and values are kept. identity: JSON values that a reader compares;
    a folder begun with another one is refused.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        stores: Sequence[RowStore],
        layers: Sequence[int],
        width: int,
        dtype: str,
        identity: Mapping[str, Any],
        rows_per_part: int,
        components: int = 0,
        relations: Sequence[int] = (),
    ):
        self.stores, self.width, self.dtype = tuple(stores), width, np.dtype(dtype)
        self.layers, self.relations, self.blocks = tuple(layers), tuple(relations), blocks_of(layers, relations)
        self._counts = [counts_of(store) for store in stores]
        self.texts = max(int(counts[:, 1].max()) for counts in self._counts)
        self._places = [
            (number, np.arange(first, min(first + rows_per_part, store.num_rows)))
            for number, store in enumerate(stores)
            for first in range(0, store.num_rows, rows_per_part)
        ]
        names = [(f"{stores[n].name}-{rows[0] // rows_per_part:05d}", stores[n].name) for n, rows in self._places]
        begun = {
            "command": "cache_states",
            "identity": identity,
            "rows": {store.name: store.fingerprint for store in stores},
            "components": components,
            "layers": list(layers),
            **({"relations": list(relations)} if relations else {}),
            "width": width,
            "dtype": dtype,
            "texts": self.texts,
            "rows_per_part": rows_per_part,
        }
        arrays = {COUNTS.format(store.name): counts for store, counts in zip(stores, self._counts)}
        super().__init__(folder, begun, arrays, names)

    def rows_of(self, number: int) -> tuple[int, np.ndarray]:
        """(store number, rows int64 [n]) of a part."""
        return self._places[number]

    def used(self, store: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(real tokens int64 [n], texts int64 [n]) of rows [n] of a store."""
        tokens, texts = self._counts[store][rows].astype(np.int64).T
        return tokens, texts

    def sample(self, most: int) -> list[tuple[int, np.ndarray]]:
        """(store number, rows) of at most that many rows, evenly spread over all of them."""
        ends = np.cumsum([store.num_rows for store in self.stores])
        chosen = np.unique(np.linspace(0, ends[-1] - 1, min(most, ends[-1])).astype(np.int64))
        of_store = np.searchsorted(ends, chosen, side="right")
        firsts = ends - [store.num_rows for store in self.stores]
        return [(int(number), chosen[of_store == number] - firsts[number]) for number in np.unique(of_store)]

    def real(self, store: int, rows: np.ndarray, blocks: Sequence[np.ndarray], texts: np.ndarray) -> list[np.ndarray]:
        """The vectors [v, width] of each block's real tokens, and of the texts, from padded ones [n, L or S, width]."""
        tokens, segments = self.used(store, rows)
        every = [*((tokens, vectors) for vectors in blocks), (segments, texts)]
        return [vectors[np.arange(vectors.shape[1]) < count[:, None]] for count, vectors in every]

    def pack(self, store: int, rows: np.ndarray, blocks: Sequence[np.ndarray], texts: np.ndarray) -> np.ndarray:
        """The vectors of `real` in one array [v, width], row after row."""
        tokens, segments = self.used(store, rows)
        total = tokens * len(blocks) + segments
        place = np.cumsum(total) - total
        found = np.empty((int(total.sum()), self.width), self.dtype)
        counts = [*([tokens] * len(blocks)), segments]
        with np.errstate(over="ignore"):  # a state too large for the dtype becomes infinite, which the caller refuses
            for count, vectors in zip(counts, self.real(store, rows, blocks, texts), strict=True):
                found[runs(place, count)] = vectors
                place = place + count
        return found


class TeacherStates(Parts):
    """A finished cache of states, memory-mapped. texts: maximum number of texts in a row."""

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__(folder, "cache_states")
        self.layers, self.relations = tuple(self.manifest["layers"]), tuple(self.manifest.get("relations", ()))
        self.blocks = blocks_of(self.layers, self.relations)
        self.width, self.texts = int(self.manifest["width"]), int(self.manifest["texts"])
        self._places: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def check_stores(self, stores: Sequence[RowStore]) -> None:
        """Raises UserError for a store that the cache lacks, or whose rows have changed since."""
        for store in stores:
            recorded = self.manifest["rows"].get(store.name)
            remedy = "run cache_states with config.states.kinds that include it, into another directory"
            require(recorded is not None, KEY, f"{self.folder} has no states of {store.name}", remedy)
            problem = f"{self.folder} was made from other rows of {store.name}"
            require(recorded == store.fingerprint, KEY, problem, "run cache_states again into another directory")

    def read(
        self, store: RowStore, rows: np.ndarray, blocks: Sequence[Block], texts: bool
    ) -> tuple[list[np.ndarray], np.ndarray | None]:
        """(vectors [n, L, width] of each of `blocks`, means [n, S, width]) of rows [n] of a store, zeros on padding."""
        counts, before = self._places_of(store)
        tokens, segments = counts[rows].astype(np.int64).T
        counted = [*([tokens] * len(self.blocks)), segments]  # vectors of each block of a row
        starts = [before[rows] + number * tokens for number in range(len(counted))]
        wanted = [*((self.blocks.index(block), store.length) for block in blocks)]
        wanted += [(len(self.blocks), self.texts)] if texts else []
        found = [np.zeros((len(rows), slots, self.width), self.manifest["dtype"]) for _, slots in wanted]
        parts = rows // self.manifest["rows_per_part"]
        for number in np.unique(parts):
            mine = np.flatnonzero(parts == number)
            vectors = self.part(store.name, int(number))
            for (block, _), into in zip(wanted, found, strict=True):
                count = counted[block][mine]
                columns = runs(np.zeros(len(mine), np.int64), count)
                into[np.repeat(mine, count), columns] = vectors[runs(starts[block][mine], count)]
        return found[: len(blocks)], found[-1] if texts else None

    def centers(self, most: int = 16) -> tuple[dict[Block, np.ndarray], np.ndarray]:
        """(mean vector of each block, mean of the texts), float32 [width], over at most that many parts.

        The parts are spread evenly over the cache, so all transfer sets that read it have the same centers.
        """
        names = [note["store"] for note in self.manifest["parts"]]
        numbers = [names[:place].count(name) for place, name in enumerate(names)]
        sums = np.zeros((len(self.blocks) + 1, self.width))
        total, size = np.zeros(len(sums)), self.manifest["rows_per_part"]
        for place in np.unique(np.linspace(0, len(names) - 1, most).astype(np.int64)):
            vectors = self.part(names[place], numbers[place])
            rows = slice(numbers[place] * size, (numbers[place] + 1) * size)
            tokens, texts = self._counts_of(names[place])[rows].T
            of_rows = np.stack([*([tokens] * len(self.blocks)), texts], axis=1)  # vectors of each block of a row
            blocks = np.repeat(np.tile(np.arange(len(sums)), len(of_rows)), of_rows.ravel())
            total += of_rows.sum(axis=0)
            for block in range(len(sums)):
                sums[block] += vectors[blocks == block].sum(axis=0, dtype=np.float64)
        means = (sums / np.maximum(total, 1.0)[:, None]).astype(np.float32)
        return dict(zip(self.blocks, means[:-1], strict=True)), means[-1]

    def _counts_of(self, store: str) -> np.ndarray:
        """uint16 [rows, 2]: tokens and texts of each row of a store."""
        counts = self.array(COUNTS.format(store))
        if counts is None:
            raise UserError(f"config.{KEY}: {self.folder} lacks the counts of {store}; run cache_states again")
        return counts

    def _places_of(self, store: RowStore) -> tuple[np.ndarray, np.ndarray]:
        """(tokens and texts of each row, offset of each row's vectors in its part: int64 [rows])."""
        if store.name not in self._places:
            counts = self._counts_of(store.name)
            vectors = counts[:, 0].astype(np.int64) * len(self.blocks) + counts[:, 1]
            size, before = self.manifest["rows_per_part"], np.cumsum(vectors) - vectors
            of_part = before[::size].repeat(size)[: len(before)]
            self._places[store.name] = counts, before - of_part
        return self._places[store.name]


class StateBatches:
    """Batch k of a transfer set, unmasked (see `CleanBatches`), together with the teacher's cached states.

    blocks: batch field -> the block whose vectors it gets. texts: the field that gets the mean of each text; "" for
    none. Raises UserError when the cache lacks a store that the transfer set draws from.
    """

    def __init__(
        self,
        cache: TeacherStates,
        transfer_set: TransferSet,
        tokenizer: Tokenizer,
        blocks: Mapping[str, Block],
        texts: str,
        batch_size: int,
    ):
        self.cache, self.transfer_set, self.batch_size = cache, transfer_set, batch_size
        self._blocks, self._texts = dict(blocks), texts
        self._clean = CleanBatches(transfer_set, tokenizer, batch_size)
        drawn = [store for store, share in zip(transfer_set.stores, transfer_set.row_shares) if share > 0]
        cache.check_stores(drawn)
        identity = [cache.fingerprint, self._clean.fingerprint, sorted(self._blocks.items()), texts]
        self.fingerprint = f"{name_key(json.dumps(identity)):016x}"

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step`."""
        batch = self._clean.batch(step, process_index, process_count)
        source, _, row = rows_of_batch(self.transfer_set, step, self.batch_size, process_index, process_count)
        slots = dict.fromkeys(self._blocks, batch["tokens"].shape[1])
        slots |= {self._texts: self.cache.texts} if self._texts else {}
        dtype = self.cache.manifest["dtype"]
        values = {name: np.zeros((len(row), count, self.cache.width), dtype) for name, count in slots.items()}
        for number in np.unique(source):
            mine = np.flatnonzero(source == number)
            store = self.transfer_set.stores[number]
            blocks, texts = self.cache.read(store, row[mine], list(self._blocks.values()), bool(self._texts))
            for name, vectors in zip(self._blocks, blocks, strict=True):
                values[name][mine] = vectors
            if texts is not None:
                values[self._texts][mine] = texts
        return {**batch, **values}
