"""Masks for masked-language-model rows, as a pure function of integer keys.

The key comes from (masking seed, content of the store, row, masking epoch). So all seeds and students of a study see
the same corrupted rows, and a teacher's predictions on them can be computed once and cached.
"""

import math
from collections.abc import Sequence

import numpy as np

from kd_jax.config.data import Masking
from kd_jax.data.packing import maskable
from kd_jax.data.permutation import counter_keys, name_key, splitmix64

# One hash per position decides whether it is masked. XOR with these constants gives two more independent ones.
_CHOICE = np.uint64(0x5851F42D4C957F2D)
_RANDOM_TOKEN = np.uint64(0x14057B7EF767814F)


def num_slots(length: int, rate: float) -> int:
    """Mask slots K of a row of `length` tokens: the masks of one text that fills the row, rounded up."""
    return max(1, math.ceil(rate * (length - 2)))


def row_keys(masking_seed: int, store_fingerprint: str, rows: np.ndarray, masking_epochs: np.ndarray) -> np.ndarray:
    """uint64 [n] mask keys of store rows int64 [n] in masking epochs int64 [n] (epoch % config.masking.epochs)."""
    return counter_keys(name_key("masks", masking_seed, store_fingerprint), masking_epochs, rows)


def sample_uniforms(
    masking_seed: int, store_fingerprint: str, rows: np.ndarray, masking_epochs: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """float32 [n, K, samples] in [0, 1) for drawing from a teacher's predictions; depends on what the masks do."""
    keys = counter_keys(name_key("samples", masking_seed, store_fingerprint), masking_epochs, rows)
    positions = splitmix64(np.arange(shape[0] * shape[1], dtype=np.uint64))
    # The upper 24 bits: as many as a float32 in [0, 1) holds exactly.
    bits = splitmix64(keys[:, None] + positions[None, :]) >> np.uint64(40)
    return (bits.astype(np.float32) * np.float32(2.0**-24)).reshape(len(rows), *shape)


def mask_rows(
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    *,
    keys: np.ndarray,
    slots: int,
    masking: Masking,
    mask_id: int,
    special_ids: Sequence[int],
    random_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Masks rows: (corrupted int32 [R, L], positions int32 [R, K], targets int32 [R, K], weights float32 [R, K]).

    Tokens and segment ids are int32 [R, L], keys uint64 [R], `slots` is K, and `random_ids` are the tokens that random
    replacements are drawn from. A row has round(rate * maskable) masks, at least 1 where one is possible and at most
    K. Positions ascend; unused slots have position 0, target 0 and weight 0.
    """
    rows, length = tokens.shape
    columns = np.arange(1, length + 1, dtype=np.uint64)
    # 63 bits, so that 2**63 stands for "not a candidate" below.
    hashes = splitmix64(keys[:, None] + splitmix64(columns)[None, :]) >> np.uint64(1)
    allowed = maskable(tokens, segment_ids, special_ids)
    counts = np.floor(masking.rate * allowed.sum(axis=1) + 0.5).astype(np.int64)

    # In each segment the maskable position with the largest hash is exempt: otherwise a text of a few tokens could lose
    # all of them, and the model would learn to predict it from nothing. Segments are runs of equal ids.
    starts = np.ones((rows, length), bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first = np.flatnonzero(starts)
    ranked = np.where(allowed, hashes, np.uint64(0)).reshape(-1)
    run_lengths = np.diff(first, append=rows * length)
    largest = np.repeat(np.maximum.reduceat(ranked, first), run_lengths).reshape(rows, length)
    candidates = allowed & (hashes < largest)
    possible = candidates.sum(axis=1)
    counts = np.minimum(np.clip(counts, 1, slots), possible)

    # The candidates with the smallest hashes are masked: an exact number of them, each equally likely. Comparing with
    # the count-th smallest hash is cheaper than sorting positions.
    ranked = np.where(candidates, hashes, np.uint64(2**63))
    threshold = np.sort(ranked, axis=1)[np.arange(rows), np.maximum(counts, 1) - 1]
    used_rows, used_columns = np.nonzero((ranked <= threshold[:, None]) & (counts > 0)[:, None])
    used_slots = np.arange(len(used_rows)) - (np.cumsum(counts) - counts)[used_rows]
    positions = np.zeros((rows, slots), np.int64)
    positions[used_rows, used_slots] = used_columns
    used = np.arange(slots)[None, :] < counts[:, None]

    # 80 / 10 / 10 of Devlin et al. 2019, by the position's own hash: mask token, random token, or unchanged.
    row = np.arange(rows)[:, None]
    original = tokens[row, positions]
    at_position = hashes[row, positions]
    choice = (splitmix64(at_position ^ _CHOICE) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    drawn = random_ids[splitmix64(at_position ^ _RANDOM_TOKEN) % np.uint64(len(random_ids))]
    replaced = np.where(choice < masking.mask_share + masking.random_share, drawn, original)
    replaced = np.where(choice < masking.mask_share, mask_id, replaced)
    corrupted = tokens.copy()
    corrupted[used_rows, used_columns] = replaced[used_rows, used_slots]
    return corrupted, positions.astype(np.int32), np.where(used, original, 0).astype(np.int32), used.astype(np.float32)
