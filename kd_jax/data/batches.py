"""Masked-LM batches: gathered from the stores by step alone, the same whatever the number of processes."""

import bisect
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from kd_jax.config.data import Masking
from kd_jax.data.masking import mask_rows, num_slots, row_keys
from kd_jax.data.packing import positions
from kd_jax.data.permutation import name_key
from kd_jax.data.rows import RowStore
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.transfer_set import TransferSet
from kd_jax.types import Batch, UserError


class MaskedBatches:
    """Batch k of a transfer set, as NumPy arrays; a pure function of k. kept: see `MaskedRows`."""

    def __init__(
        self,
        stores: Sequence[RowStore],
        transfer_set: TransferSet,
        masking: Masking,
        tokenizer: Tokenizer,
        batch_size: int,
        kept: np.ndarray | None = None,
    ):
        self.transfer_set, self.masking, self.batch_size = transfer_set, masking, batch_size
        self._masked = MaskedRows(stores, masking, tokenizer, kept)
        fingerprints = [store.fingerprint for store in stores]
        identity = [fingerprints, transfer_set.fingerprint, asdict(masking), tokenizer.fingerprint, batch_size]
        # Equal fingerprints mean equal batches at every step; a resumed run compares them.
        self.fingerprint = f"{name_key(json.dumps(identity, sort_keys=True)):016x}"

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step` (a masked-LM batch, see kd_jax.types)."""
        source, epoch, row = rows_of_batch(self.transfer_set, step, self.batch_size, process_index, process_count)
        return self._masked(source, row, epoch % self.masking.epochs)


class CleanBatches:
    """Batch k of a transfer set without masks: "tokens", "segment_ids", "positions"; a pure function of k.

    full: batches also have "teacher_tokens", the same rows in the full tokenizer's ids.
    """

    def __init__(self, transfer_set: TransferSet, tokenizer: Tokenizer, batch_size: int, full: bool = False):
        self.transfer_set, self.batch_size, self._full = transfer_set, batch_size, full
        fingerprints = [store.fingerprint for store in transfer_set.stores]
        identity = [fingerprints, transfer_set.fingerprint, "clean", tokenizer.fingerprint, batch_size]
        self.fingerprint = f"{name_key(json.dumps(identity)):016x}"

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step`."""
        source, _, row = rows_of_batch(self.transfer_set, step, self.batch_size, process_index, process_count)
        batch = clean_rows(self.transfer_set.stores, source, row)
        return {**batch, "teacher_tokens": full_tokens(self.transfer_set.stores, source, row)} if self._full else batch


class PhasedBatches:
    """Batches of one kind, then of another: (first step, batches) in order. The row sequence continues across them."""

    def __init__(self, parts: Sequence[tuple[int, Any]]):
        self._starts, self._parts = [start for start, _ in parts], [batches for _, batches in parts]
        self.transfer_set: TransferSet = self._parts[0].transfer_set
        self.fingerprint = "-".join(f"{start}:{batches.fingerprint}" for start, batches in parts)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step`."""
        return self._parts[bisect.bisect_right(self._starts, step) - 1].batch(step, process_index, process_count)


class MaskedRows:
    """Any rows of some stores, masked: a pure function of (store, row, masking epoch).

    kept int32 [student tokens]: the full tokenizer's id of each token of a trimmed vocabulary; if given, batches also
    have "teacher_tokens", the same rows for a teacher that reads the full vocabulary.
    """

    def __init__(
        self, stores: Sequence[RowStore], masking: Masking, tokenizer: Tokenizer, kept: np.ndarray | None = None
    ):
        self.stores, self.masking, self._kept = tuple(stores), masking, kept
        self.length = stores[0].length
        self.slots = num_slots(self.length, masking.rate)
        self._mask_id, self._special_ids = tokenizer.mask_id, tokenizer.special_ids
        self._random_ids = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), tokenizer.special_ids)

    def __call__(self, source: np.ndarray, row: np.ndarray, masking_epoch: np.ndarray) -> Batch:
        """A masked-LM batch of the rows int [n] of the stores numbered int [n], with the masks of those epochs."""
        clean = clean_rows(self.stores, source, row)
        tokens, segment_ids = clean["tokens"], clean["segment_ids"]
        keys = np.empty(len(row), np.uint64)
        for number in np.unique(source):
            mine = np.flatnonzero(source == number)
            fingerprint = self.stores[number].fingerprint
            keys[mine] = row_keys(self.masking.seed, fingerprint, row[mine], masking_epoch[mine])
        corrupted, masked_positions, targets, weights = mask_rows(
            tokens,
            segment_ids,
            keys=keys,
            slots=self.slots,
            masking=self.masking,
            mask_id=self._mask_id,
            special_ids=self._special_ids,
            random_ids=self._random_ids,
        )
        batch = {
            **clean,
            "tokens": corrupted,
            "masked_positions": masked_positions,
            "masked_targets": targets,
            "masked_weights": weights,
        }
        if self._kept is None:
            return batch
        # A dropped token is <unk> only for the student. It is never masked, so the full id can be restored.
        full = full_tokens(self.stores, source, row)
        return {**batch, "teacher_tokens": np.where(corrupted == tokens, full, self._kept[corrupted])}


def clean_rows(stores: Sequence[RowStore], source: np.ndarray, row: np.ndarray) -> dict[str, np.ndarray]:
    """Rows int [n] of the stores numbered int [n], unmasked: "tokens", "segment_ids" and "positions" int32 [n, L]."""
    tokens = np.empty((len(row), stores[0].length), np.int32)
    segment_ids = np.empty_like(tokens)
    for number in np.unique(source):
        mine = np.flatnonzero(source == number)
        tokens[mine], segment_ids[mine] = stores[number].rows(row[mine])
    return {"tokens": tokens, "segment_ids": segment_ids, "positions": positions(segment_ids)}


def full_tokens(stores: Sequence[RowStore], source: np.ndarray, row: np.ndarray) -> np.ndarray:
    """int32 [n, L]: rows of the stores numbered int [n], unmasked, in the full tokenizer's ids."""
    tokens = np.empty((len(row), stores[0].length), np.int32)
    for number in np.unique(source):
        mine = np.flatnonzero(source == number)
        tokens[mine] = stores[number].full_rows(row[mine])[0]
    return tokens


def heldout_batches(
    store: RowStore, masking: Masking, tokenizer: Tokenizer, batch_size: int, rows: int
) -> Iterator[Batch]:
    """The first `rows` rows of a store (all, if it has fewer) in order, with the masks of masking epoch 0."""
    masked = MaskedRows([store], masking, tokenizer)
    rows = min(rows, store.num_rows)
    for start in range(0, rows, batch_size):
        index = np.arange(start, min(start + batch_size, rows), dtype=np.int64)
        first = np.zeros_like(index)
        # The last batch is filled up with rows without segments and mask weights, so that one shape is compiled.
        missing = ((0, batch_size - len(index)), (0, 0))
        yield {
            name: np.pad(values, missing, constant_values=tokenizer.pad_id if name == "tokens" else 0)
            for name, values in masked(first, index, first).items()
        }


def rows_of_batch(
    transfer_set: TransferSet, step: int, batch_size: int, process_index: int, process_count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source, epoch, row) of this process's slice of batch `step`, as `TransferSet.locate` gives them."""
    first, last = process_slice(batch_size, process_index, process_count)
    return transfer_set.locate(np.arange(step * batch_size + first, step * batch_size + last, dtype=np.int64))


def process_slice(rows: int, process_index: int, process_count: int, key: str = "batch_size") -> tuple[int, int]:
    """(first, last) row of this process's contiguous slice of `rows`; UserError where they do not divide evenly."""
    if rows % process_count:
        raise UserError(
            f"config {key}: {rows} rows do not divide over {process_count} processes; use a multiple of {process_count}"
        )
    each = rows // process_count
    return process_index * each, (process_index + 1) * each
