"""A trimmed vocabulary: the pieces in use numbered anew, everything else as it was."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from kd_jax.data.batches import MaskedBatches, heldout_batches
from kd_jax.data.labeled import LabeledSet
from kd_jax.data.prepared import Prepared, prepare
from kd_jax.data.text.tokenizer import train_tokenizer
from kd_jax.data.text.utterances import LabelMaps
from kd_jax.data.transfer_set import TransferSet
from kd_jax.data.vocabulary import TrimmedTokenizer, kept_ids, seen_by_student
from kd_jax.types import UserError
from tests.data.test_batches import restored

TRIM = ConfigDict({"trim": True, "min_count": 3, "dropped": "renormalize"})


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    prepare(quickstart.get_config("smoke"), folder)
    return Prepared(folder)


@pytest.fixture(scope="module")
def trimmed(full):
    return seen_by_student(full, TRIM)


def test_without_trimming_it_is_the_same_folder(full):
    same = seen_by_student(full, ConfigDict({"trim": False, "min_count": 1, "dropped": "renormalize"}))
    assert same is full
    assert kept_ids(same) is None


def test_kept_are_the_special_pieces_and_those_in_use(full, trimmed):
    size = full.tokenizer.vocab_size
    counts = sum(store.token_counts(size) for store in full.stores("train"))
    expected = sorted({*np.flatnonzero(counts >= 3).tolist(), *full.tokenizer.special_ids})
    assert kept_ids(trimmed).tolist() == expected
    assert trimmed.tokenizer.vocab_size == len(expected) < size
    assert trimmed.tokenizer.tokens() == [full.tokenizer.tokens()[i] for i in expected]
    assert trimmed.tokenizer.fingerprint != full.tokenizer.fingerprint


def test_rows_and_texts_map_back_to_the_full_ids(full, trimmed):
    kept, unknown = kept_ids(trimmed), full.tokenizer.unk_id
    for ours, theirs in zip(trimmed.stores("train"), full.stores("train"), strict=True):
        index = np.arange(min(20, ours.num_rows))
        tokens, segments = ours.rows(index)
        whole, same = theirs.rows(index)
        np.testing.assert_array_equal(kept[tokens], np.where(np.isin(whole, kept), whole, unknown))
        np.testing.assert_array_equal(segments, same)
        assert ours.fingerprint == theirs.fingerprint
        np.testing.assert_array_equal(
            ours.token_counts(len(kept)), theirs.token_counts(full.tokenizer.vocab_size)[kept]
        )
    texts = [one.text for one in full.utterances[:50]]
    for ours, theirs in zip(trimmed.tokenizer.encode(texts), full.tokenizer.encode(texts)):
        np.testing.assert_array_equal(kept[ours], np.where(np.isin(theirs, kept), theirs, unknown))


def test_random_replacements_are_kept_pieces_and_masks_stand_where_they_stood(full, trimmed):
    config = quickstart.get_config("smoke")
    weights = dict.fromkeys(config.sources, 1.0)

    def batch(prepared):
        stores = prepared.stores("train")
        transfer_set = TransferSet(stores, transfer=config.transfer, seed=0, weights=weights)
        return MaskedBatches(stores, transfer_set, config.masking, prepared.tokenizer, 64).batch(0)

    ours, theirs = batch(trimmed), batch(full)
    assert ours["tokens"].max() < trimmed.tokenizer.vocab_size
    # A dropped piece reads as unknown and is not masked, so rows that hold one have other masks.
    rows = np.isin(restored(theirs), kept_ids(trimmed)).all(axis=1)
    assert rows.sum() > 10
    np.testing.assert_array_equal(
        kept_ids(trimmed)[ours["masked_targets"][rows]] * ours["masked_weights"][rows].astype(int),
        theirs["masked_targets"][rows] * theirs["masked_weights"][rows].astype(int),
    )


def test_heldout_text_with_dropped_pieces_is_never_masked_there(trimmed):
    config = quickstart.get_config("smoke")
    unknown = trimmed.tokenizer.unk_id
    met = 0
    for store in trimmed.stores("heldout"):
        for batch in heldout_batches(store, config.masking, trimmed.tokenizer, 16, 64):
            used = batch["masked_weights"] > 0
            assert (batch["masked_targets"][used] != unknown).all()
            met += int((batch["tokens"] == unknown).sum())
    assert met > 0


def test_finetuning_reads_the_same_utterances(full, trimmed):
    train = [one for one in full.utterances if one.partition == "train"][:60]
    maps = LabelMaps.from_train(train)
    ours = LabeledSet(train, trimmed.tokenizer, maps, "icner", 32)
    theirs = LabeledSet(train, full.tokenizer, maps, "icner", 32)
    np.testing.assert_array_equal(ours.tags, theirs.tags)
    known = np.isin(theirs.pieces, kept_ids(trimmed))
    np.testing.assert_array_equal(kept_ids(trimmed)[ours.pieces][known], theirs.pieces[known])
    assert (ours.pieces[~known] == trimmed.tokenizer.unk_id).all()


def test_mistakes_name_the_key(full):
    for changes, message in (({"dropped": "zero"}, r"config\.vocabulary\.dropped"), ({"min_count": 0}, "min_count: 0")):
        with pytest.raises(UserError, match=message):
            seen_by_student(full, ConfigDict({**TRIM.to_dict(), **changes}))


def test_a_trimmed_tokenizer_is_not_saved_as_if_it_were_the_full_one(tmp_path):
    tokenizer = train_tokenizer(["eins zwei drei"] * 5, "bpe", 40)
    kept = np.array([*tokenizer.special_ids, tokenizer.vocab_size - 1], np.int32)
    with pytest.raises(TypeError, match="save the full one"):
        TrimmedTokenizer(tokenizer, kept).save(tmp_path)
