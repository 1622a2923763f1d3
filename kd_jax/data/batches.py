"""Masked-LM batches: gathered from the stores by step alone, the same whatever the number of processes."""

import json
from collections.abc import Iterator, Sequence

import numpy as np
from ml_collections import ConfigDict

from kd_jax.data.masking import mask_rows, num_slots, row_keys
from kd_jax.data.packing import positions
from kd_jax.data.permutation import name_key
from kd_jax.data.rows import RowStore
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.transfer_set import TransferSet
from kd_jax.types import Batch, UserError


class MaskedBatches:
    """Batch k of a transfer set, as NumPy arrays; a pure function of k. `masking` is config.masking."""

    def __init__(
        self,
        stores: Sequence[RowStore],
        transfer_set: TransferSet,
        masking: ConfigDict,
        tokenizer: Tokenizer,
        batch_size: int,
    ):
        check_masking(masking)
        self.stores = tuple(stores)
        self.transfer_set = transfer_set
        self.masking = masking
        self.batch_size = batch_size
        self._rows = MaskedRows(stores, masking, tokenizer)
        fingerprints = [store.fingerprint for store in stores]
        identity = [fingerprints, transfer_set.fingerprint, masking.to_dict(), tokenizer.fingerprint, batch_size]
        # Equal fingerprints mean equal batches at every step; a resumed run compares them.
        self.fingerprint = f"{name_key(json.dumps(identity, sort_keys=True)):016x}"

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step` (a masked-LM batch, see kd_jax.types)."""
        first, last = process_slice(self.batch_size, process_index, process_count)
        index = np.arange(step * self.batch_size + first, step * self.batch_size + last, dtype=np.int64)
        source, epoch, row = self.transfer_set.locate(index)
        return self._rows(source, row, epoch % self.masking.epochs)


class MaskedRows:
    """Any rows of some stores, masked: a pure function of (store, row, masking epoch). `masking` is config.masking."""

    def __init__(self, stores: Sequence[RowStore], masking: ConfigDict, tokenizer: Tokenizer):
        self.stores, self.masking = tuple(stores), masking
        self.length = stores[0].length
        self._masker = _Masker(masking, tokenizer, self.length)
        self.slots = self._masker.slots

    def __call__(self, source: np.ndarray, row: np.ndarray, masking_epoch: np.ndarray) -> Batch:
        """A masked-LM batch of the rows int [n] of the stores numbered int [n], with the masks of those epochs."""
        tokens = np.empty((len(row), self.length), np.int32)
        segment_ids = np.empty((len(row), self.length), np.int32)
        keys = np.empty(len(row), np.uint64)
        for number in np.unique(source):
            mine = np.flatnonzero(source == number)
            store = self.stores[number]
            tokens[mine], segment_ids[mine] = store.rows(row[mine])
            keys[mine] = row_keys(self.masking.seed, store.fingerprint, row[mine], masking_epoch[mine])
        return self._masker(tokens, segment_ids, keys)


class _Masker:
    """Row arrays and their mask keys to a batch."""

    def __init__(self, masking: ConfigDict, tokenizer: Tokenizer, length: int):
        self.masking, self.slots = masking, num_slots(length, masking.rate)
        self.mask_id, self.special_ids = tokenizer.mask_id, tuple(tokenizer.special_ids)
        self.random_ids = np.setdiff1d(np.arange(tokenizer.vocab_size, dtype=np.int32), self.special_ids)

    def __call__(self, tokens: np.ndarray, segment_ids: np.ndarray, keys: np.ndarray) -> Batch:
        corrupted, masked_positions, targets, weights = mask_rows(
            tokens,
            segment_ids,
            keys=keys,
            slots=self.slots,
            masking=self.masking,
            mask_id=self.mask_id,
            special_ids=self.special_ids,
            random_ids=self.random_ids,
        )
        return {
            "tokens": corrupted,
            "segment_ids": segment_ids,
            "positions": positions(segment_ids),
            "masked_positions": masked_positions,
            "masked_targets": targets,
            "masked_weights": weights,
        }


def check_masking(masking: ConfigDict) -> None:
    """Raises a UserError for values of config.masking that make no sense."""
    if not 0 < masking.rate <= 1:
        raise UserError(f"config.masking.rate: {masking.rate} is outside 0 to 1; 0.15 is usual")
    if masking.mask_share < 0 or masking.random_share < 0 or masking.mask_share + masking.random_share > 1:
        raise UserError(
            f"config.masking: mask_share {masking.mask_share} and random_share {masking.random_share} must be at "
            "least 0 and sum to at most 1"
        )
    if masking.epochs < 1:
        raise UserError(f"config.masking.epochs: {masking.epochs} is below 1; 1 keeps one mask for each row")


def process_slice(rows: int, process_index: int, process_count: int, key: str = "batch_size") -> tuple[int, int]:
    """(first, last) row of this process's contiguous slice of `rows`; UserError where they do not divide evenly."""
    if rows % process_count:
        raise UserError(
            f"config {key}: {rows} rows do not divide over {process_count} processes; use a multiple of {process_count}"
        )
    each = rows // process_count
    return process_index * each, (process_index + 1) * each


def heldout_batches(
    store: RowStore,
    masking: ConfigDict,
    tokenizer: Tokenizer,
    batch_size: int,
    rows: int,
) -> Iterator[Batch]:
    """The first `rows` rows of a store (all, if it has fewer) in order, with the masks of masking epoch 0.

    Every batch has `batch_size` rows; the last is filled up with empty rows, which have no segments and no mask
    weights.
    """
    masker = _Masker(masking, tokenizer, store.length)
    rows = min(rows, store.num_rows)
    for start in range(0, rows, batch_size):
        index = np.arange(start, min(start + batch_size, rows), dtype=np.int64)
        tokens = np.full((batch_size, store.length), tokenizer.pad_id, np.int32)
        segment_ids = np.zeros((batch_size, store.length), np.int32)
        keys = np.zeros(batch_size, np.uint64)
        tokens[: len(index)], segment_ids[: len(index)] = store.rows(index)
        keys[: len(index)] = row_keys(masking.seed, store.fingerprint, index, np.zeros_like(index))
        yield masker(tokens, segment_ids, keys)
