"""A student's trimmed vocabulary: the tokens that the train rows use, numbered anew, over the same prepared rows."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from kd_jax.config.data import Vocabulary
from kd_jax.data.prepared import Prepared
from kd_jax.data.rows import RowStore
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.types import UserError


class TrimmedTokenizer(Tokenizer):
    """A tokenizer whose id i stands for id kept[i] of `full`, int32 ascending; other tokens become <unk>."""

    def __init__(self, full: Tokenizer, kept: np.ndarray):
        if full.unk_id is None:
            problem = "the tokenizer has no unknown token to replace dropped ones"
            raise UserError(f"config.vocabulary.trim: {problem}; set it to False")
        self.full, self.kept, self.backend = full, kept, full.backend
        self.vocab_size = len(kept)
        to_ours = np.full(full.vocab_size, -1, np.int32)
        to_ours[kept] = np.arange(len(kept), dtype=np.int32)
        self.from_full = np.where(to_ours < 0, to_ours[full.unk_id], to_ours)  # int32 [full tokens]
        ours = {role: int(to_ours[getattr(full, role)]) for role in ("cls_id", "sep_id", "pad_id", "mask_id", "unk_id")}
        self.cls_id, self.sep_id, self.pad_id, self.mask_id, self.unk_id = ours.values()
        self.special_ids = tuple(sorted(ours.values()))

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the full tokenizer's fingerprint and the kept tokens."""
        return hashlib.sha256(self.full.fingerprint.encode() + self.kept.astype("<i4").tobytes()).hexdigest()

    def tokens(self) -> list[str]:
        """The token of each id."""
        names = self.full.tokens()
        return [names[i] for i in self.kept]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Not possible: the ids are no part of the tokenizer's file. Raises TypeError."""
        raise TypeError("a trimmed tokenizer is derived from its prepared folder; save the full one, or `standalone`")

    def _ids(self, ids: list[int]) -> np.ndarray:
        return self.from_full[self.full._ids(ids)]


class _TrimmedStore(RowStore):
    """A row store with the ids of a trimmed vocabulary. Its fingerprint is the store's, so its masks are, too."""

    def __init__(self, store: RowStore, tokenizer: TrimmedTokenizer):
        self.__dict__.update(store.__dict__)
        self._store, self._tokenizer = store, tokenizer

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, segment_ids = self._store.rows(indices)
        return self._tokenizer.from_full[tokens], segment_ids

    def full_rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._store.rows(indices)

    def token_counts(self, vocabulary: int) -> np.ndarray:
        if vocabulary != self._tokenizer.vocab_size:
            raise ValueError(f"{vocabulary} tokens wanted, the trimmed vocabulary has {self._tokenizer.vocab_size}")
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


def seen_by_student(prepared: Prepared, vocabulary: Vocabulary) -> Prepared:
    """The prepared folder with the vocabulary that config.vocabulary gives its students.

    A trimmed one keeps the special tokens and those that occur `min_count` times in the train rows of all sources
    together: the same for all transfer sets. Held-out text may hold dropped tokens: they read as <unk> and are never
    masked.
    """
    if not vocabulary.trim:
        return prepared
    full = prepared.tokenizer
    keep = train_counts(prepared) >= vocabulary.min_count
    keep[list(full.special_ids)] = True
    return TrimmedPrepared(prepared, np.flatnonzero(keep).astype(np.int32))


def train_counts(prepared: Prepared) -> np.ndarray:
    """int64 [tokens]: how often each token occurs in the train rows of all sources together; 0 for special tokens."""
    # Selected text is part of the generic text, and would be counted twice.
    stores = [store for store in prepared.stores("train") if store.kind != "selected"]
    return np.sum([store.token_counts(prepared.tokenizer.vocab_size) for store in stores], axis=0)


def kept_ids(prepared: Prepared) -> np.ndarray | None:
    """int32 [student tokens]: the full tokenizer's id of each token, or None where nothing is trimmed."""
    return prepared.kept if isinstance(prepared, TrimmedPrepared) else None


def standalone(trimmed: TrimmedTokenizer, texts: Sequence[str] = ()) -> tuple[Tokenizer, int]:
    """(tokenizer, helpers): a tokenizer file of its own, for exports; `helpers` more ids follow those of `trimmed`.

    A text whose tokens were all kept gets the ids that the student was trained with. In another text, dropped tokens
    are split into smaller kept ones, where the student's own reading has <unk>. BPE builds a token from smaller ones;
    those that were not kept are the helpers, which a model reads and predicts as <unk>. Raises UserError for a
    tokenizer that cannot be trimmed, or that would read one of `texts` differently.
    """
    content = json.loads(trimmed.full.backend.to_str())
    ids = {token: i for i, token in enumerate(trimmed.tokens())}
    model, kind = content["model"], content["model"]["type"]
    helpers: list[str] = []
    if kind == "BPE":
        helpers = _trim_bpe(model, ids)
    elif kind == "Unigram":
        _trim_unigram(model, ids)
    elif kind in ("WordPiece", "WordLevel"):
        model["vocab"] = {token: i for token, i in ids.items() if token in model["vocab"]}
    else:
        raise _cannot_trim(f"a {kind} tokenizer cannot be")
    added = [token for token in content["added_tokens"] if token["content"] in ids]
    content["added_tokens"] = [token | {"id": ids[token["content"]]} for token in added]
    if kind != "Unigram":  # whose ids are positions in its list, so that other tokens come after it
        model["vocab"] |= {token["content"]: ids[token["content"]] for token in added}
    _renumber(content["post_processor"], ids)
    found = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(content)), "config.vocabulary")
    _check(trimmed, found, len(helpers), texts)
    return found, len(helpers)


def _cannot_trim(problem: str) -> UserError:
    return UserError(
        f"config.export.checkpoint: its vocabulary is trimmed, and {problem}; train the student with "
        "config.vocabulary.trim=False to export it"
    )


def _trim_bpe(model: dict[str, Any], ids: dict[str, int]) -> list[str]:
    """Keeps the merges that lead to kept tokens; returns the intermediate tokens that are not kept."""
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    prefix = model["continuing_subword_prefix"] or ""

    def result(pair: tuple[str, ...]) -> str:
        first, second = pair
        return first + second.removeprefix(prefix)

    parts: dict[str, list[tuple[str, ...]]] = {}
    for pair in merges:
        parts.setdefault(result(pair), []).append(pair)
    needed, left = set[str](), [token for token in ids if token in model["vocab"]]
    while left:
        token = left.pop()
        if token not in needed:
            needed.add(token)
            left += [part for pair in parts.get(token, ()) for part in pair]
    model["merges"] = [list(pair) for pair in merges if result(pair) in needed]
    helpers = sorted(needed - ids.keys(), key=lambda token: model["vocab"][token])
    model["vocab"] = {token: ids[token] for token in ids if token in needed}
    model["vocab"] |= {token: len(ids) + number for number, token in enumerate(helpers)}
    if model["unk_token"] is None and not model["byte_fallback"]:  # a byte-level one, some of whose bytes were dropped
        model["unk_token"] = next((name for name in ("<unk>", "[UNK]") if name in ids), None)
    return helpers


def _trim_unigram(model: dict[str, Any], ids: dict[str, int]) -> None:
    scores = dict(model["vocab"])
    if model["unk_id"] is not None:
        unknown = model["vocab"][model["unk_id"]][0]
        # An unknown character costs a fixed amount more than the unlikeliest token, which may be a dropped one.
        scores[unknown] = min(scores.values())
        model["unk_id"] = ids[unknown]
    model["vocab"] = [[token, scores[token]] for token in ids if token in scores]


def _renumber(processor: Any, ids: dict[str, int]) -> None:
    """Gives the special tokens of a post-processor their new ids."""
    if processor is None:
        return
    for one in processor["processors"] if processor["type"] == "Sequence" else []:
        _renumber(one, ids)
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for role in ("sep", "cls"):
            processor[role] = [processor[role][0], ids[processor[role][0]]]
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            if missing := [token for token in special["tokens"] if token not in ids]:
                raise _cannot_trim(f"its tokenizer puts {missing[0]} around texts, which was dropped")
            special["ids"] = [ids[token] for token in special["tokens"]]


def _check(trimmed: TrimmedTokenizer, found: Tokenizer, helpers: int, texts: Sequence[str]) -> None:
    """Raises UserError unless tokens and ids are the same, and those of every text whose tokens were all kept."""
    same = found.tokens()[: trimmed.vocab_size] == trimmed.tokens() and found.vocab_size == trimmed.vocab_size + helpers
    problem = "" if same and found.special_ids == trimmed.special_ids else "its tokens get other ids"
    for text, full, ours in zip(texts, trimmed.full.encode(texts), found.encode(texts), strict=True):
        if np.isin(full, trimmed.kept).all() and not np.array_equal(trimmed.from_full[full], ours):
            problem = problem or f"{text!r} would be read differently"
    if problem:
        raise _cannot_trim(f"no tokenizer file says the same ({problem})")
