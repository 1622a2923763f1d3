"""Normalization letter by letter, and the filter against comparing every pair in full."""

import unicodedata

import numpy as np
import pytest

from kd_jax.data.text.decontamination import FilterCount, HeldOut, normalize
from kd_jax.data.text.utterances import Utterance, read_massive


def utterance(text, partition, locale="en-US"):
    words = tuple(text.split())
    return Utterance("0", locale, partition, "alarm", "alarm_set", text, words, ("O",) * len(words))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Wake me up, at 5:30!", "wake me up at 530"),
        ("  it's \t a\u00a0test\n", "its a test"),
        ("STRASSE Straße", "strasse strasse"),
        ("e-mail — now…", "email now"),
        ("Ｆｕｌｌ ｗｉｄｔｈ １２ ﬁn", "full width 12 fin"),
        ("cafe\u0301 CAFÉ", "café café"),
        ("it\u00b4s 20\u00a0€ ♥\ufe0f", "its 20"),
        ('हिन्दी में, "पाँच" बजे।', "हिन्दी में पाँच बजे"),
        ("क\u094d\u200dष soft\u00adhyphen", "क\u094dष softhyphen"),
        ("a\tb\nc\u2003d", "a b c d"),
        ("\u03b9\u0308\u0301", "\u0390"),
        ("!?", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


def test_devanagari_keeps_its_marks():
    text = "कृपया मुझे जगाओ"
    marks = [character for character in text if unicodedata.category(character) in ("Mn", "Mc")]
    assert len(marks) > 4 and [one for one in normalize(text) if one in set(marks)] == marks


def test_normalize_is_idempotent_on_every_character():
    for start in range(0, 0x30000, 64):
        codes = [code for code in range(start, start + 64) if not 0xD800 <= code < 0xE000]
        once = normalize("a ".join(map(chr, codes)))
        assert normalize(once) == once, hex(start)


def test_held_out_is_dev_and_test_of_all_locales():
    held = HeldOut(
        [
            utterance("wake me up", "train"),
            utterance("stop", "dev"),
            utterance("send e-mail", "test"),
            utterance("पाँच बजे", "test", "hi-IN"),
            utterance("?!", "dev"),
        ]
    )
    count = FilterCount()
    texts = ["Wake me up!", "Stop.", "don't stop", "Send E-Mail", "send e mail", "पाँच बजे।", "पच बज", "...", "stop"]
    assert list(held.filter(texts, count)) == ["Wake me up!", "don't stop", "पच बज", "..."]
    assert count == FilterCount(kept=4, removed=5)


def test_prefixes_decide_as_whole_texts_do():
    rng = np.random.default_rng(0)
    # Letters, marks that compose or reorder, marks that go, wide characters, spaces, and Korean that composes.
    alphabet = [*"abcAB  .,-'éßİａ각", "\u0301", "\u0323", "\u200d", "\u1100", "\u1161", "\u11a8"]
    held_texts = ["".join(rng.choice(alphabet, size=size)) for size in rng.integers(1, 90, size=400)]
    held = HeldOut(utterance(text, "test") for text in held_texts)
    keys = {normalize(text).replace(" ", "") for text in held_texts} - {""}
    noise = ["".join(rng.choice(alphabet, size=size)) for size in rng.integers(1, 90, size=400)]
    same = [".".join(text).upper() for text in held_texts] + [" " * 40 + text for text in held_texts]
    # Held-out texts that a short head shares, and marks alone for longer than the head.
    near = [text[:40] + "x" + text[40:] for text in held_texts] + ["a" + "\u0301" * 60 + "\u0323"]
    for text in held_texts + noise + same + near:
        assert (text in held) == (normalize(text).replace(" ", "") in keys), ascii(text)
    assert sum(text in held for text in noise + near) < 100 < sum(text in held for text in same)


def test_marks_that_reorder_across_the_head():
    # The held-out text's first twelve characters change when the mark at its end moves to the front of the others.
    marks = "a" + "\u0301" * (HeldOut.HEAD + 8) + "\u0323"
    held = HeldOut([utterance(marks, "test")])
    assert marks in held and unicodedata.normalize("NFKC", marks)[:2] != marks[:2]


def test_real_train_partition(data_dir):
    utterances = read_massive(data_dir / "nlu" / "massive", ["de-DE"])
    held = {normalize(one.text).replace(" ", "") for one in utterances if one.partition != "train"}
    train = [one.text for one in utterances if one.partition == "train"]
    count = FilterCount()
    kept = list(HeldOut(utterances).filter(train, count))
    assert kept == [text for text in train if normalize(text).replace(" ", "") not in held]
    assert (count.kept, count.removed) == (len(kept), len(train) - len(kept)) and count.removed > 90
