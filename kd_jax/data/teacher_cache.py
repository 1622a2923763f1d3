"""A teacher's predictions on disk: written once for each (store, row, masking epoch), read by every student.

begun.json, <store>.visits.npy what it is made from, and which rows in which masking epochs
<name>.npy                     arrays that all parts need
manifest.json                  written last: the same, the statistics of each part, and every file's checksum
parts/<store>-<number>.npy     records of the rows: corrupted ids, mask positions, targets, and the teacher's values
parts/<store>-<number>.json    a part's checksum and statistics, written after it

Parts are small files of their own, so that several machines can write one cache, a killed one loses at most one part,
and a reader far away starts before it has all of them.
"""

import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd_jax.config import require
from kd_jax.config.data import Masking
from kd_jax.data.batches import rows_of_batch
from kd_jax.data.packing import positions
from kd_jax.data.permutation import name_key
from kd_jax.data.rows import MANIFEST, RowStore
from kd_jax.data.transfer_set import TransferSet
from kd_jax.runtime.copies import LocalCopy, sha256_of
from kd_jax.runtime.files import full_disk_is_user_error, read_json, write_atomically, write_json
from kd_jax.runtime.paths import as_path, is_remote, make_folder, names_in, reaching
from kd_jax.types import Batch, UserError

PARTS = "parts"
BEGUN = "begun.json"
VISITS = "{}.visits.npy"  # of a store: which of its rows the cache has
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


class CacheWriter:
    """What is to be written, part by part, and which parts are there already.

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
        self.folder, self.stores, self.layout = as_path(folder), stores, layout
        self._sums: dict[str, dict[str, Any]] = {}  # of the arrays that this object wrote
        self._visits = [np.nonzero(seen) for seen in visits]
        # A file of records each: (name, store, its visits in the order of masking epoch and row).
        self._parts = [
            (f"{store.name}-{index:05d}", number, slice(first, first + rows_per_part))
            for number, (store, (_, rows)) in enumerate(zip(stores, self._visits, strict=True))
            for index, first in enumerate(range(0, len(rows), rows_per_part))
        ]
        bits = {store.name: np.packbits(seen, axis=1) for store, seen in zip(stores, visits, strict=True)}
        self._begun = {
            "identity": json.loads(json.dumps(identity)),
            "visits": {name: hashlib.sha256(values.tobytes()).hexdigest() for name, values in bits.items()},
            "rows_per_part": rows_per_part,
            "length": layout.length,
            "slots": layout.slots,
            "vocab_size": layout.vocab_size,
            "fields": {name: [kind, list(shape)] for name, (kind, shape) in layout.fields.items()},
        }
        with full_disk_is_user_error(self.folder):
            make_folder(self.folder / PARTS)
            if BEGUN not in names_in(self.folder):
                for name, values in bits.items():
                    self._write_array(VISITS.format(name), values)
                write_json(self.folder / BEGUN, self._begun)  # last: with it, the visits are there
            elif read_json(self.folder / BEGUN) != self._begun:
                raise UserError(
                    f"{self.folder}: holds a cache begun with another teacher, data or config; remove it or choose "
                    "another --workdir"
                )

    def __len__(self) -> int:
        return len(self._parts)

    def missing(self, part: int, parts: int) -> list[int]:
        """The unfinished ones among every `parts`-th, beginning with `part`."""
        found = set(names_in(self.folder / PARTS))
        return [number for number in range(part, len(self), parts) if f"{self._parts[number][0]}.json" not in found]

    def rows_of(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(store number, rows int64 [n], masking epochs int64 [n]) of a part."""
        _, store, inside = self._parts[number]
        epochs, rows = self._visits[store]
        return store, rows[inside], epochs[inside]

    def write(self, number: int, records: np.ndarray, statistics: Mapping[str, float]) -> None:
        """Writes the records of a part, and then its checksum with the sums that the report is made from."""
        name, store, _ = self._parts[number]
        with full_disk_is_user_error(self.folder):
            written = self._write_array(f"{PARTS}/{name}.npy", records)
            note = {"name": name, "store": self.stores[store].name, "records": len(records)}
            write_json(self.folder / f"{PARTS}/{name}.json", {**note, **written, **statistics})

    def attach(self, name: str, values: np.ndarray) -> None:
        """Writes an array that all parts need; one that is there already is left as it is."""
        if not self.attached(name):
            with full_disk_is_user_error(self.folder):
                self._write_array(f"{name}.npy", values)

    def attached(self, name: str) -> bool:
        """Whether that array is there."""
        return f"{name}.npy" in names_in(self.folder)

    def finish(self, attached: Sequence[str] = ()) -> dict[str, Any] | None:
        """Writes the manifest, also of the arrays `attached`, and returns it when every part is there; else None."""
        if self.missing(0, 1):
            return None
        notes = [read_json(self.folder / PARTS / f"{name}.json") for name, _, _ in self._parts]
        # Of the parts alone, in their order; the same whoever wrote which part.
        content = hashlib.sha256("".join(note["sha256"] for note in notes).encode()).hexdigest()
        visits = [VISITS.format(store.name) for store in self.stores]
        files = {name: self._described(name) for name in (*visits, *(f"{name}.npy" for name in attached))}
        files |= {f"{PARTS}/{note['name']}.npy": {key: note[key] for key in ("bytes", "sha256")} for note in notes}
        sums = {name: files[f"{name}.npy"]["sha256"] for name in attached}
        manifest = {**self._begun, "parts": notes, "attached": sums, "fingerprint": content, "files": files}
        write_json(self.folder / MANIFEST, manifest)
        return manifest

    def _write_array(self, name: str, values: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        np.save(buffer, values, allow_pickle=False)
        write_atomically(self.folder / name, buffer.getvalue())
        return self._described(name, buffer.getvalue())

    def _described(self, name: str, data: bytes | None = None) -> dict[str, Any]:
        """Size and checksum of a file; it is read where another process wrote it."""
        if name not in self._sums:
            if data is None:
                with reaching(self.folder):
                    data = (self.folder / name).read_bytes()
            self._sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return self._sums[name]


class TeacherCache:
    """A finished cache, memory-mapped. A part's checksum is verified when it is first read.

    A remote one is fetched to this host, once: a part when it is first read, the others in the background. Attributes:
    manifest, identity, layout, fingerprint (of the content). Raises UserError when the folder is none.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = as_path(folder)
        try:
            self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST)
        except FileNotFoundError:
            problem = f"{self.folder} holds no finished cache"
            raise UserError(f"config.teacher_cache: {problem}; run cache_teacher into it, every part of it") from None
        self._copy = None
        if is_remote(self.folder):
            if "files" not in self.manifest:
                problem = f"{self.folder} has no checksums, an older version wrote it"
                raise UserError(f"config.teacher_cache: {problem}; run cache_teacher again")
            self._copy = LocalCopy(self.folder, self.manifest)
        self.identity, self.fingerprint = self.manifest["identity"], self.manifest["fingerprint"]
        fields = {name: (kind, tuple(shape)) for name, (kind, shape) in self.manifest["fields"].items()}
        self.layout = Layout(self.manifest["length"], self.manifest["slots"], self.manifest["vocab_size"], fields)
        self._parts: dict[str, list[dict[str, Any]]] = {}
        for note in self.manifest["parts"]:
            self._parts.setdefault(note["store"], []).append(note)
        self._open: dict[str, np.ndarray] = {}
        self._entries: dict[str, np.ndarray] = {}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises UserError, with what differs, when the cache was made from something else."""
        wanted = json.loads(json.dumps(identity))
        for name in sorted(self.identity.keys() | wanted.keys()):
            old, new = self.identity.get(name), wanted.get(name)
            problem = f"{self.folder} was made from another {name} ({_short(old)}, here {_short(new)})"
            require(old == new, "teacher_cache", problem, "run cache_teacher with this config into another directory")

    def _find(self, name: str) -> pathlib.Path | None:
        """The path of a file on this host, or None where the cache has none of that name."""
        if self._copy is None:
            return self.folder / name if (self.folder / name).is_file() else None
        return self._copy.file(name) if name in self._copy else None

    def entries(self, store: RowStore, masking_epochs: int) -> np.ndarray:
        """int32 [masking epochs, rows]: the number of a row's record among its store's, -1 where there is none."""
        if store.name not in self._entries:
            seen = np.zeros((masking_epochs, store.num_rows), bool)
            if (bits := self._find(VISITS.format(store.name))) is not None:
                packed = np.load(bits, allow_pickle=False)
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
            found[mine] = self._part(self._parts[store.name][number])[entries[mine] - number * size]
        return found

    def attached(self, name: str) -> np.ndarray | None:
        """An array that all parts need, or None where there is none of that name."""
        if name not in self.manifest["attached"]:
            return None
        file = self._verified(f"{name}.npy", self.manifest["attached"][name], "write the cache again")
        return np.load(file, allow_pickle=False)

    def _part(self, note: dict[str, Any]) -> np.ndarray:
        name = note["name"]
        if name not in self._open:
            file = self._verified(
                f"{PARTS}/{name}.npy", note["sha256"], f"remove it and {PARTS}/{name}.json, and run cache_teacher again"
            )
            self._open[name] = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        return self._open[name]

    def _verified(self, name: str, checksum: str, remedy: str) -> pathlib.Path:
        """The path of a file on this host, whose checksum is as expected; else a UserError."""
        file = self._find(name)
        if file is not None and sha256_of(file) == checksum:
            return file
        folder = self.folder
        if self._copy is not None:
            folder, remedy = self._copy.folder, "remove this copy, it is then fetched again"
        raise UserError(f"{folder / name}: is missing or was changed, its checksum differs; {remedy}")


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
            require(not lacking, "teacher_cache", f"{cache.folder} lacks {lacking} of the {where}", remedy)
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


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
