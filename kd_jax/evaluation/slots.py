"""Slots: decoding to valid BIO, spans, slot F1, exact match and the semantic error rate.

Two ways of scoring:

- "strict": IOB2 as `seqeval` counts it with mode="strict". A span is a B-x followed by its I-x, and it is correct only
  if slot, start and end all agree. A predicted span without a gold one is an insertion, so predicting [datetime :
  is the weather today] for "what is the weather today" is wrong, with or without a gold slot on "today".
- "massive": the score of MASSIVE's own code (github.com/alexa/massive, training_utils.py at 3932705). Its labels are
  one slot name for each word, "Other" outside, without B and I; only the first sub-word of a word counts. Neighboring
  words of one slot are one span, so two adjacent spans of one slot merge. Then micro F1 over spans with slot, start
  and end (seqeval's default mode, which equals strict on the well-formed tags that arise); a score without any span
  is 0. Intent accuracy is plain; exact match needs the intent and all merged spans. "All" pools the utterances of all
  locales. Numbers published before June 2022 suffer from known bugs: predictions outside gold slots were ignored and
  a slot of n words was counted n times (its issue 13), a sequence that starts with an ignored sub-word was mislabeled
  (17), the predictions of later sub-words were scored (21). Its models choose the best slot for each word
  independently; ours are decoded with BIO constraints first, so the two decoders can score one model differently.

Semantic error rate, SemER = (substitutions + insertions + deletions + wrong intents) / (gold slots + utterances),
summed over utterances before dividing. Alignment within one utterance: identical (slot, start, end) are correct. Of
the rest, a gold and a predicted span can pair as one substitution if they share the slot name or overlap in words. As
many pairs as possible are formed (a maximum matching, which makes the total smallest and the counts unique). Gold
spans left over are deletions, predicted ones insertions.
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


def decode_bio_batch(scores: np.ndarray, lengths: np.ndarray, tags: Sequence[str]) -> list[list[str]]:
    """Best valid IOB2 sequences (Viterbi with hard constraints: I-x only after B-x or I-x).

    scores float [N, W, T], logits or log-probabilities of `tags` (both give the same path, because each word's
    normalizer is a constant); lengths int [N], words in use. Raises ValueError on NaN.
    """
    scores = np.asarray(scores, np.float64)
    if np.isnan(scores).any():
        raise ValueError("tag scores hold NaN; the model's parameters are broken")
    number, words, _ = scores.shape
    index = {tag: i for i, tag in enumerate(tags)}
    inside = np.array([i for i, tag in enumerate(tags) if tag.startswith("I-")], np.int64)
    begin = np.array([index.get("B-" + tags[int(i)][2:], i) for i in inside], np.int64)  # itself if there is no B-x

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
            # O(N W T), not T squared: O and B-x may follow anything, so all of them take the one best tag before.
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
    slots = [tag[2:] for tag in tags]  # "" for O
    return [
        "B-" + slot if tag.startswith("I-") and slot != before else tag
        for tag, slot, before in zip(tags, slots, ["", *slots])
    ]


def merge_adjacent(tags: Sequence[str]) -> list[str]:
    """IOB2 tags with neighboring spans of one slot merged, as in MASSIVE's labels without B and I."""
    slots = [tag[2:] for tag in tags]  # "" for O
    return ["O" if not slot else ("I-" if slot == last else "B-") + slot for slot, last in zip(slots, ["", *slots])]


def spans_from_tags(tags: Sequence[str]) -> Spans:
    """Spans of strict IOB2, in order: (slot, start, end exclusive); an I-x without its B-x belongs to no span."""
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
    partner: dict[int, int] = {}  # index in right -> index in left

    def pairs(i: int, tried: set[int]) -> bool:
        """Finds an augmenting path from left[i], as in Kuhn's algorithm; an utterance has a handful of spans."""
        slot, start, end = left[i]
        for j, (other, first, last) in enumerate(right):
            if j not in tried and (slot == other or (start < last and first < end)):
                tried.add(j)
                if j not in partner or pairs(partner[j], tried):
                    partner[j] = i
                    return True
        return False

    substitutions = sum(pairs(i, set()) for i in range(len(left)))
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
