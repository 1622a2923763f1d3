"""Labeled utterances for finetuning and evaluation: tokenized once, packed by step."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence

import numpy as np

from kd_jax.data.batches import process_slice
from kd_jax.data.packing import BestFit, positions, runs
from kd_jax.data.permutation import counter_keys, name_key, permute
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.text.utterances import LabelMaps, Utterance
from kd_jax.types import Batch

# Utterance slots of a row: one for every so many tokens. Spoken utterances take more than this on average.
TOKENS_PER_SLOT = 4


class LabeledSet:
    """Utterances as tokens and label ids. `task` is "dc" (labels are domains) or "icner" (intents, and tags).

    An utterance of more than length - 2 tokens is cut there. Labels and tags unseen in train are -1. Arrays: labels
    int32 [utterances]; flat ones of all tokens, where utterance i has offsets[i]:offsets[i + 1]: tokens, words (the
    word of each), word_starts (bool, on the first token of each word) and tags (0 where no word starts). A word that
    the tokenizer empties, or that was cut off, has no token.
    """

    def __init__(
        self, utterances: Sequence[Utterance], tokenizer: Tokenizer, label_maps: LabelMaps, task: str, length: int
    ):
        self.utterances = tuple(utterances)
        self.tokenizer, self.task, self.length = tokenizer, task, length
        joined = [one.characters for one in utterances]
        encoded = tokenizer.encode_words([one.words for one in utterances], joined)
        encoded = [(ids[: length - 2], words[: length - 2]) for ids, words in encoded]
        none = np.zeros(0, np.int32)  # np.concatenate takes no empty list
        self.offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(ids) for ids, _ in encoded], out=self.offsets[1:])
        self.tokens = np.concatenate([none, *(ids for ids, _ in encoded)])
        self.words = np.concatenate([none, *(words for _, words in encoded)])
        self.word_starts = np.ones(len(self.words), bool)
        self.word_starts[1:] = self.words[1:] != self.words[:-1]
        # Two utterances in a row may end and begin with the same word number.
        self.word_starts[self.offsets[:-1][np.diff(self.offsets) > 0]] = True
        label_id = label_maps.domain_id if task == "dc" else label_maps.intent_id
        names = (one.domain if task == "dc" else one.intent for one in utterances)
        self.labels = np.array([label_id(name) for name in names], np.int32)
        self.tags = np.zeros(len(self.tokens), np.int32)
        if task == "icner":
            tag_ids = [np.array([label_maps.tag_id(tag) for tag in one.tags], np.int32) for one in utterances]
            each = [ids[words] for ids, (_, words) in zip(tag_ids, encoded)]
            self.tags = np.where(self.word_starts, np.concatenate([none, *each]), 0).astype(np.int32)
        digest = hashlib.sha256(f"{task} {length} {tokenizer.fingerprint}".encode())
        for values in (self.offsets, self.tokens, self.words, self.labels, self.tags):
            digest.update(values.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.utterances)


def _pack(
    labeled: LabeledSet, chosen: np.ndarray, length: int, row_multiple: int, least_rows: int
) -> tuple[Batch, np.ndarray]:
    """(batch, utterance index int32 [R, S], -1 where unused) of the chosen utterances.

    R is the least multiple of `row_multiple` that holds them, and at least `least_rows`.
    """
    slots = num_utterance_slots(length)
    sizes = np.diff(labeled.offsets)[chosen]
    order = np.argsort(-sizes, kind="stable")  # longest first: best fit then leaves the least padding
    chosen, sizes = chosen[order], sizes[order]
    fit = BestFit(length, open_rows=len(chosen), max_segments=slots)
    row, column, number = (np.array(values, np.int64) for values in fit.place((sizes + 2).tolist())[:3])
    rows = row_multiple * math.ceil(max(fit.num_rows, least_rows) / row_multiple)

    tokenizer = labeled.tokenizer
    tokens = np.full((rows, length), tokenizer.pad_id, np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    tag_labels = np.zeros((rows, length), np.int32)
    tag_weights = np.zeros((rows, length), np.float32)
    starts = row * length + column
    flat = tokens.reshape(-1)
    flat[starts] = tokenizer.cls_id
    flat[starts + sizes + 1] = tokenizer.sep_id
    source, target = runs(labeled.offsets[chosen], sizes), runs(starts + 1, sizes)
    flat[target] = labeled.tokens[source]
    segment_ids.reshape(-1)[runs(starts, sizes + 2)] = np.repeat(number, sizes + 2)
    tags = labeled.tags[source]
    if labeled.task == "icner":
        tag_labels.reshape(-1)[target] = tags
        tag_weights.reshape(-1)[target] = labeled.word_starts[source] & (tags >= 0)

    utterance_index = np.full((rows, slots), -1, np.int32)
    utterance_index[row, number - 1] = chosen
    first_positions = np.zeros((rows, slots), np.int32)
    first_positions[row, number - 1] = column
    labels = np.zeros((rows, slots), np.int32)
    labels[row, number - 1] = labeled.labels[chosen]
    batch = {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": positions(segment_ids),
        "first_positions": first_positions,
        "utterance_weights": (utterance_index >= 0).astype(np.float32),
        "utterance_labels": labels,
        "tag_labels": tag_labels,
        "tag_weights": tag_weights,
    }
    return batch, utterance_index


def num_utterance_slots(length: int) -> int:
    """Utterance slots S of a row of `length` tokens."""
    return max(1, length // TOKENS_PER_SLOT)


class FinetuneBatches:
    """Batches of `batch_size` utterances; batch k is a pure function of (seed, k), with every utterance once an epoch.

    The number of rows is a multiple of `row_multiple`: nearly always the same, larger for a batch that does not fit,
    so that few shapes are compiled.
    """

    def __init__(self, labeled: LabeledSet, batch_size: int, length: int, seed: int, row_multiple: int):
        self.labeled, self.batch_size, self.length, self.row_multiple = labeled, batch_size, length, row_multiple
        self._key = name_key("finetuning order", seed)
        mean_tokens = len(labeled.tokens) / len(labeled) + 2
        # A tenth more than the mean holds nearly every batch of usual size.
        self._least_rows = math.ceil(
            max(1.1 * mean_tokens * batch_size / length, batch_size / num_utterance_slots(length))
        )
        identity = [labeled.fingerprint, batch_size, length, seed, row_multiple]
        self.fingerprint = f"{name_key(json.dumps(identity)):016x}"

    def utterances(self, step: int) -> np.ndarray:
        """int64 [batch_size]: which utterances batch `step` has."""
        drawn = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epoch, position = np.divmod(drawn, len(self.labeled))
        return permute(position, len(self.labeled), counter_keys(self._key, epoch))

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """This process's contiguous slice of the rows of batch `step` (a finetuning batch, see kd_jax.types)."""
        whole, _ = _pack(self.labeled, self.utterances(step), self.length, self.row_multiple, self._least_rows)
        first, last = process_slice(len(whole["tokens"]), process_index, process_count, key="mesh")
        return {name: values[first:last] for name, values in whole.items()}


def packed(labeled: LabeledSet, length: int, batch_rows: int) -> Iterator[tuple[Batch, np.ndarray]]:
    """Every utterance once, for evaluation: (batch of `batch_rows` rows, utterance index int32 [R, S], -1 unused)."""
    batch, utterance_index = _pack(labeled, np.arange(len(labeled)), length, batch_rows, least_rows=0)
    for start in range(0, len(utterance_index), batch_rows):
        rows = slice(start, start + batch_rows)
        yield {name: values[rows] for name, values in batch.items()}, utterance_index[rows]
