"""Case and punctuation of labeled text are measured, and other text is normalized to them word by word."""

import pytest

from kd_jax.data.text.text_form import TextForm, bare
from kd_jax.data.text.utterances import Utterance, split_words


def utterances(*texts, characters=False):
    return [
        Utterance(
            str(number),
            "en-US",
            "train",
            "d",
            "i",
            text,
            (words := tuple(split_words(text, characters))),
            ("O",) * len(words),
            characters,
        )
        for number, text in enumerate(texts)
    ]


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (["wake me up at seven", "it's eight a.m. o'clock", "channel b. & c", "dis-moi"], TextForm(True, "absent")),
        (["wake me up , please", "hello !"], TextForm(True, "apart")),
        (["wake me up, please", "hello"], TextForm(True, "attached")),
        (["wake me up, please", "hello !"], TextForm(True, "attached")),
        (["Wake me", "Hello"], TextForm(False, "absent")),
        ([], TextForm()),
    ],
)
def test_form_of_utterances(texts, form):
    assert TextForm.of(utterances(*texts)) == form


def test_one_percent_may_differ():
    for slips, form in ((1, TextForm(True, "absent")), (2, TextForm(False, "attached"))):
        texts = ["wake me"] * (100 - slips) + ["Wake me!"] * slips
        assert TextForm.of(utterances(*texts)) == form


def test_characters_are_words():
    assert TextForm.of(utterances("七点,叫我。", characters=True)).punctuation == "apart"
    assert TextForm(True, "absent").words("七点, A。", characters=True) == (["七", "点", "a"], [0, 1, None, 2, None])


@pytest.mark.parametrize(
    ("punctuation", "words", "places"),
    [
        ("attached", ["¿wake", "me,", "b.", "at", "7", "p.m.?", "-", "!!"], [0, 1, 2, 3, 4, 5, 6, 7]),
        ("absent", ["wake", "me", "b.", "at", "7", "p.m.", "-"], [0, 1, 2, 3, 4, 5, 6, None]),
        ("apart", ["¿", "wake", "me", ",", "b.", "at", "7", "p.m.", "?", "-", "!!"], [1, 2, 4, 5, 6, 7, 9, 10]),
    ],
)
def test_words_that_are_read(punctuation, words, places):
    text = "¿Wake me, b. at 7 P.M.? - !!"
    assert TextForm(True, punctuation).words(text) == (words, places)
    found, _ = TextForm(False, punctuation).words(text)
    assert [word.lower() for word in found] == words and found != words


def test_a_text_of_punctuation_alone_is_left():
    assert TextForm(True, "absent").words("?! ...") == (["?!", "..."], [0, 1])
    assert TextForm(True, "absent").words("") == ([], [])


def test_bare():
    assert bare('"at seven, or eight"!') == "at seven, or eight"
    assert bare("?!") == "?!"
    assert bare("7 p.m.") == "7 p.m."
