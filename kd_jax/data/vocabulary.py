"""A student's trimmed vocabulary: the pieces that the train rows use, numbered anew, over the same prepared rows."""

import functools
import hashlib

import numpy as np
from ml_collections import ConfigDict

from kd_jax.data.prepared import Prepared
from kd_jax.data.rows import RowStore
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.types import UserError


class TrimmedTokenizer(Tokenizer):
    """A tokenizer whose ids are places in `kept`, int32 ascending ids of `full`; other pieces become <unk>."""

    def __init__(self, full: Tokenizer, kept: np.ndarray):
        if full.unk_id is None:
            raise UserError(
                "config.vocabulary.trim: the tokenizer has no unknown piece for what is dropped; set it to False"
            )
        self.full, self.kept, self.backend = full, kept, full.backend
        self.vocab_size = len(kept)
        to_ours = np.full(full.vocab_size, -1, np.int32)
        to_ours[kept] = np.arange(len(kept), dtype=np.int32)
        self.from_full = np.where(to_ours < 0, to_ours[full.unk_id], to_ours)  # int32 [full pieces]
        ours = {role: int(to_ours[getattr(full, role)]) for role in ("cls_id", "sep_id", "pad_id", "mask_id", "unk_id")}
        self.cls_id, self.sep_id, self.pad_id, self.mask_id, self.unk_id = ours.values()
        self.special_ids = tuple(sorted(ours.values()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the full tokenizer's fingerprint and the kept pieces."""
        return hashlib.sha256(self.full.fingerprint.encode() + self.kept.astype("<i4").tobytes()).hexdigest()

    def tokens(self) -> list[str]:
        """The piece of each id."""
        pieces = self.full.tokens()
        return [pieces[i] for i in self.kept]

    def save(self, folder) -> None:
        """Not possible: the ids are no part of the tokenizer's file. Raises TypeError."""
        raise TypeError("a trimmed tokenizer is derived from its prepared folder; save the full one, or `standalone`")

    def _ids(self, ids: list[int]) -> np.ndarray:
        return self.from_full[self.full._ids(ids)]


class _TrimmedStore(RowStore):
    """A row store with the ids of a trimmed vocabulary; its fingerprint, and so its masks' places, are the same."""

    def __init__(self, store: RowStore, tokenizer: TrimmedTokenizer):
        self.__dict__.update(store.__dict__)
        self._store, self._tokenizer = store, tokenizer

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, segment_ids = self._store.rows(indices)
        return self._tokenizer.from_full[tokens], segment_ids

    def token_counts(self, vocabulary: int) -> np.ndarray:
        if vocabulary != self._tokenizer.vocab_size:
            raise ValueError(f"{vocabulary} pieces asked for, the trimmed vocabulary has {self._tokenizer.vocab_size}")
        return self._store.token_counts(self._tokenizer.full.vocab_size)[self._tokenizer.kept]


class TrimmedPrepared(Prepared):
    """A prepared folder seen through a trimmed vocabulary; `full` is the folder as it is."""

    def __init__(self, full: Prepared, kept: np.ndarray):
        self.__dict__.update({key: value for key, value in full.__dict__.items() if key != "tokenizer"})
        self.full = full
        self.kept = kept

    @functools.cached_property
    def tokenizer(self) -> TrimmedTokenizer:
        return TrimmedTokenizer(self.full.tokenizer, self.kept)

    def stores(self, split: str) -> list[RowStore]:
        return [_TrimmedStore(store, self.tokenizer) for store in self.full.stores(split)]


def seen_by_student(prepared: Prepared, vocabulary: ConfigDict) -> Prepared:
    """The prepared folder with the vocabulary that config.vocabulary gives its students.

    A trimmed one keeps the special pieces and those that occur `min_count` times in the train rows of all sources
    together: the same for all transfer sets. Held-out text may hold dropped pieces: they read as <unk> and are never
    masked.
    """
    if vocabulary.dropped not in ("renormalize", "unknown"):
        raise UserError(f"config.vocabulary.dropped: {vocabulary.dropped!r} is unknown; use 'renormalize' or 'unknown'")
    if not vocabulary.trim:
        return prepared
    if vocabulary.min_count < 1:
        raise UserError(f"config.vocabulary.min_count: {vocabulary.min_count} is below 1; 1 keeps every piece in use")
    full = prepared.tokenizer
    counts = sum(store.token_counts(full.vocab_size) for store in prepared.stores("train") if store.kind != "selected")
    keep = np.asarray(counts) >= vocabulary.min_count
    keep[list(full.special_ids)] = True
    return TrimmedPrepared(prepared, np.flatnonzero(keep).astype(np.int32))


def kept_ids(prepared: Prepared) -> np.ndarray | None:
    """int32 [student pieces]: the full tokenizer's id of each piece, or None where nothing is trimmed."""
    return prepared.kept if isinstance(prepared, TrimmedPrepared) else None
