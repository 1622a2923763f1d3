"""Masks for masked-language-model rows, as a pure function of integer keys."""

import math
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from kd_jax.data.packing import maskable
from kd_jax.data.permutation import counter_keys, name_key, splitmix64

_CHOICE = np.uint64(0x5851F42D4C957F2D)
_RANDOM_PIECE = np.uint64(0x14057B7EF767814F)


def num_slots(length: int, rate: float) -> int:
    """Mask slots of a row of `length` tokens: the share of its length - 2 pieces when one text fills it, rounded up."""
    return max(1, math.ceil(rate * (length - 2)))


def row_keys(masking_seed: int, store_fingerprint: str, rows: np.ndarray, masking_epochs: np.ndarray) -> np.ndarray:
    """uint64 [n] mask keys of store rows int64 [n] in masking epochs int64 [n] (epoch % config.masking.epochs)."""
    return counter_keys(name_key("masks", masking_seed, store_fingerprint), masking_epochs, rows)


def sample_uniforms(
    masking_seed: int, store_fingerprint: str, rows: np.ndarray, masking_epochs: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """float32 [n, K, samples] in [0, 1) for drawing from a teacher's predictions, from what the masks depend on."""
    keys = counter_keys(name_key("samples", masking_seed, store_fingerprint), masking_epochs, rows)
    places = splitmix64(np.arange(shape[0] * shape[1], dtype=np.uint64))
    bits = splitmix64(keys[:, None] + places[None, :]) >> np.uint64(40)
    return (bits.astype(np.float32) * np.float32(2.0**-24)).reshape(len(rows), *shape)


def mask_rows(
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    *,
    keys: np.ndarray,
    slots: int,
    masking: ConfigDict,
    mask_id: int,
    special_ids: Sequence[int],
    random_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Masks rows: (corrupted int32 [R, L], positions int32 [R, K], targets int32 [R, K], weights float32 [R, K]).

    Tokens and segment ids are int32 [R, L]. `masking` is config.masking, `keys` uint64 [R], `slots` K, `random_ids`
    the pieces a random replacement is drawn from. A row has round(rate * maskable) masks, at least 1 where one is
    possible and at most K. In each segment one maskable position is exempt, so that a short text keeps something to
    predict from. Positions ascend; unused slots have position 0, target 0, weight 0.
    """
    rows, length = tokens.shape
    columns = np.arange(1, length + 1, dtype=np.uint64)
    hashes = splitmix64(keys[:, None] + splitmix64(columns)[None, :]) >> np.uint64(1)
    allowed = maskable(tokens, segment_ids, special_ids)
    counts = np.floor(masking.rate * allowed.sum(axis=1) + 0.5).astype(np.int64)

    # The allowed position with the largest hash of its segment is exempt; segments are runs of equal ids.
    starts = np.ones((rows, length), bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = np.flatnonzero(starts)
    ranked = np.where(allowed, hashes, np.uint64(0)).reshape(-1)
    run_lengths = np.diff(first, append=rows * length)
    largest = np.repeat(np.maximum.reduceat(ranked, first), run_lengths).reshape(rows, length)
    candidates = allowed & (hashes < largest)
    possible = candidates.sum(axis=1)
    counts = np.minimum(np.clip(counts, 1, slots), possible)

    # The candidates with the smallest hashes are masked; hashes of others are beyond all 63-bit ones.
    ranked = np.where(candidates, hashes, np.uint64(2**63))
    threshold = np.sort(ranked, axis=1)[np.arange(rows), np.maximum(counts, 1) - 1]
    used_rows, used_columns = np.nonzero((ranked <= threshold[:, None]) & (counts > 0)[:, None])
    used_slots = np.arange(len(used_rows)) - (np.cumsum(counts) - counts)[used_rows]
    positions = np.zeros((rows, slots), np.int64)
    positions[used_rows, used_slots] = used_columns
    used = np.arange(slots)[None, :] < counts[:, None]

    row = np.arange(rows)[:, None]
    original = tokens[row, positions]
    at_position = hashes[row, positions]
    choice = (splitmix64(at_position ^ _CHOICE) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    drawn = random_ids[splitmix64(at_position ^ _RANDOM_PIECE) % np.uint64(len(random_ids))]
    replaced = np.where(choice < masking.mask_share + masking.random_share, drawn, original)
    replaced = np.where(choice < masking.mask_share, mask_id, replaced)
    corrupted = tokens.copy()
    corrupted[used_rows, used_columns] = replaced[used_rows, used_slots]
    return corrupted, positions.astype(np.int32), np.where(used, original, 0).astype(np.int32), used.astype(np.float32)
