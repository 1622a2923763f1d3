"""Hidden states and masked-LM logits equal those that PyTorch `transformers` gave, stored: needs no PyTorch."""

import pathlib

import jax
import numpy as np
import pytest

from kd_jax.models.functional import Functional
from tests.support.golden_models import FAMILIES, FILE, LENGTH, PAD, SIZES, our_config, texts, uniform, weights
from tests.support.huggingface import from_huggingface

DRAWN = (-0.5143415927886963, -0.3838307857513428, -0.4897853136062622, 0.16344690322875977)
MEANT = "if you meant this, write the golden outputs again with tests/support/make_golden.py, which asks PyTorch"


@pytest.fixture(scope="module")
def golden():
    with np.load(pathlib.Path(__file__).parents[1] / "support" / FILE, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, model, its parameters)."""
    config = our_config(request.param)
    return request.param, Functional("mlm", config), from_huggingface(weights(config), config)


def compare(golden, family, batch, where):
    name, model, params = family

    @jax.jit
    def run(params):
        hidden = model.hidden(params, batch)
        return hidden, model.mlm_logits(params, hidden)

    for what, ours in zip(("hidden", "logits"), run(params), strict=True):
        stored = golden[f"{name}.{what}"]
        assert np.abs(stored).max() > 0.5
        error = np.abs(np.asarray(ours)[where] - stored).max()
        assert error < 1e-4, f"{name}, {what}: {error:.1e}; {MEANT}"


def test_padded(golden, family):
    mask = np.arange(LENGTH)[None] < np.array(SIZES)[:, None]
    tokens = np.full(mask.shape, PAD, np.int32)
    tokens[mask] = np.concatenate(texts())
    positions = np.where(mask, np.arange(LENGTH, dtype=np.int32)[None], 0)
    compare(golden, family, {"tokens": tokens, "segment_ids": mask.astype(np.int32), "positions": positions}, mask)


def test_packed(golden, family):
    rest = LENGTH - sum(SIZES)
    sizes = (*SIZES, rest)
    batch = {
        "tokens": np.concatenate([*texts(), np.full(rest, PAD)])[None].astype(np.int32),
        "segment_ids": np.repeat([1, 2, 3, 0], sizes)[None].astype(np.int32),
        "positions": np.concatenate([np.arange(size) for size in sizes])[None].astype(np.int32),
    }
    compare(golden, family, batch, batch["segment_ids"] > 0)


def test_weights_are_those_of_the_file():
    """The stored outputs are of these weights: a NumPy that draws others would be taken for an error of the model."""
    found = uniform("encoder", (4,))
    np.testing.assert_array_equal(found, np.array(DRAWN, np.float32))
    assert not np.array_equal(found, uniform("decoder", (4,)))
    assert np.abs(uniform("x", (10_000,)).mean()) < 0.02 and np.abs(uniform("x", (10_000,))).max() <= 1


def test_the_file_is_small_and_whole(golden):
    assert (pathlib.Path(__file__).parents[1] / "support" / FILE).stat().st_size < 200_000
    assert sorted(golden) == sorted(f"{name}.{what}" for name in FAMILIES for what in ("hidden", "logits"))
    assert all(len(values) == sum(SIZES) and values.dtype == np.float32 for values in golden.values())
