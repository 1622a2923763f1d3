"""Small models of each family whose weights are computed from their names, and the texts that they read."""

import zlib

import jax
import numpy as np

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.checkpoint import to_huggingface
from tests.support.small_models import small_config

FAMILIES = ("bert", "distilbert", "roberta", "xlmr_xl", "modernbert")
VOCAB, LENGTH, PAD = 120, 40, 1  # as in test_parity.py, whose models of `transformers` make_golden.py takes
SIZES = (18, 9, 11)  # of the texts
FILE = "golden/parity.npz"  # "<family>.hidden" [tokens, hidden] and "<family>.logits" [tokens, vocabulary]


def our_config(family: str) -> EncoderConfig:
    return small_config(
        "bert" if family == "distilbert" else family,
        vocab_size=VOCAB, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=48, local_window=8,
        max_positions=LENGTH, type_vocab_size={"bert": 2, "modernbert": 0, "distilbert": 0}.get(family, 1),
    )  # fmt: skip


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 numbers between -1 and 1 that depend on the name alone.

    From the raw output of NumPy's PCG64, which is promised to stay as it is; its distributions are not (NEP 19).
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    return ((raw >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)


def weights(config: EncoderConfig) -> dict[str, np.ndarray]:
    """A checkpoint's tensors under their names in `transformers`, far from what training starts at."""
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), Functional("mlm", config).abstract())
    found = {}
    for name, values in to_huggingface(zeros, config).items():
        center = 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0
        found[name] = center + np.float32(0.35) * uniform(name, values.shape)
    return found


def texts() -> list[np.ndarray]:
    """Token ids of each text, int64, none of them a special one."""
    return [(3 + (uniform(f"text {size}", (size,)) + 1) / 2 * (VOCAB - 3)).astype(np.int64) for size in SIZES]
