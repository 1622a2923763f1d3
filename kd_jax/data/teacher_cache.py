"""A teacher's predictions on disk: written once for each (store, row, masking epoch), read by every student.

The files are those of kd_jax.data.parts. <store>.visits.npy lists the rows in the cache with their masking epochs; a
part holds records of rows: corrupted ids, mask positions, targets, and the teacher's values.
"""

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_jax.config import require
from kd_jax.config.data import Masking
from kd_jax.data.batches import rows_of_batch
from kd_jax.data.packing import positions
from kd_jax.data.parts import KEY, Parts, PartsWriter
from kd_jax.data.permutation import name_key
from kd_jax.data.rows import RowStore
from kd_jax.data.transfer_set import TransferSet
from kd_jax.types import Batch

VISITS = "{}.visits"  # of a store: which of its rows the cache has
_CHUNK = 2**18  # global row indices located at a time


def visited(transfer_set: TransferSet, rows: int, masking_epochs: int) -> list[np.ndarray]:
    """For each store, bool [masking epochs, its rows]: which the first `rows` rows of a transfer set visit."""
    found = [np.zeros((masking_epochs, store.num_rows), bool) for store in transfer_set.stores]
    for start in range(0, rows, _CHUNK):
        source, epoch, row = transfer_set.locate(np.arange(start, min(start + _CHUNK, rows), dtype=np.int64))
        for number in np.unique(source):
            mine = source == number
            found[number][epoch[mine] % masking_epochs, row[mine]] = True
    return found


@dataclass(frozen=True)
class Layout:
    """The shape of one row's record: L tokens, K mask slots, and the teacher's fields [K, ...]."""

    length: int
    slots: int
    vocab_size: int
    fields: Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (NumPy type, shape of one slot's value)

    @functools.cached_property
    def record(self) -> np.dtype[np.void]:
        # The smallest types that hold the values: a cache has a record for every row that any run visits.
        ids = np.uint16 if self.vocab_size <= 2**16 else np.int32
        columns = np.uint8 if self.length <= 2**8 else np.uint16
        return np.dtype(
            [
                ("tokens", ids, (self.length,)),
                ("positions", columns, (self.slots,)),
                ("targets", ids, (self.slots,)),
                ("used", np.uint16),  # used slots come first, so their number stands for the weights
                *((name, np.dtype(kind), (self.slots, *shape)) for name, (kind, shape) in self.fields.items()),
            ]
        )

    def pack(self, batch: Batch, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Records [R] of a masked-LM batch and the teacher's values [R, K, ...]."""
        records = np.zeros(len(batch["tokens"]), self.record)
        records["tokens"], records["positions"] = batch["tokens"], batch["masked_positions"]
        records["targets"], records["used"] = batch["masked_targets"], batch["masked_weights"].sum(axis=1)
        for name in self.fields:
            records[name] = values[name]
        return records

    def unpack(self, records: np.ndarray, segment_ids: np.ndarray) -> Batch:
        """The masked-LM batch of records [R], with the teacher's values under "teacher_<field>"."""
        used = np.arange(self.slots)[None, :] < records["used"][:, None]
        values = {f"teacher_{name}": records[name] for name in self.fields}
        return {
            "tokens": records["tokens"].astype(np.int32),
            "segment_ids": segment_ids,
            "positions": positions(segment_ids),
            "masked_positions": records["positions"].astype(np.int32),
            "masked_targets": records["targets"].astype(np.int32),
            "masked_weights": used.astype(np.float32),
            # Ids as int32, which indexing on devices takes; floats stay as small as they are.
            **{key: one.astype(np.int32 if one.dtype.kind == "u" else one.dtype) for key, one in values.items()},
        }


class CacheWriter(PartsWriter):
    """The parts of a cache: which rows each one holds, and writing them.

    identity: JSON values that a reader compares; a folder begun with another identity or other visits is refused.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        stores: Sequence[RowStore],
        visits: Sequence[np.ndarray],
        layout: Layout,
        identity: Mapping[str, Any],
        rows_per_part: int,
    ):
        self.stores, self.layout = stores, layout
        self._visits = [np.nonzero(seen) for seen in visits]
        # For each file of records: (store, its visits in the order of masking epoch and row).
        self._places = [
            (number, slice(first, first + rows_per_part))
            for number, (_, rows) in enumerate(self._visits)
            for first in range(0, len(rows), rows_per_part)
        ]
        names = [
            (f"{stores[n].name}-{inside.start // rows_per_part:05d}", stores[n].name) for n, inside in self._places
        ]
        bits = {store.name: np.packbits(seen, axis=1) for store, seen in zip(stores, visits, strict=True)}
        begun = {
            "identity": identity,
            "visits": {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in bits.items()},
            "rows_per_part": rows_per_part,
            "length": layout.length,
            "slots": layout.slots,
            "vocab_size": layout.vocab_size,
            "fields": {name: [kind, list(shape)] for name, (kind, shape) in layout.fields.items()},
        }
        super().__init__(folder, begun, {VISITS.format(name): values for name, values in bits.items()}, names)

    def rows_of(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(store number, rows int64 [n], masking epochs int64 [n]) of a part."""
        store, inside = self._places[number]
        epochs, rows = self._visits[store]
        return store, rows[inside], epochs[inside]


class TeacherCache(Parts):
    """A finished cache, memory-mapped; `layout` says what a record holds."""

    def __init__(self, folder: str | os.PathLike[str]):
        super().__init__(folder, "cache_teacher")
        fields = {name: (kind, tuple(shape)) for name, (kind, shape) in self.manifest["fields"].items()}
        self.layout = Layout(self.manifest["length"], self.manifest["slots"], self.manifest["vocab_size"], fields)
        self._entries: dict[str, np.ndarray] = {}

    def entries(self, store: RowStore, masking_epochs: int) -> np.ndarray:
        """int32 [masking epochs, rows]: the number of a row's record among its store's, -1 where there is none."""
        if store.name not in self._entries:
            seen = np.zeros((masking_epochs, store.num_rows), bool)
            if (packed := self.array(VISITS.format(store.name))) is not None:
                seen = np.unpackbits(packed, axis=1, count=store.num_rows).astype(bool)
            # Records stand in the order of (masking epoch, row), so a running count of the visits numbers them.
            order = np.cumsum(seen.reshape(-1), dtype=np.int64).reshape(seen.shape) - 1
            self._entries[store.name] = np.where(seen, order, -1).astype(np.int32)
        return self._entries[store.name]

    def records(self, store: RowStore, entries: np.ndarray) -> np.ndarray:
        """The records [n] with the numbers int [n] among a store's."""
        size = self.manifest["rows_per_part"]
        found = np.empty(len(entries), self.layout.record)
        for number in np.unique(entries // size):
            mine = entries // size == number
            found[mine] = self.part(store.name, number)[entries[mine] - number * size]
        return found


class CachedBatches:
    """Batch k of a transfer set together with the teacher's cached values; masks are read, not drawn.

    Raises UserError when the cache lacks a row that the first `steps` batches visit.
    """

    def __init__(self, cache: TeacherCache, transfer_set: TransferSet, masking: Masking, batch_size: int, steps: int):
        self.cache, self.transfer_set, self.batch_size = cache, transfer_set, batch_size
        self._epochs = masking.epochs
        self._stores = transfer_set.stores
        self._entries = [cache.entries(store, masking.epochs) for store in self._stores]
        # Now, and not when the row comes up after hours of training.
        seen = visited(transfer_set, steps * batch_size, masking.epochs)
        for store, wanted, entries in zip(self._stores, seen, self._entries, strict=True):
            lacking = int(np.count_nonzero(wanted & (entries < 0)))
            where = f"{int(wanted.sum())} rows of {store.name} that this run visits"
            remedy = "write a cache for this seed, task share and number of steps (config.cache.seeds, "
            remedy += "config.cache.task_shares, config.distill.steps)"
            require(not lacking, KEY, f"{cache.folder} lacks {lacking} of the {where}", remedy)
        identity = [cache.fingerprint, transfer_set.fingerprint, batch_size]
        self.fingerprint = f"{name_key(json.dumps(identity)):016x}"

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step`, with the fields of `Layout.unpack`."""
        source, epoch, row = rows_of_batch(self.transfer_set, step, self.batch_size, process_index, process_count)
        records = np.empty(len(row), self.cache.layout.record)
        segment_ids = np.empty((len(row), self.cache.layout.length), np.int32)
        for number in np.unique(source):
            mine = np.flatnonzero(source == number)
            entries = self._entries[number][epoch[mine] % self._epochs, row[mine]]
            records[mine] = self.cache.records(self._stores[number], entries)
            segment_ids[mine] = self._stores[number].rows(row[mine])[1]
        return self.cache.layout.unpack(records, segment_ids)
