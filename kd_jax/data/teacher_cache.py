"""A teacher's predictions on disk: written once for each (store, row, masking epoch), read by every student.

begun.json, <store>.visits.npy what it is made from, and which rows in which masking epochs
<name>.npy                     arrays that all parts need beside them
manifest.json                  written last: the same, and the checksum and statistics of each part
parts/<store>-<number>.npy     records of the rows: corrupted ids, mask places, targets, and the teacher's values
parts/<store>-<number>.json    a part's checksum and statistics, written after it
"""

import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kd_jax.data.batches import process_slice
from kd_jax.data.packing import positions
from kd_jax.data.permutation import name_key
from kd_jax.data.rows import MANIFEST, RowStore, disk_of
from kd_jax.data.transfer_set import TransferSet
from kd_jax.types import Batch, UserError

PARTS = "parts"
BEGUN = "begun.json"
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
    def record(self) -> np.dtype:
        ids = np.uint16 if self.vocab_size <= 2**16 else np.int32
        places = np.uint8 if self.length <= 2**8 else np.uint16
        return np.dtype(
            [
                ("tokens", ids, (self.length,)),
                ("positions", places, (self.slots,)),
                ("targets", ids, (self.slots,)),
                ("used", np.uint16),
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
        return {
            "tokens": records["tokens"].astype(np.int32),
            "segment_ids": segment_ids,
            "positions": positions(segment_ids),
            "masked_positions": records["positions"].astype(np.int32),
            "masked_targets": records["targets"].astype(np.int32),
            "masked_weights": used.astype(np.float32),
            **{f"teacher_{name}": _readable(records[name]) for name in self.fields},
        }


def _readable(values: np.ndarray) -> np.ndarray:
    """Small unsigned ids as int32; floats as they are."""
    return values.astype(np.int32) if values.dtype.kind == "u" else np.ascontiguousarray(values)


@dataclass(frozen=True)
class _Part:
    """A file of records: those of a store's visits in [first, last), in the order of (masking epoch, row)."""

    name: str
    store: int
    first: int
    last: int


class CacheWriter:
    """What is to be written, part by part, and which parts are there already.

    identity: what a reader compares, as JSON values; a folder begun with another identity or other visits is refused. A
    part is written under a temporary name and renamed, its JSON after it, so a killed command loses at most one part.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        stores: Sequence[RowStore],
        visits: Sequence[np.ndarray],
        layout: Layout,
        identity: Mapping[str, Any],
        rows_per_part: int,
    ):
        self.folder, self.stores, self.layout = pathlib.Path(folder), stores, layout
        self._visits = [np.nonzero(seen) for seen in visits]
        self._parts = [
            _Part(f"{store.name}-{index:05d}", number, first, min(first + rows_per_part, len(rows)))
            for number, (store, (_, rows)) in enumerate(zip(stores, self._visits, strict=True))
            for index, first in enumerate(range(0, len(rows), rows_per_part))
        ]
        with disk_of(self.folder):
            (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
            self._claim(visits, json.loads(json.dumps(identity)), rows_per_part)

    def _claim(self, visits: Sequence[np.ndarray], identity: dict[str, Any], rows_per_part: int) -> None:
        """Writes what the parts belong to, or compares it with what an earlier start wrote."""
        packed = {store.name: np.packbits(seen, axis=1) for store, seen in zip(self.stores, visits, strict=True)}
        self._begun = {
            "identity": identity,
            "visits": {name: hashlib.sha256(bits.tobytes()).hexdigest() for name, bits in packed.items()},
            "rows_per_part": rows_per_part,
            "length": self.layout.length,
            "slots": self.layout.slots,
            "vocab_size": self.layout.vocab_size,
            "fields": {name: [kind, list(shape)] for name, (kind, shape) in self.layout.fields.items()},
        }
        place = self.folder / BEGUN
        if not place.is_file():
            for name, bits in packed.items():
                _write_array(self.folder / f"{name}.visits.npy", bits)
            _write_json(place, self._begun)
        elif json.loads(place.read_text(encoding="utf-8")) != self._begun:
            raise UserError(
                f"{self.folder}: holds a cache begun with another teacher, data or config; remove it or choose another "
                "--workdir"
            )

    def __len__(self) -> int:
        return len(self._parts)

    def missing(self, part: int, parts: int) -> list[int]:
        """The unfinished ones among every `parts`-th, beginning with `part`."""
        return [number for number in range(part, len(self), parts) if not self._note(number).is_file()]

    def rows_of(self, number: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(store number, rows int64 [n], masking epochs int64 [n]) of a part."""
        part = self._parts[number]
        epochs, rows = self._visits[part.store]
        return part.store, rows[part.first : part.last], epochs[part.first : part.last]

    def _note(self, number: int) -> pathlib.Path:
        return self.folder / PARTS / f"{self._parts[number].name}.json"

    def write(self, number: int, records: np.ndarray, statistics: Mapping[str, float]) -> None:
        """Writes the records of a part, and with its checksum the sums that the report is made from."""
        part = self._parts[number]
        place = self.folder / PARTS / f"{part.name}.npy"
        with disk_of(self.folder):
            _write_array(place, records)
            note = {"name": part.name, "store": self.stores[part.store].name, "records": len(records)}
            _write_json(self._note(number), {**note, "sha256": _sha256(place), **statistics})

    def attach(self, name: str, values: np.ndarray) -> None:
        """Writes an array that all parts need beside them; one that is there already is left as it is."""
        place = self.folder / f"{name}.npy"
        if not place.is_file():
            with disk_of(self.folder):
                _write_array(place, values)

    def attached(self, name: str) -> bool:
        """Whether that array is there."""
        return (self.folder / f"{name}.npy").is_file()

    def finish(self, attached: Sequence[str] = ()) -> dict[str, Any] | None:
        """Writes the manifest, also of the arrays `attached`, and returns it when every part is there; else None."""
        if self.missing(0, 1):
            return None
        notes = [json.loads(self._note(number).read_text(encoding="utf-8")) for number in range(len(self))]
        content = hashlib.sha256("".join(note["sha256"] for note in notes).encode()).hexdigest()
        beside = {name: _sha256(self.folder / f"{name}.npy") for name in attached}
        manifest = {**self._begun, "parts": notes, "attached": beside, "fingerprint": content}
        _write_json(self.folder / MANIFEST, manifest)
        return manifest


class TeacherCache:
    """A finished cache, memory-mapped. A part's checksum is verified when it is first read.

    Attributes: manifest, identity, layout, fingerprint (of the content). Raises UserError when the folder is none.
    """

    def __init__(self, folder: str | os.PathLike, key: str = "teacher_cache"):
        self.folder, self._key = pathlib.Path(folder), key
        place = self.folder / MANIFEST
        if not place.is_file():
            raise UserError(
                f"config.{key}: {self.folder} holds no finished cache; run cache_teacher into it, every part of it"
            )
        self.manifest = json.loads(place.read_text(encoding="utf-8"))
        self.identity, self.fingerprint = self.manifest["identity"], self.manifest["fingerprint"]
        fields = {name: (kind, tuple(shape)) for name, (kind, shape) in self.manifest["fields"].items()}
        self.layout = Layout(self.manifest["length"], self.manifest["slots"], self.manifest["vocab_size"], fields)
        self._parts: dict[str, list[dict]] = {}
        for note in self.manifest["parts"]:
            self._parts.setdefault(note["store"], []).append(note)
        self._open: dict[str, np.ndarray] = {}
        self._entries: dict[str, np.ndarray] = {}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises UserError, with what differs, when the cache was made from something else."""
        wanted = json.loads(json.dumps(identity))
        for name in sorted(self.identity.keys() | wanted.keys()):
            old, new = self.identity.get(name), wanted.get(name)
            if old != new:
                raise UserError(
                    f"config.{self._key}: {self.folder} was made from another {name} ({_short(old)}, here "
                    f"{_short(new)}); run cache_teacher with this config into another directory"
                )

    def entries(self, store: RowStore, masking_epochs: int) -> np.ndarray:
        """int32 [masking epochs, rows]: the place of a row's record among its store's, -1 where there is none."""
        if store.name not in self._entries:
            place = self.folder / f"{store.name}.visits.npy"
            if not place.is_file():
                self._entries[store.name] = np.full((masking_epochs, store.num_rows), -1, np.int32)
            else:
                bits = np.load(place, allow_pickle=False)
                seen = np.unpackbits(bits, axis=1, count=store.num_rows).astype(bool)
                order = np.cumsum(seen.reshape(-1), dtype=np.int64).reshape(seen.shape) - 1
                self._entries[store.name] = np.where(seen, order, -1).astype(np.int32)
        return self._entries[store.name]

    def records(self, store: RowStore, entries: np.ndarray) -> np.ndarray:
        """The records [n] at places int [n] of a store's."""
        parts = self._parts[store.name]
        size = self.manifest["rows_per_part"]
        found = np.empty(len(entries), self.layout.record)
        for number in np.unique(entries // size):
            mine = entries // size == number
            found[mine] = self._part(parts[number])[entries[mine] - number * size]
        return found

    def attached(self, name: str) -> np.ndarray | None:
        """An array that lies beside the parts, or None where there is none of that name."""
        if name not in self.manifest["attached"]:
            return None
        place = self.folder / f"{name}.npy"
        if not place.is_file() or _sha256(place) != self.manifest["attached"][name]:
            raise UserError(f"{place}: is missing or was changed, its checksum differs; write the cache again")
        return np.load(place, allow_pickle=False)

    def _part(self, note: dict) -> np.ndarray:
        if note["name"] not in self._open:
            place = self.folder / PARTS / f"{note['name']}.npy"
            remedy = f"remove it and {note['name']}.json beside it, and run cache_teacher again"
            if not place.is_file() or _sha256(place) != note["sha256"]:
                raise UserError(f"{place}: is missing or was changed, its checksum differs; {remedy}")
            self._open[note["name"]] = np.asarray(np.load(place, mmap_mode="r", allow_pickle=False))
        return self._open[note["name"]]


class CachedBatches:
    """Batch k of a transfer set with the teacher's cached values beside it; masks are read, not drawn.

    Raises UserError when the cache lacks a row that the first `steps` batches visit.
    """

    def __init__(
        self, cache: TeacherCache, transfer_set: TransferSet, masking: ConfigDict, batch_size: int, steps: int
    ):
        self.cache, self.transfer_set, self.batch_size = cache, transfer_set, batch_size
        self._epochs = masking.epochs
        self._stores = transfer_set.stores
        self._entries = [cache.entries(store, masking.epochs) for store in self._stores]
        seen = visited(transfer_set, steps * batch_size, masking.epochs)
        for store, wanted, entries in zip(self._stores, seen, self._entries, strict=True):
            lacking = int(np.count_nonzero(wanted & (entries < 0)))
            if lacking:
                raise UserError(
                    f"config.teacher_cache: {cache.folder} lacks {lacking} of the {int(wanted.sum())} rows of "
                    f"{store.name} that this run visits; write a cache for this seed, task share and number of steps "
                    "(config.cache.seeds, config.cache.task_shares, config.distill.steps)"
                )
        identity = [cache.fingerprint, transfer_set.fingerprint, batch_size]
        self.fingerprint = f"{name_key(json.dumps(identity)):016x}"

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step`, with the fields of `Layout.unpack`."""
        first, last = process_slice(self.batch_size, process_index, process_count)
        index = np.arange(step * self.batch_size + first, step * self.batch_size + last, dtype=np.int64)
        source, epoch, row = self.transfer_set.locate(index)
        records = np.empty(len(index), self.cache.layout.record)
        segment_ids = np.empty((len(index), self.cache.layout.length), np.int32)
        for number in np.unique(source):
            mine = np.flatnonzero(source == number)
            entries = self._entries[number][epoch[mine] % self._epochs, row[mine]]
            records[mine] = self.cache.records(self._stores[number], entries)
            segment_ids[mine] = self._stores[number].rows(row[mine])[1]
        return self.cache.layout.unpack(records, segment_ids)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _sha256(place: pathlib.Path) -> str:
    with open(place, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_array(place: pathlib.Path, values: np.ndarray) -> None:
    """Whole or not at all."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            np.save(file, values, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(place: pathlib.Path, values: Any) -> None:
    temporary = place.with_name(f".{place.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(json.dumps(values, indent=1), encoding="utf-8")
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)
