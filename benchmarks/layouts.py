"""The same texts and masks in the layouts that the variants read: packed rows, one text a row, a label at every column.

NumPy alone, so that a worker of one framework does not import the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]

IGNORED = -100  # the label that losses of PyTorch leave out

# Arrays with a slot and not a column on their second axis.
_MASK_SLOTS = ("masked_positions", "masked_targets", "masked_weights")
_UTTERANCE_SLOTS = ("first_positions", "utterance_weights", "utterance_labels")


def texts_of(segment_ids: np.ndarray) -> np.ndarray:
    """int [R, L]: the number of the text that each column of packed rows belongs to, counted over the batch; -1 for
    padding.
    """
    starts = segment_ids > 0
    starts[:, 1:] &= segment_ids[:, 1:] != segment_ids[:, :-1]
    numbers = np.cumsum(starts.reshape(-1)).reshape(segment_ids.shape) - 1
    return np.where(segment_ids > 0, numbers, -1)


def one_text_a_row(batch: Arrays, pad_id: int) -> dict[str, np.ndarray]:
    """A masked-LM batch of packed rows as N rows of one text each, in the same order, with the same masks.

    The rows are as long as the longest text, and have as many mask slots as its most masked text (see kd_jax.types).
    """
    numbers, real = texts_of(batch["segment_ids"]), batch["segment_ids"] > 0
    texts, length = int(numbers.max()) + 1, int(batch["positions"][real].max()) + 1
    tokens = np.full((texts, length), pad_id, np.int32)
    segment_ids = np.zeros((texts, length), np.int32)
    tokens[numbers[real], batch["positions"][real]] = batch["tokens"][real]
    segment_ids[numbers[real], batch["positions"][real]] = 1

    rows, slots = np.nonzero(batch["masked_weights"])
    columns = batch["masked_positions"][rows, slots]
    text = numbers[rows, columns]
    # Slots ascend in a row and so do its texts, so a text's slots stand together; each counts from its first.
    slot = np.arange(len(text)) - np.searchsorted(text, text)
    shape = (texts, int(slot.max(initial=0)) + 1)
    masked_positions, masked_targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    masked_weights = np.zeros(shape, np.float32)
    masked_positions[text, slot] = batch["positions"][rows, columns]
    masked_targets[text, slot] = batch["masked_targets"][rows, slots]
    masked_weights[text, slot] = 1.0
    return {
        "tokens": tokens,
        "segment_ids": segment_ids,
        "positions": np.where(segment_ids > 0, np.arange(length, dtype=np.int32)[None], 0).astype(np.int32),
        "masked_positions": masked_positions,
        "masked_targets": masked_targets,
        "masked_weights": masked_weights,
    }


def labeled_text_a_row(batch: Arrays, pad_id: int, slots: int = 1) -> dict[str, np.ndarray]:
    """A finetuning batch of packed rows as N rows of one utterance each, with `slots` utterance slots a row."""
    numbers, real = texts_of(batch["segment_ids"]), batch["segment_ids"] > 0
    texts, length = int(numbers.max()) + 1, int(batch["positions"][real].max()) + 1
    padding = {"tokens": pad_id}
    result = {}
    for name in ("tokens", "segment_ids", "positions", "tag_labels", "tag_weights"):
        values = np.full((texts, length), padding.get(name, 0), batch[name].dtype)
        values[numbers[real], batch["positions"][real]] = 1 if name == "segment_ids" else batch[name][real]
        result[name] = values
    rows, places = np.nonzero(batch["utterance_weights"])
    text = numbers[rows, batch["first_positions"][rows, places]]
    for name in _UTTERANCE_SLOTS:
        result[name] = np.zeros((texts, slots), batch[name].dtype)
    result["utterance_weights"][text, 0] = 1.0
    result["utterance_labels"][text, 0] = batch["utterance_labels"][rows, places]
    return result


def with_labels(batch: Arrays) -> dict[str, np.ndarray]:
    """The batch and, for losses at every column, labels int32 [R, L] (IGNORED where not masked) and label_weights
    float32 [R, L].
    """
    rows, slots = np.nonzero(batch["masked_weights"])
    columns = batch["masked_positions"][rows, slots]
    labels = np.full(batch["tokens"].shape, IGNORED, np.int32)
    labels[rows, columns] = batch["masked_targets"][rows, slots]
    return {**batch, "labels": labels, "label_weights": (labels != IGNORED).astype(np.float32)}


def same_shape(batches: Sequence[Arrays], multiple: int, pad_id: int, length: int = 0) -> list[dict[str, np.ndarray]]:
    """The batches filled up with empty rows, columns and slots to the shape of the largest, so that one program serves
    them all; rows and row length are multiples of `multiple`, or the row length is `length`.
    """
    rows, longest = (max(batch["tokens"].shape[axis] for batch in batches) for axis in (0, 1))
    rows, longest = (-(-size // multiple) * multiple for size in (rows, longest))
    length = length or longest
    fills = {"tokens": pad_id, "labels": IGNORED}
    result = []
    for batch in batches:
        filled = {}
        for name, values in batch.items():
            width = (
                max(other[name].shape[1] for other in batches) if name in (*_MASK_SLOTS, *_UTTERANCE_SLOTS) else length
            )
            filled[name] = np.full((rows, width), fills.get(name, 0), values.dtype)
            filled[name][: len(values), : values.shape[1]] = values
        result.append(filled)
    return result


def counts(batches: Sequence[Arrays]) -> dict[str, Any]:
    """What the batches hold: rows and row length of the first, texts, real tokens (special ones included), masks."""
    real = [batch["segment_ids"] > 0 for batch in batches]
    return {
        "batches": len(batches),
        "rows": int(batches[0]["tokens"].shape[0]),
        "length": int(batches[0]["tokens"].shape[1]),
        "texts": sum(int(texts_of(batch["segment_ids"]).max()) + 1 for batch in batches),
        "tokens": sum(int(mask.sum()) for mask in real),
        "masked": sum(int(batch["masked_weights"].sum()) for batch in batches if "masked_weights" in batch),
    }
