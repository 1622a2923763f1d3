"""Slots: decoding to valid BIO, spans, slot F1, exact match and the semantic error rate.

Two ways of scoring:

- "strict": IOB2 as `seqeval` counts it with mode="strict": a span is a B-x followed by its I-x, and it is correct only
  when slot, start and end all agree. A predicted span where gold has none is an insertion, so predicting [datetime :
  is the weather today] for "what is the weather today" is wrong, with or without a gold slot on "today".
- "massive": the score of MASSIVE's own code (github.com/alexa/massive, training_utils.py at 3932705). What
  it does: its labels are one slot name a word, "Other" outside, with no B or I; of a word only the first sub-word
  counts; neighboring words of the same slot are taken as one span, so two adjacent spans of one slot merge into one;
  then micro F1 over spans with slot, start and end (seqeval's default mode, the same as strict on the well-formed tags
  that arise); a score without any span is 0. Intent accuracy is plain; exact match asks for the intent and all merged
  spans. "All" pools the utterances of all locales. Published numbers from before June 2022 suffer from known bugs:
  predictions outside gold slots were ignored and a slot of n words was counted n times (its issue 13), a sequence
  starting with an ignored piece was mislabeled (17), the predictions of later sub-words were scored (21). Its models
  choose the best slot for each word on its own; ours are decoded with BIO constraints first, so a model's number can
  differ from what their decoder would give for it.

Semantic error rate, SemER = (substitutions + insertions + deletions + wrong intents) / (gold slots + utterances),
summed over utterances before dividing. Alignment in one utterance: identical (slot, start, end) are correct; of the
rest a gold and a predicted span may pair as one substitution when they share the slot name or overlap in words; as
many pairs are formed as can be (a maximum matching, which makes the total the least possible and the counts unique);
gold spans left over are deletions, predicted ones insertions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Spans = list[tuple[str, int, int]]  # slot, first word, end word (exclusive)

MODES = ("strict", "massive")


class SlotCounts(NamedTuple):
    """Aligned spans of one utterance; gold = correct + substitutions + deletions."""

    correct: int
    substitutions: int
    insertions: int
    deletions: int


def decode_bio(scores: np.ndarray, tags: Sequence[str]) -> list[str]:
    """Best valid IOB2 sequence of one utterance; scores float [W, T], logits or log-probabilities of `tags`."""
    return decode_bio_batch(scores[None], np.array([len(scores)]), tags)[0]


def decode_bio_batch(scores: np.ndarray, lengths: np.ndarray, tags: Sequence[str]) -> list[list[str]]:
    """Best valid IOB2 sequences (Viterbi with hard constraints: I-x only after B-x or I-x).

    scores float [N, W, T], logits or log-probabilities (the same path is best: each word's normalizer is a constant);
    lengths int [N], words in use; tags T names. Costs O(N W T), since only I-x looks at which tag came before. Raises
    ValueError on NaN.
    """
    scores = np.asarray(scores, np.float64)
    if np.isnan(scores).any():
        raise ValueError("tag scores hold NaN; the model's parameters are broken")
    number, words, _ = scores.shape
    index = {tag: i for i, tag in enumerate(tags)}
    inside = np.array([i for i, tag in enumerate(tags) if tag.startswith("I-")], np.int64)
    begin = np.array([index.get("B-" + tags[int(i)][2:], i) for i in inside], np.int64)  # itself where B-x is missing

    previous = np.zeros((number, max(words, 1), len(tags)), np.int32)
    best = np.zeros((number, len(tags)))
    path = np.zeros((number, max(words, 1)), np.int64)
    last = np.zeros(number, np.int64)
    rows = np.arange(number)
    for t in range(words):
        if t == 0:
            best = scores[:, 0].copy()
            best[:, inside] = -np.inf
        else:
            top = best.argmax(axis=1)
            previous[:, t] = top[:, None]
            carried = np.repeat(best[rows, top][:, None], len(tags), axis=1)
            starts = best[:, begin] >= best[:, inside]
            previous[:, t, inside] = np.where(starts, begin, inside)
            carried[:, inside] = np.where(starts, best[:, begin], best[:, inside])
            best = carried + scores[:, t]
        ends = np.asarray(lengths) == t + 1
        last[ends] = best[ends].argmax(axis=1)
    for t in range(words - 1, -1, -1):
        started = t < np.asarray(lengths)
        path[:, t] = np.where(started, last, 0)
        last = np.where(started, previous[rows, t, last], last)
    return [[tags[int(i)] for i in path[n, :length]] for n, length in enumerate(lengths)]


def repair_bio(tags: Sequence[str]) -> list[str]:
    """Valid IOB2: an I-x that follows neither B-x nor I-x becomes B-x."""
    repaired: list[str] = []
    before = "O"
    for tag in tags:
        if tag.startswith("I-") and before not in (tag, "B-" + tag[2:]):
            tag = "B-" + tag[2:]
        repaired.append(tag)
        before = tag
    return repaired


def merge_adjacent(tags: Sequence[str]) -> list[str]:
    """IOB2 tags with neighboring spans of the same slot made one, as MASSIVE's untyped labels see them."""
    slots = [tag[2:] if tag != "O" else "" for tag in tags]
    before = ["", *slots[:-1]]
    return ["O" if not slot else ("I-" if slot == last else "B-") + slot for slot, last in zip(slots, before)]


def spans_from_tags(tags: Sequence[str]) -> Spans:
    """Spans of strict IOB2, in order: (slot, start, end exclusive); an I-x without its B-x belongs to none."""
    spans: Spans = []
    slot, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        if slot and tag != "I-" + slot:
            spans.append((slot, start, i))
            slot = ""
        if tag.startswith("B-"):
            slot, start = tag[2:], i
    return spans


def align(gold: Spans, predicted: Spans) -> SlotCounts:
    """Counts of one utterance by the alignment rule at the top of this file."""
    same = set(gold) & set(predicted)
    left = [span for span in gold if span not in same]
    right = [span for span in predicted if span not in same]
    substitutions = _largest_matching(left, right)
    return SlotCounts(len(same), substitutions, len(right) - substitutions, len(left) - substitutions)


def count_slots(gold_tags: Sequence[str], predicted_tags: Sequence[str], mode: str = "strict") -> SlotCounts:
    """Counts of one utterance from IOB2 tags of equal length, else ValueError; mode "strict" or "massive"."""
    if len(gold_tags) != len(predicted_tags):
        raise ValueError(f"{len(gold_tags)} gold tags but {len(predicted_tags)} predicted tags")
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode == "massive":
        gold_tags, predicted_tags = merge_adjacent(gold_tags), merge_adjacent(predicted_tags)
    return align(spans_from_tags(gold_tags), spans_from_tags(predicted_tags))


def _may_substitute(gold: tuple[str, int, int], predicted: tuple[str, int, int]) -> bool:
    return gold[0] == predicted[0] or (gold[1] < predicted[2] and predicted[1] < gold[2])


def _largest_matching(left: Spans, right: Spans) -> int:
    """Size of a maximum matching by augmenting paths; an utterance has a handful of spans."""
    partner: dict[int, int] = {}

    def place(i: int, tried: set[int]) -> bool:
        for j, span in enumerate(right):
            if j not in tried and _may_substitute(left[i], span):
                tried.add(j)
                if j not in partner or place(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    return sum(place(i, set()) for i in range(len(left)))
