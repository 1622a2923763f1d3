import numpy as np
import pytest

from kd_jax.data.labeled import FinetuneBatches, LabeledSet, num_utterance_slots, packed
from kd_jax.data.text.tokenizer import train_tokenizer
from kd_jax.data.text.utterances import LabelMaps, Utterance
from kd_jax.types import UserError

WORDS = ["wake", "me", "tomorrow", "up", "at", "nine", "play", "jazz", "immediately", "x"]
LENGTH = 32


class ThreeLetterPieces:
    """Cuts each word into pieces of three letters, numbered as they come up; the word "x" vanishes."""

    cls_id, sep_id, pad_id, fingerprint = 1, 2, 0, "three"

    def __init__(self):
        self.ids = {}

    def encode_words(self, texts, joined):
        assert not any(joined)
        result = []
        for words in texts:
            pairs = [(w[i : i + 3], n) for n, w in enumerate(words) if w != "x" for i in range(0, len(w), 3)]
            ids = [self.ids.setdefault(piece, 10 + len(self.ids)) for piece, _ in pairs]
            result.append((np.array(ids, np.int32), np.array([n for _, n in pairs], np.int32)))
        return result


def utterance(number, words, tags=None, domain="alarm", intent="alarm_set", partition="train"):
    tags = tuple(tags or ["O"] * len(words))
    return Utterance(str(number), "en-US", partition, domain, intent, " ".join(words), tuple(words), tags)


def many(count=200, longest=9, seed=0):
    random = np.random.default_rng(seed)
    result = []
    for number in range(count):
        words = [WORDS[i] for i in random.integers(0, len(WORDS), random.integers(1, longest))]
        tags = [["O", "B-time", "I-time", "B-artist"][i] for i in random.integers(0, 4, len(words))]
        domain, intent = [("alarm", "alarm_set"), ("play", "play_music")][number % 2]
        result.append(utterance(number, words, tags, domain, intent))
    return result


def make(utterances, task="icner", length=LENGTH, train=None):
    return LabeledSet(utterances, ThreeLetterPieces(), LabelMaps.from_train(train or utterances), task, length)


def contents(batch, utterance_index):
    """(utterance, tokens, label, {column in the segment: tag}) of each slot, read slot by slot."""
    for row, slot in zip(*np.nonzero(batch["utterance_weights"])):
        first = batch["first_positions"][row, slot]
        inside = np.flatnonzero(batch["segment_ids"][row] == slot + 1)
        assert inside[0] == first and batch["positions"][row, first] == 0
        tags = {
            int(column - first): int(batch["tag_labels"][row, column])
            for column in inside
            if batch["tag_weights"][row, column]
        }
        yield utterance_index[row, slot], batch["tokens"][row, inside], batch["utterance_labels"][row, slot], tags


def test_hand_worked_batch():
    one = utterance(0, ["tomorrow", "at", "nine"], ["B-date", "O", "B-time"], intent="alarm_set")
    two = utterance(1, ["x", "play", "jazz"], ["B-time", "O", "B-genre"], intent="play_music")
    labeled = make([one, two], train=[one])
    assert labeled.labels.tolist() == [0, -1]
    ((batch, index),) = packed(labeled, 16, batch_rows=1)
    # tom orr ow at nin e | pla y jaz z; "x" has no piece; play_music and B-genre are unknown.
    np.testing.assert_array_equal(batch["tokens"], [[1, 10, 11, 12, 13, 14, 15, 2, 1, 16, 17, 18, 19, 2, 0, 0]])
    np.testing.assert_array_equal(batch["segment_ids"], [[1] * 8 + [2] * 6 + [0, 0]])
    np.testing.assert_array_equal(batch["positions"], [[*range(8), *range(6), 0, 0]])
    date, time = labeled_ids(one, "B-date"), labeled_ids(one, "B-time")
    np.testing.assert_array_equal(batch["tag_labels"], [[0, date, 0, 0, 0, time, 0, 0, 0, 0, 0, -1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["tag_weights"], [[0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch["first_positions"], [[0, 8, 0, 0]])
    np.testing.assert_array_equal(batch["utterance_weights"], [[1, 1, 0, 0]])
    np.testing.assert_array_equal(batch["utterance_labels"], [[0, -1, 0, 0]])
    np.testing.assert_array_equal(index, [[0, 1, -1, -1]])
    # Each piece knows its word.
    assert labeled.words.tolist() == [0, 0, 0, 1, 2, 2, 1, 1, 2, 2]
    assert np.flatnonzero(labeled.word_starts).tolist() == [0, 3, 4, 6, 8]


def labeled_ids(train, tag):
    return LabelMaps.from_train([train]).tag_id(tag)


def test_domain_labels_have_no_tags():
    utterances = many(20)
    labeled = make(utterances, task="dc")
    maps = LabelMaps.from_train(utterances)
    assert [maps.domains[label] for label in labeled.labels] == [one.domain for one in utterances]
    for batch, _ in packed(labeled, LENGTH, 4):
        assert not batch["tag_weights"].any() and not batch["tag_labels"].any()


def test_long_utterances_are_cut():
    labeled = make([utterance(0, ["tomorrow"] * 20), utterance(1, ["at"])], length=16)
    assert np.diff(labeled.offsets).tolist() == [14, 1]
    assert labeled.words[labeled.word_starts].tolist() == [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("batch_rows", [1, 5, 64])
def test_packed_covers_every_utterance_once_in_fixed_shapes(batch_rows):
    utterances = many()
    labeled = make(utterances)
    maps = LabelMaps.from_train(utterances)
    alone = [labeled.tokenizer.encode_words([one.words], [False])[0] for one in utterances]
    seen = []
    for batch, index in packed(labeled, LENGTH, batch_rows):
        assert batch["tokens"].shape == (batch_rows, LENGTH) and index.shape == (
            batch_rows,
            num_utterance_slots(LENGTH),
        )
        assert {name: value.dtype for name, value in batch.items()} == {
            "tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "first_positions": np.int32,
            "utterance_weights": np.float32, "utterance_labels": np.int32,
            "tag_labels": np.int32, "tag_weights": np.float32,
        }  # fmt: skip
        for i, tokens, label, tags in contents(batch, index):
            ids, words = alone[i]
            np.testing.assert_array_equal(tokens, [1, *ids, 2])
            assert maps.intents[label] == utterances[i].intent
            assert len(tags) == sum(word != "x" for word in utterances[i].words)
            for column, tag in tags.items():
                assert column == 1 or words[column - 1] != words[column - 2]
                assert maps.tags[tag] == utterances[i].tags[words[column - 1]]
            seen.append(i)
    assert sorted(seen) == list(range(len(utterances)))


def test_rows_are_well_filled():
    batches = [batch for batch, _ in packed(make(many(1000)), LENGTH, 1)]
    assert np.mean([np.mean(batch["segment_ids"] > 0) for batch in batches]) > 0.95


def test_nothing_to_evaluate_gives_nothing():
    assert list(packed(make([], train=many(5)), LENGTH, 8)) == []


def batches_of(count=200, batch_size=16, seed=0, row_multiple=4):
    return FinetuneBatches(make(many(count)), batch_size, LENGTH, seed, row_multiple)


def test_every_utterance_comes_once_an_epoch():
    batches = batches_of(count=50, batch_size=16)
    drawn = np.concatenate([batches.utterances(step) for step in range(25)])
    epochs = drawn.reshape(-1, 50)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(50))
    assert not np.array_equal(epochs[0], epochs[1])


def test_batch_holds_its_utterances():
    batches = batches_of()
    labeled = batches.labeled
    for step in (0, 3, 100):
        batch = batches.batch(step)
        assert batch["utterance_weights"].sum() == 16 and len(batch["tokens"]) % 4 == 0
        expected = sorted(
            (1, *labeled.tokens[labeled.offsets[i] : labeled.offsets[i + 1]].tolist(), 2)
            for i in batches.utterances(step)
        )
        slots = batch["utterance_weights"].astype(int) - 1
        assert sorted(tuple(tokens.tolist()) for _, tokens, _, _ in contents(batch, slots)) == expected
        np.testing.assert_array_equal(batches.batch(step)["tokens"], batch["tokens"])


def test_few_shapes_and_room_for_large_batches():
    batches = batches_of(count=500, batch_size=32, row_multiple=2)
    shapes = [len(batches.batch(step)["tokens"]) for step in range(100)]
    assert len(set(shapes)) <= 2 and shapes.count(min(shapes)) > 90
    # Batches of only the longest utterances need more rows than the mean says.
    mixed = [utterance(i, ["tomorrow"] * (9 if i < 4 else 1)) for i in range(200)]
    batches = FinetuneBatches(make(mixed), 4, LENGTH, 0, 1)
    batches.utterances = lambda step: np.arange(4)
    assert len(batches.batch(0)["tokens"]) == 4


def test_processes_share_the_rows():
    batches = batches_of()
    whole = batches.batch(5)
    for count in (1, 2, 4):
        parts = [batches.batch(5, process, count) for process in range(count)]
        for name in whole:
            np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])
    with pytest.raises(UserError, match="do not divide over 3 processes"):
        batches.batch(5, 0, 3)


def test_seeds_and_data_tell_fingerprints_apart():
    prints = [batches_of().fingerprint, batches_of(seed=1).fingerprint, batches_of(count=199).fingerprint]
    assert len(set(prints)) == 3 and batches_of().fingerprint == prints[0]
    assert not np.array_equal(batches_of().utterances(0), batches_of(seed=1).utterances(0))


def test_characters_are_joined_where_a_locale_has_no_spaces():
    trained = train_tokenizer(["明天 早上", "明天早上", "wake me up", "wake up"] * 20, 40)
    tags = ("B-t", "I-t", "I-t", "I-t")
    chinese = Utterance("0", "zh-CN", "train", "alarm", "set", "明天早上", tuple("明天早上"), tags, characters=True)
    english = utterance(1, ["wake", "up"])
    maps = LabelMaps.from_train([chinese, english])
    labeled = LabeledSet([chinese, english], trained, maps, "icner", 32)
    for i, text in enumerate(["明天早上", "wake up"]):
        inside = slice(labeled.offsets[i], labeled.offsets[i + 1])
        np.testing.assert_array_equal(labeled.tokens[inside], trained.encode([text])[0])
    assert labeled.tags[0] == maps.tag_id("B-t")
