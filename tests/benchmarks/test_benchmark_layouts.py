"""The same texts, masks and labels stand in every layout, and what is handed to a worker is read back."""

import numpy as np
from ml_collections import ConfigDict

from benchmarks import layouts, workloads
from kd_jax.data.masking import mask_rows, num_slots
from kd_jax.data.packing import Packer, positions

LENGTH, VOCAB, CLS, SEP, PAD, MASK = 24, 90, 1, 2, 3, 4


def packed_batch(seed: int, texts: int = 30):
    """A masked-LM batch of packed rows, as kd_jax.data makes them."""
    rng = np.random.default_rng(seed)
    packer = Packer(LENGTH, CLS, SEP, PAD, open_rows=8)
    pieces = [rng.integers(5, VOCAB, size) for size in rng.integers(1, LENGTH - 2, texts)]
    tokens, segment_ids = map(np.concatenate, zip(packer.add(pieces), packer.finish()))
    keys = rng.integers(0, 2**62, len(tokens)).astype(np.uint64)
    masking = ConfigDict({"rate": 0.3, "mask_share": 0.8, "random_share": 0.1})
    corrupted, places, targets, weights = mask_rows(
        tokens, segment_ids, keys=keys, slots=num_slots(LENGTH, 0.3), masking=masking, mask_id=MASK,
        special_ids=(CLS, SEP, PAD, MASK), random_ids=np.arange(5, VOCAB, dtype=np.int32),
    )  # fmt: skip
    return {
        "tokens": corrupted,
        "segment_ids": segment_ids,
        "positions": positions(segment_ids),
        "masked_positions": places,
        "masked_targets": targets,
        "masked_weights": weights,
    }


def texts_and_masks(batch) -> list[tuple]:
    """Each text of a batch as (its tokens, its masks as (position in the text, target)), found cell by cell."""
    found = []
    for row, segments in enumerate(batch["segment_ids"]):
        masks = {}
        for slot, weight in enumerate(batch["masked_weights"][row]):
            if weight:
                masks[int(batch["masked_positions"][row, slot])] = int(batch["masked_targets"][row, slot])
        for segment in range(1, segments.max(initial=0) + 1):
            columns = np.flatnonzero(segments == segment)
            tokens = tuple(int(batch["tokens"][row, column]) for column in columns)
            found.append((tokens, tuple((i, masks[c]) for i, c in enumerate(columns) if c in masks)))
    return found


def test_padded_rows_hold_the_packed_texts_and_masks():
    batch = packed_batch(0)
    expected = texts_and_masks(batch)
    assert len(expected) >= 30 and any(len(masks) > 1 for _, masks in expected)
    rows = layouts.one_text_a_row(batch, PAD)
    assert texts_and_masks(rows) == expected
    assert rows["tokens"].shape[0] == len(expected)
    assert rows["tokens"].shape[1] == max(len(tokens) for tokens, _ in expected)
    np.testing.assert_array_equal(rows["positions"], positions(rows["segment_ids"]))
    assert set(rows["tokens"][rows["segment_ids"] == 0]) <= {PAD}


def test_one_shape_for_all_batches_adds_only_padding():
    batches = [layouts.one_text_a_row(packed_batch(seed, 20 + 5 * seed), PAD) for seed in range(3)]
    filled = layouts.same_shape(batches, 8, PAD)
    assert len({batch["tokens"].shape for batch in filled}) == 1
    assert len({batch["masked_positions"].shape for batch in filled}) == 1
    assert all(size % 8 == 0 for size in filled[0]["tokens"].shape)
    assert [texts_and_masks(batch) for batch in filled] == [texts_and_masks(batch) for batch in batches]
    assert layouts.counts(filled) | {"rows": 0, "length": 0} == layouts.counts(batches) | {"rows": 0, "length": 0}
    assert all((batch["tokens"][batch["segment_ids"] == 0] == PAD).all() for batch in filled)
    assert layouts.same_shape(batches, 8, PAD, length=40)[0]["tokens"].shape[1] == 40


def test_labels_stand_at_the_masked_columns():
    batch = packed_batch(1)
    labeled = layouts.with_labels(batch)
    used = batch["masked_weights"] > 0
    rows, _ = np.nonzero(used)
    columns, targets = batch["masked_positions"][used], batch["masked_targets"][used]
    np.testing.assert_array_equal(labeled["labels"][rows, columns], targets)
    assert used.sum() == (labeled["labels"] != layouts.IGNORED).sum()


def test_labeled_utterances_keep_labels_and_tags():
    rng = np.random.default_rng(0)
    segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]], np.int32)
    tags = rng.integers(1, 9, segment_ids.shape).astype(np.int32)
    batch = {
        "tokens": rng.integers(5, VOCAB, segment_ids.shape).astype(np.int32),
        "segment_ids": segment_ids,
        "positions": positions(segment_ids),
        "tag_labels": tags,
        "tag_weights": (segment_ids > 0).astype(np.float32),
        "first_positions": np.array([[0, 3, 0], [0, 0, 0]], np.int32),
        "utterance_weights": np.array([[1, 1, 0], [1, 0, 0]], np.float32),
        "utterance_labels": np.array([[4, 5, 0], [6, 0, 0]], np.int32),
    }
    rows = layouts.labeled_text_a_row(batch, PAD)
    assert rows["utterance_labels"].tolist() == [[4], [5], [6]] and rows["utterance_weights"].sum() == 3
    assert not rows["first_positions"].any()
    np.testing.assert_array_equal(rows["tag_labels"][1, :2], tags[0, 3:5])
    np.testing.assert_array_equal(rows["tokens"][1], [*batch["tokens"][0, 3:5], PAD, PAD])
    np.testing.assert_array_equal(rows["tag_weights"], rows["segment_ids"])


def test_what_is_handed_over_is_read_back(tmp_path):
    batches = [packed_batch(seed) for seed in range(11)]
    workloads.write_batches(tmp_path / "a" / "batches.npz", batches)
    read = workloads.read_batches(tmp_path / "a" / "batches.npz")
    assert len(read) == 11
    for mine, theirs in zip(read, batches):
        assert mine.keys() == theirs.keys()
        for name, values in theirs.items():
            np.testing.assert_array_equal(mine[name], values)
    workloads.write_arrays(tmp_path / "tree.npz", {"a/b/c": np.ones(2), "a/d": np.zeros(1)})
    tree = workloads.read_tree(tmp_path / "tree.npz")
    assert tree["a"]["b"]["c"].tolist() == [1, 1] and tree["a"]["d"].tolist() == [0]
