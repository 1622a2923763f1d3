import types

import numpy as np
import pytest

from kd_jax.config.data import Masking, Transfer
from kd_jax.config.settings import block, read
from kd_jax.data.batches import MaskedBatches, heldout_batches
from kd_jax.data.packing import positions
from kd_jax.data.rows import RowStore, StoreWriter
from kd_jax.data.transfer_set import TransferSet
from kd_jax.types import UserError

LENGTH = 32
TOKENIZER = types.SimpleNamespace(
    vocab_size=500, cls_id=1, sep_id=2, pad_id=0, mask_id=4, special_ids=(0, 1, 2, 3, 4), fingerprint="tok"
)
MASKING = Masking(epochs=2)
TRANSFER = Transfer(task_share=0.3, language_mix="own")


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(0)
    result = []
    for source, kind, longest, count in (("web", "generic", 40, 300), ("nlu", "task", 8, 60)):
        texts = [random.integers(5, 500, random.integers(1, longest)).astype(np.int32) for _ in range(count)]
        (folder / source).mkdir()
        with StoreWriter(
            folder / source, name=f"{source}-en", source=source, kind=kind, language="en", split="train",
            length=LENGTH, open_rows=8, tokenizer=TOKENIZER, built_from="",
        ) as writer:  # fmt: skip
            writer.add(texts)
            writer.finish({})
        result.append(RowStore(folder / source))
    return result


def make(stores, seed=0, batch_size=24, **masking):
    transfer_set = TransferSet(stores, transfer=TRANSFER, seed=seed, weights={"web": 1.0, "nlu": 1.0})
    values = read(Masking, block(Masking, **({"epochs": 2} | masking)), "masking")
    return MaskedBatches(stores, transfer_set, values, TOKENIZER, batch_size)


def restored(batch):
    """The tokens before masking."""
    tokens = batch["tokens"].copy()
    rows, slots = np.nonzero(batch["masked_weights"])
    tokens[rows, batch["masked_positions"][rows, slots]] = batch["masked_targets"][rows, slots]
    return tokens


def test_rows_are_those_of_the_transfer_set(stores):
    batches = make(stores)
    for step in (0, 7):
        batch = batches.batch(step)
        source, _, row = batches.transfer_set.locate(np.arange(step * 24, step * 24 + 24))
        for i in range(24):
            tokens, segment_ids = stores[source[i]].rows(row[i : i + 1])
            np.testing.assert_array_equal(restored(batch)[i], tokens[0])
            np.testing.assert_array_equal(batch["segment_ids"][i], segment_ids[0])
        np.testing.assert_array_equal(batch["positions"], positions(batch["segment_ids"]))


def test_shapes_and_types(stores):
    batch = make(stores).batch(0)
    expected = {
        "tokens": (np.int32, LENGTH), "segment_ids": (np.int32, LENGTH), "positions": (np.int32, LENGTH),
        "masked_positions": (np.int32, 5), "masked_targets": (np.int32, 5), "masked_weights": (np.float32, 5),
    }  # fmt: skip
    assert {name: (value.dtype.type, value.shape[1]) for name, value in batch.items()} == expected
    assert all(len(value) == 24 for value in batch.values())


@pytest.mark.parametrize("count", [1, 2, 3, 8, 24])
def test_process_slices_are_disjoint_and_complete(stores, count):
    batches = make(stores)
    whole = batches.batch(3)
    parts = [batches.batch(3, process, count) for process in range(count)]
    for name in whole:
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


def test_process_count_must_divide(stores):
    with pytest.raises(UserError, match="batch_size: 24 rows do not divide over 7 processes"):
        make(stores).batch(0, 0, 7)


def test_masks_repeat_after_the_masking_epochs_and_not_before(stores):
    batches = make(stores)
    nlu_rows = stores[1].num_rows
    seen = {}
    for step in range(120):
        batch = batches.batch(step)
        source, epoch, row = batches.transfer_set.locate(np.arange(step * 24, step * 24 + 24))
        for i in np.flatnonzero(source == 1):
            seen[int(row[i]), int(epoch[i])] = batch["tokens"][i].tobytes()
    rows = [row for row in range(nlu_rows) if (row, 2) in seen]
    assert len(rows) > 5 and max(epoch for _, epoch in seen) >= 2
    assert all(seen[row, 0] == seen[row, 2] for row in rows)
    assert np.mean([seen[row, 0] == seen[row, 1] for row in rows]) < 0.3


def test_masks_do_not_depend_on_the_run_seed(stores):
    def masks(seed):
        batches, found = make(stores, seed=seed), {}
        for step in range(10):
            source, epoch, row = batches.transfer_set.locate(np.arange(step * 24, step * 24 + 24))
            for i, key in enumerate(zip(source.tolist(), (epoch % 2).tolist(), row.tolist())):
                found[key] = batches.batch(step)["tokens"][i].tobytes()
        return found

    zero, one = masks(0), masks(1)
    shared = zero.keys() & one.keys()
    assert len(shared) > 20 and all(zero[key] == one[key] for key in shared)
    assert list(zero) != list(one)


def test_fingerprint_follows_everything_that_changes_batches(stores):
    prints = [
        make(stores).fingerprint, make(stores, seed=1).fingerprint, make(stores, batch_size=12).fingerprint,
        make(stores, rate=0.2).fingerprint, make(stores[:1] + stores[1:]).fingerprint,
    ]  # fmt: skip
    assert prints[0] == prints[4] and len(set(prints[:4])) == 4


def test_heldout_batches_cover_the_rows_in_fixed_shapes(stores):
    store = stores[0]
    batches = list(heldout_batches(store, MASKING, TOKENIZER, batch_size=32, rows=50))
    again = list(heldout_batches(store, MASKING, TOKENIZER, batch_size=32, rows=50))
    assert [batch["tokens"].shape for batch in batches] == [(32, LENGTH)] * 2
    np.testing.assert_array_equal(batches[1]["tokens"], again[1]["tokens"])
    rows = np.concatenate([restored(batch) for batch in batches])
    np.testing.assert_array_equal(rows[:50], store.rows(np.arange(50))[0])
    assert not batches[1]["masked_weights"][18:].any() and not batches[1]["segment_ids"][18:].any()
    assert np.all(batches[1]["tokens"][18:] == TOKENIZER.pad_id)
    # More rows than the store has: all of it, and no empty batch after.
    everything = list(heldout_batches(store, MASKING, TOKENIZER, batch_size=store.num_rows, rows=10**9))
    assert len(everything) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rate": 0.0}, "masking.rate"), ({"mask_share": 0.95}, "sum to at most 1"), ({"epochs": 0}, "masking.epochs")],
)
def test_senseless_masking_is_refused(stores, changes, message):
    with pytest.raises(UserError, match=message):
        make(stores, **changes)
