"""A trimmed vocabulary as a tokenizer of its own, for exports: tokenizer.json with the kept pieces alone.

A text whose pieces were all kept gets the ids that the student was trained with. Another text is split into smaller
kept pieces, where the student's own reading has <unk> for each dropped one: the dropped pieces are not in the file, so
nothing can be read as them and then forgotten.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import tokenizers

from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.vocabulary import TrimmedTokenizer
from kd_jax.types import UserError


def standalone(trimmed: TrimmedTokenizer, texts: Sequence[str] = ()) -> tuple[Tokenizer, int]:
    """(tokenizer, helpers): its first ids are those of `trimmed`, and `helpers` more follow.

    BPE builds a piece from smaller ones; those of them that were not kept are the helpers. A model reads and predicts
    them as <unk>. Raises UserError for a tokenizer that cannot be trimmed, or that would read one of `texts` otherwise.
    """
    content = json.loads(trimmed.full.backend.to_str())
    names = {piece: place for place, piece in enumerate(trimmed.tokens())}
    model, kind = content["model"], content["model"]["type"]
    helpers: list[str] = []
    if kind == "BPE":
        helpers = _trim_bpe(model, names)
    elif kind == "Unigram":
        _trim_unigram(model, names)
    elif kind in ("WordPiece", "WordLevel"):
        model["vocab"] = {piece: place for piece, place in names.items() if piece in model["vocab"]}
    else:
        raise UserError(
            f"config.export.checkpoint: its vocabulary is trimmed, and a {kind} tokenizer cannot be; train the student "
            "with config.vocabulary.trim=False to export it"
        )
    added = [token for token in content["added_tokens"] if token["content"] in names]
    content["added_tokens"] = [token | {"id": names[token["content"]]} for token in added]
    if kind != "Unigram":  # whose ids are places, so that what is not in the model comes after it
        model["vocab"] |= {token["content"]: names[token["content"]] for token in added}
    _renumber(content["post_processor"], names)
    backend = tokenizers.Tokenizer.from_str(json.dumps(content))
    found = Tokenizer(backend, "config.vocabulary")
    _check(trimmed, found, len(helpers), texts)
    return found, len(helpers)


def _trim_bpe(model: dict[str, Any], names: dict[str, int]) -> list[str]:
    """Keeps the merges that lead to kept pieces; returns the pieces on their ways that are not kept."""
    merges = [tuple(one.split(" ")) if isinstance(one, str) else tuple(one) for one in model["merges"]]
    prefix = model["continuing_subword_prefix"] or ""

    def result(pair: tuple[str, ...]) -> str:
        first, second = pair
        return first + second.removeprefix(prefix)

    parts: dict[str, list[tuple[str, ...]]] = {}
    for pair in merges:
        parts.setdefault(result(pair), []).append(pair)
    needed, left = set(), [piece for piece in names if piece in model["vocab"]]
    while left:
        piece = left.pop()
        if piece not in needed:
            needed.add(piece)
            left += [part for pair in parts.get(piece, ()) for part in pair]
    model["merges"] = [list(pair) for pair in merges if result(pair) in needed]
    helpers = sorted(needed - names.keys(), key=lambda piece: model["vocab"][piece])
    model["vocab"] = {piece: names[piece] for piece in names if piece in needed}
    model["vocab"] |= {piece: len(names) + place for place, piece in enumerate(helpers)}
    if model["unk_token"] is None and not model["byte_fallback"]:  # a byte that is no piece any more
        model["unk_token"] = next((name for name in ("<unk>", "[UNK]") if name in names), None)
    return helpers


def _trim_unigram(model: dict[str, Any], names: dict[str, int]) -> None:
    lowest, unknown = min(score for _, score in model["vocab"]), model["unk_id"]
    scores = dict(model["vocab"])
    if unknown is not None:
        # An unknown character costs a fixed amount more than the unlikeliest piece, which may be a dropped one.
        scores[model["vocab"][unknown][0]] = lowest
        model["unk_id"] = names[model["vocab"][unknown][0]]
    model["vocab"] = [[piece, scores[piece]] for piece in names if piece in scores]


def _renumber(processor: Any, names: dict[str, int]) -> None:
    """Gives the special tokens of a post-processor their new ids."""
    if processor is None:
        return
    for one in processor["processors"] if processor["type"] == "Sequence" else []:
        _renumber(one, names)
    if processor["type"] in ("BertProcessing", "RobertaProcessing"):
        for role in ("sep", "cls"):
            processor[role] = [processor[role][0], names[processor[role][0]]]
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            missing = [token for token in special["tokens"] if token not in names]
            if missing:
                raise UserError(
                    f"config.export.checkpoint: its vocabulary is trimmed, and its tokenizer puts {missing[0]} around "
                    "texts, which was dropped; train the student with config.vocabulary.trim=False to export it"
                )
            special["ids"] = [names[token] for token in special["tokens"]]


def _check(trimmed: TrimmedTokenizer, found: Tokenizer, helpers: int, texts: Sequence[str]) -> None:
    """Raises UserError unless pieces and ids are the same, and those of every text whose pieces were all kept."""
    same = found.tokens()[: trimmed.vocab_size] == trimmed.tokens() and found.vocab_size == trimmed.vocab_size + helpers
    same = same and found.special_ids == trimmed.special_ids
    problem = "" if same else "its pieces get other ids"
    for text, full, ours in zip(texts, trimmed.full.encode(texts), found.encode(texts), strict=True):
        if np.isin(full, trimmed.kept).all() and not np.array_equal(trimmed.from_full[full], ours):
            problem = problem or f"{text!r} would be read otherwise"
    if problem:
        raise UserError(
            f"config.export.checkpoint: its vocabulary is trimmed, and no tokenizer file says the same ({problem}); "
            "train the student with config.vocabulary.trim=False to export it"
        )
