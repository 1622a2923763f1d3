"""Encoders small enough for tests, one of each family, and packed batches for them."""

import dataclasses
import functools

import jax
import numpy as np

from kd_jax.models.encoder_config import PRESETS, EncoderConfig, encoder_config
from kd_jax.models.functional import Functional

FAMILIES = {"bert": "mbert", "roberta": "xlmr_base", "xlmr_xl": "xlmr_xl", "modernbert": "mmbert_small"}
VOCAB = 50


def small_config(family: str, **changes) -> EncoderConfig:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 2,
        "intermediate_size": 24,
        "max_positions": 40,
        "local_window": 4,
        "local_theta": 500.0,
        "initializer_range": 0.3,  # far from linear, so that errors show
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "remat": False,
        "scan": "scan",  # compiles fastest
    }
    return dataclasses.replace(encoder_config(PRESETS[FAMILIES[family]], 1), **sizes | changes)


@functools.cache
def _cached(model: Functional, seed: int) -> dict:
    return jax.jit(model.init)(jax.random.key(seed))


def parameters(model: Functional, seed: int = 0) -> dict:
    """Fresh parameters, made once for each model: compiling the initializers takes most of a small test's time."""
    return jax.tree.map(lambda leaf: leaf, _cached(model, seed))


def packed_batch(rows: list[list[int]], length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens for rows given as lists of text lengths; the rest of each row is padding."""
    rng = np.random.default_rng(seed)
    shape = (len(rows), length)
    batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions")}
    for row, lengths in enumerate(rows):
        start = 0
        for segment, size in enumerate(lengths, 1):
            part = slice(start, start + size)
            batch["tokens"][row, part] = rng.integers(1, VOCAB, size)
            batch["segment_ids"][row, part] = segment
            batch["positions"][row, part] = np.arange(size)
            start += size
    return batch


def with_alone(batch: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[tuple[int, slice]]]:
    """The batch, and below it each of its texts once more in a padded row of its own; and the (row, columns) where each
    stands in the packed rows. One batch, so that one compilation serves both."""
    places = []
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            columns = np.flatnonzero(segments == segment)
            places.append((row, slice(columns[0], columns[-1] + 1)))
    length = batch["tokens"].shape[1]
    single = {name: np.zeros((len(places), length), np.int32) for name in batch}
    for index, (row, columns) in enumerate(places):
        size = columns.stop - columns.start
        single["tokens"][index, :size] = batch["tokens"][row, columns]
        single["segment_ids"][index, :size] = 1
        single["positions"][index, :size] = np.arange(size)
    return {name: np.concatenate([batch[name], single[name]]) for name in batch}, places
