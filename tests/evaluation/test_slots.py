import itertools

import numpy as np
import pytest
from seqeval.metrics import f1_score
from seqeval.scheme import IOB2

from kd_jax.evaluation.slots import (
    SlotCounts,
    align,
    count_slots,
    decode_bio_batch,
    merge_adjacent,
    repair_bio,
    spans_from_tags,
)

TAGS = ("O", "B-a", "I-a", "B-b", "I-b")


def decode_bio(scores, tags):
    """One utterance of scores [W, T]."""
    return decode_bio_batch(scores[None], np.array([len(scores)]), tags)[0]


def valid(tags):
    return all(not t.startswith("I-") or before in (t, "B-" + t[2:]) for before, t in zip(["O", *tags], tags))


def f1(counts):
    correct, substitutions, insertions, deletions = np.sum(counts, axis=0)
    return 2 * correct / (2 * (correct + substitutions) + insertions + deletions)


def test_decoding_finds_the_best_of_all_valid_sequences():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.normal(size=(4, 5))
        sequences = [s for s in itertools.product(range(5), repeat=4) if valid([TAGS[i] for i in s])]
        best = max(sequences, key=lambda s: sum(scores[w, i] for w, i in enumerate(s)))
        assert decode_bio(scores, TAGS) == [TAGS[i] for i in best]


def test_decoding_differs_from_argmax_only_where_argmax_is_malformed():
    scores = np.full((3, 5), -9.0)
    scores[0, 0], scores[1, 2], scores[1, 1], scores[2, 2] = 5, 4, 3, 4  # argmax O I-a I-a; best valid path O B-a I-a
    assert decode_bio(scores, TAGS) == ["O", "B-a", "I-a"]


def test_batch_decoding_equals_one_by_one_whatever_the_padding():
    rng = np.random.default_rng(1)
    lengths = np.array([0, 1, 7, 3, 5])
    scores = rng.normal(size=(5, 7, 5)) * 3
    batch = decode_bio_batch(scores, lengths, TAGS)
    assert batch == [decode_bio(scores[n, :length], TAGS) for n, length in enumerate(lengths)]
    assert all(valid(tags) for tags in batch)
    scores[1, 1:] = 100.0  # behind the end
    assert decode_bio_batch(scores, lengths, TAGS) == batch


def test_decoding_reads_tags_in_any_order_and_takes_minus_infinity():
    names = ("O", "I-b", "B-a", "B-b", "I-a")
    scores = np.array([[0, -np.inf, 5, 0, 0], [0, -np.inf, -np.inf, 0, 9.0]])
    assert decode_bio(scores, names) == ["B-a", "I-a"]
    with pytest.raises(ValueError, match="NaN"):
        decode_bio(np.array([[np.nan] * 5]), TAGS)


def test_repair():
    assert repair_bio(["I-a", "I-a", "O", "B-a", "I-b", "I-b"]) == ["B-a", "I-a", "O", "B-a", "B-b", "I-b"]
    assert repair_bio(["O", "B-a", "I-a"]) == ["O", "B-a", "I-a"]


def test_spans_drop_what_strict_seqeval_drops():
    assert spans_from_tags(["B-a", "I-a", "B-a", "O", "I-b", "B-b", "I-a"]) == [("a", 0, 2), ("a", 2, 3), ("b", 5, 6)]


def test_own_counts_equal_strict_seqeval_on_any_tags():
    rng = np.random.default_rng(2)
    gold = [[TAGS[i] for i in rng.integers(0, 5, rng.integers(1, 9))] for _ in range(300)]
    near = [[tag if rng.random() < 0.7 else TAGS[rng.integers(5)] for tag in tags] for tags in gold]
    ours = f1([count_slots(a, b) for a, b in zip(gold, near)])
    assert 0.1 < ours < 0.9
    assert ours == pytest.approx(f1_score(gold, near, mode="strict", scheme=IOB2), abs=1e-12)


def test_prediction_outside_the_gold_slot_is_wrong_in_both_modes():
    # "what [datetime : is the weather today]" for a gold with the slot on "today" only, and for a gold without any.
    predicted = ["O", "B-datetime", "I-datetime", "I-datetime", "I-datetime"]
    for mode in ("strict", "massive"):
        assert count_slots(["O", "O", "O", "O", "B-datetime"], predicted, mode) == SlotCounts(0, 1, 0, 0)
        assert count_slots(["O"] * 5, predicted, mode) == SlotCounts(0, 0, 1, 0)


def test_alignment_by_hand():
    date, time, place = ("date", 0, 2), ("time", 3, 4), ("place", 5, 7)
    assert align([date, time, place], [date, time, place]) == (3, 0, 0, 0)
    assert align([date], []) == (0, 0, 0, 1)
    assert align([], [date]) == (0, 0, 1, 0)
    assert align([date], [("date", 4, 5)]) == (0, 1, 0, 0)  # same slot, other words
    assert align([date], [("time", 1, 3)]) == (0, 1, 0, 0)  # other slot, a word shared
    assert align([date], [("time", 2, 3)]) == (0, 0, 1, 1)  # neither
    # A correct span never serves as a substitute's partner.
    assert align([date, ("date", 4, 5)], [date]) == (1, 0, 0, 1)


def test_alignment_is_a_maximum_matching_not_a_greedy_one():
    # In order, gold a would take the overlapping x and leave gold x without a partner; both can be paired.
    gold, predicted = [("a", 0, 2), ("x", 4, 5)], [("x", 1, 2), ("a", 6, 7)]
    assert align(gold, predicted) == (0, 2, 0, 0)
    rng = np.random.default_rng(3)
    for _ in range(50):
        sides = []
        for _ in range(2):
            starts = np.sort(rng.choice(8, 3, replace=False))
            sides.append([("abc"[rng.integers(3)], int(s), int(s) + 1) for s in starts])
        left, right = ([s for s in side if s not in other] for side, other in (sides, sides[::-1]))
        pairs = max(
            sum(g[0] == p[0] or g[1] == p[1] for g, p in zip(left, order))
            for order in itertools.permutations([*right, *[("", -1, -1)] * 3], len(left))
        )
        assert align(*sides).substitutions == pairs


def test_massive_mode_merges_neighbors_of_one_slot():
    # As its code has it: one label a word, runs of one label are one span.
    assert merge_adjacent(["B-a", "B-a", "I-a", "O", "B-a", "B-b"]) == ["B-a", "I-a", "I-a", "O", "B-a", "B-b"]
    gold, predicted = ["B-a", "B-a", "O"], ["B-a", "I-a", "O"]
    assert count_slots(gold, predicted, "massive") == (1, 0, 0, 0)
    assert count_slots(gold, predicted, "strict") == (0, 1, 0, 1)


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [  # slot names a word, "" outside; F1 worked out by hand from the rule
        (["X", "X", "Z"], ["X", "X", "Y"], 0.5),
        (["X", "X", "Y", "", ""], ["X", "X", "Y", "", "Y"], 0.8),
        (["X", "X", "", "X", "X", "Y", "Z"], ["X", "X", "", "X", "X", "Z", "Y"], 0.5),
        (["X", "X", "X", "Y", "Y"], ["X", "X", "", "Y", "Y"], 0.5),
    ],
)
def test_massive_f1_by_hand(predicted, gold, expected):
    gold_tags, predicted_tags = (["B-" + slot if slot else "O" for slot in side] for side in (gold, predicted))
    assert f1([count_slots(gold_tags, predicted_tags, "massive")]) == pytest.approx(expected)


def test_bad_calls():
    with pytest.raises(ValueError, match="2 gold tags but 1"):
        count_slots(["O", "O"], ["O"])
    with pytest.raises(ValueError, match="strict, massive"):
        count_slots(["O"], ["O"], "lenient")
