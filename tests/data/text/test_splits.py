import json
import unicodedata
from collections import Counter

import numpy as np
import pytest

from kd_jax.config.data import Nlu, Prepare, Rows, Select, Source, TokenizerSettings
from kd_jax.data.text.splits import HeldOut, Splits, content_hash, normalize
from kd_jax.data.text.utterances import Utterance, read_massive


@pytest.fixture
def splits(tmp_path):
    """Two locales of two train and one test utterance, and generic text that holds one of the latter."""
    for locale, texts in (("de-DE", ("weck mich", "spiel jazz", "licht aus")), ("en-US", ("wake me", "stop", "Stop!"))):
        records = [
            {
                "id": str(i), "locale": locale, "partition": ("train", "train", "test")[i], "scenario": "alarm",
                "intent": "alarm_set", "utt": text, "annot_utt": text,
            }
            for i, text in enumerate(texts)
        ]  # fmt: skip
        (tmp_path / f"{locale}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "de.txt").write_text("\n".join(f"Satz Nummer {i}" for i in range(200)) + "\nLicht aus.\n")
    sources = {"web": Source("generic", "text", ("de",), path=str(tmp_path / "{language}.txt"))}
    settings = Prepare(Nlu(), sources, TokenizerSettings(), Rows(heldout_share=0.2), Select())
    return Splits(settings, read_massive(tmp_path, ("de-DE", "en-US")))


def test_train_texts_are_those_not_marked_as_held_out(splits):
    count = Counter()
    marked = list(splits.marked("web", "de", count))
    assert (len(marked), count["decontaminated"]) == (200, 1)
    assert list(splits.train("web", "de")) == [text for text, heldout in marked if not heldout]
    assert 0 < sum(heldout for _, heldout in marked) < 100


def test_task_text_is_the_train_partition_of_a_language_without_test_utterances(splits):
    assert splits.task("de") == splits.task("de-AT") == ["weck mich", "spiel jazz"]
    assert splits.task("en") == ["wake me"]
    assert splits.task("") == ["weck mich", "spiel jazz", "wake me"]
    assert splits.task("fr") == []


def test_the_hash_of_a_text_ignores_case_marks_and_spaces():
    plain = "Über die Brücke fährt die letzte Straßenbahn um zehn nach eins in die Stadt zurück, sagt man"
    same = [
        plain.upper(),
        plain.replace(" ", " ... "),
        "«" * 80 + plain,
        unicodedata.normalize("NFD", plain),
        plain.replace("ß", "ss") + "!",
    ]
    assert {content_hash(text) for text in same} == {content_hash(plain)}
    words = ["wake", "me", "up", "at", "nine", "play", "some", "jazz"]
    assert len({content_hash(f"{word} {plain}") for word in words}) == len(words)
    # For every cut, the head's letters are those of the whole text.
    for marks in range(70):
        assert content_hash("-" * marks + plain) == content_hash(plain)


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
    count = Counter()
    texts = ["Wake me up!", "Stop.", "don't stop", "Send E-Mail", "send e mail", "पाँच बजे।", "पच बज", "...", "stop"]
    assert list(held.filter(texts, count)) == ["Wake me up!", "don't stop", "पच बज", "..."]
    assert count == Counter(decontaminated=5)


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
    count = Counter()
    kept = list(HeldOut(utterances).filter(train, count))
    assert kept == [text for text in train if normalize(text).replace(" ", "") not in held]
    assert count["decontaminated"] == len(train) - len(kept) > 90
