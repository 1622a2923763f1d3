"""The same texts and masks in other layouts: packed rows, one text a row, a label at every column."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]

IGNORED = -100  # the label that losses of PyTorch leave out

# Arrays with a slot and not a column on their second axis.
_MASK_SLOTS = ("masked_positions", "masked_targets", "masked_weights")
_UTTERANCE_SLOTS = ("first_positions", "utterance_weights", "utterance_labels")


def texts_of(segment_ids: np.ndarray) -> np.ndarray:
    """int [R, L]: for each column of packed rows the number of its text, counted over the batch; -1 for padding."""
    starts = segment_ids > 0
    starts[:, 1:] &= segment_ids[:, 1:] != segment_ids[:, :-1]
    numbers = np.cumsum(starts.reshape(-1)).reshape(segment_ids.shape) - 1
    return np.where(segment_ids > 0, numbers, -1)


def _text_a_row(batch: Arrays, names: Sequence[str], pad_id: int) -> dict[str, np.ndarray]:
    """Arrays [R, L] of packed rows as [N, longest text], a text in each row."""
    real = batch["segment_ids"] > 0
    numbers, columns = texts_of(batch["segment_ids"])[real], batch["positions"][real]
    shape = (int(numbers.max()) + 1, int(columns.max()) + 1)
    result = {name: np.full(shape, pad_id if name == "tokens" else 0, batch[name].dtype) for name in names}
    for name, values in result.items():
        values[numbers, columns] = 1 if name == "segment_ids" else batch[name][real]
    return result


def one_text_a_row(batch: Arrays, pad_id: int) -> dict[str, np.ndarray]:
    """A masked-LM batch of packed rows as N rows of one text each, in the same order, with the same masks.

    The rows are as long as the longest text, and have as many mask slots as its most masked text (see kd_jax.types).
    """
    rows, slots = np.nonzero(batch["masked_weights"])
    columns = batch["masked_positions"][rows, slots]
    text = texts_of(batch["segment_ids"])[rows, columns]
    # Slots ascend in a row, as its texts do, so the slots of a text are neighbors; each counts from the first.
    slot = np.arange(len(text)) - np.searchsorted(text, text)
    result = _text_a_row(batch, ("tokens", "segment_ids", "positions"), pad_id)
    for name in _MASK_SLOTS:
        result[name] = np.zeros((len(result["tokens"]), int(slot.max(initial=0)) + 1), batch[name].dtype)
        result[name][text, slot] = batch[name][rows, slots]
    result["masked_positions"][text, slot] = batch["positions"][rows, columns]
    return result


def labeled_text_a_row(batch: Arrays, pad_id: int) -> dict[str, np.ndarray]:
    """A finetuning batch of packed rows as N rows of one utterance each."""
    result = _text_a_row(batch, ("tokens", "segment_ids", "positions", "tag_labels", "tag_weights"), pad_id)
    rows, slots = np.nonzero(batch["utterance_weights"])
    text = texts_of(batch["segment_ids"])[rows, batch["first_positions"][rows, slots]]
    for name in _UTTERANCE_SLOTS:
        result[name] = np.zeros((len(result["tokens"]), 1), batch[name].dtype)
    result["utterance_weights"][text, 0] = 1.0
    result["utterance_labels"][text, 0] = batch["utterance_labels"][rows, slots]
    return result


def with_labels(batch: Arrays) -> dict[str, np.ndarray]:
    """The batch and, for a loss at every column, labels int32 [R, L], which are IGNORED where nothing is masked."""
    rows, slots = np.nonzero(batch["masked_weights"])
    labels = np.full(batch["tokens"].shape, IGNORED, np.int32)
    labels[rows, batch["masked_positions"][rows, slots]] = batch["masked_targets"][rows, slots]
    return {**batch, "labels": labels}


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
