from types import SimpleNamespace

import numpy as np

from kd_jax.evaluation.predictions import decode_rows

TAGS = ("O", "B-time", "I-time")


def labeled(locale, words, word_of_piece):
    """One utterance whose pieces belong to the given words, as LabeledSet lays it out."""
    words_array = np.array(word_of_piece)
    starts = np.ones(len(words_array), bool)
    starts[1:] = words_array[1:] != words_array[:-1]
    return SimpleNamespace(
        utterances=[SimpleNamespace(words=tuple(words), characters=locale == "ja-JP")],
        offsets=np.array([0, len(words_array)]),
        words=words_array,
        word_starts=starts,
    )


def row_scores(length, best):
    """Scores [1, L, T] that prefer tag best[column] there, and "I-time" wherever nothing is said."""
    scores = np.zeros((1, length, len(TAGS)), np.float32)
    scores[0, :, 2] = 9.0
    for column, tag in best.items():
        scores[0, column] = 0.0
        scores[0, column, TAGS.index(tag)] = 5.0
    return scores


def decoded(one, scores, first):
    return decode_rows(one, np.array([0]), scores, np.array([first]), TAGS)[0]


def test_only_the_first_piece_of_a_word_is_read_at_its_column():
    one = labeled("de-DE", ["weck", "mich", "um", "sieben"], [0, 1, 1, 2, 3, 3])
    # The utterance starts in column 10, so its pieces are in columns 11 to 16; columns 13 and 16 are later sub-words.
    scores = row_scores(20, {11: "O", 12: "O", 14: "O", 15: "B-time"})
    assert decoded(one, scores, 10) == ["O", "O", "O", "B-time"]


def test_word_without_a_piece_is_outside_and_leaves_valid_tags():
    one = labeled("de-DE", ["um", "\u200b", "sieben"], [0, 2])
    scores = row_scores(8, {1: "B-time", 2: "I-time"})
    assert decoded(one, scores, 0) == ["B-time", "O", "B-time"]


def test_a_character_goes_on_with_the_slot_of_the_piece_it_shares():
    one = labeled("ja-JP", ["明", "日", "に"], [0, 2])
    assert decoded(one, row_scores(8, {1: "B-time", 2: "O"}), 0) == ["B-time", "I-time", "O"]
    assert decoded(one, row_scores(8, {1: "O", 2: "B-time"}), 0) == ["O", "O", "B-time"]


def test_utterance_without_any_piece_is_all_outside():
    one = labeled("de-DE", ["\u200b"], [])
    assert decoded(one, row_scores(4, {}), 0) == ["O"]


def test_rows_without_an_utterance_have_no_tags():
    """The part of a batch that a process of several reads may be empty."""
    one = labeled("de-DE", ["weck"], [0])
    assert decode_rows(one, np.zeros(0, np.int32), np.zeros((0, 4, 3), np.float32), np.zeros(0, np.int32), TAGS) == []
