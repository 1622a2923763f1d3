"""The few names that every part of kd_jax shares."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray

# A nested dict of arrays with string keys: what checkpoints hold and what jitted steps take.
Params = dict[str, Any]

# Masked-LM batch, R rows of length L with K mask slots a row:
#   tokens            int32  [R, L]  corrupted ids (`pad_id` where segment_ids is 0)
#   segment_ids       int32  [R, L]  1, 2, ... for the texts that share the row; 0 is padding
#   positions         int32  [R, L]  restart at 0 in each segment
#   masked_positions  int32  [R, K]  column of each mask slot (0 where the slot is unused)
#   masked_targets    int32  [R, K]  original id at that column
#   masked_weights    float32[R, K]  1 for a used slot, 0 otherwise
#   teacher_tokens    int32  [R, L]  only for a student with a trimmed vocabulary: the row in the teacher's ids
#
# Finetuning batch, R rows of length L with S utterance slots a row:
#   tokens, segment_ids, positions as above
#   first_positions   int32  [R, S]  column of the utterance's first token (0 where unused)
#   utterance_weights float32[R, S]  1 for a used slot, 0 otherwise
#   utterance_labels  int32  [R, S]  domain (DC) or intent (ICNER) id; -1 for a label unseen in train
#   tag_labels        int32  [R, L]  BIO tag id on the first sub-word of each word
#   tag_weights       float32[R, L]  1 on the first sub-word of each word with a known tag, 0 elsewhere
Batch = Mapping[str, Array]

# The mesh axes that share out the rows of a batch.
ROW_AXES = ("data", "fsdp")

# One loss term or metric before its division: sum over the counted items, and their weight.
Term = tuple[Array, Array]


def row_axes(rows: int) -> tuple[tuple[str, ...], int]:
    """The axes of the mesh that share out so many rows, and how many devices that are.

    The mesh is what jax.sharding.use_abstract_mesh states; ((), 1) without one, or where the rows do not divide.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    axes = tuple(axis for axis in ROW_AXES if axis in sizes and sizes[axis] > 1)
    devices = math.prod(sizes[axis] for axis in axes)
    return (axes, devices) if axes and rows % devices == 0 else ((), 1)


class UserError(Exception):
    """A mistake the user can fix; the message is one sentence with file and line or config key, and how to fix it."""
