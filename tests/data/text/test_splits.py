import json
import unicodedata

import pytest
from ml_collections import ConfigDict

from kd_jax.data.text.decontamination import FilterCount
from kd_jax.data.text.splits import Splits, content_hash
from kd_jax.data.text.utterances import read_massive


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
    config = ConfigDict({"sources": {}, "rows": {"heldout_share": 0.2}})
    config.sources.web = {
        "kind": "generic", "format": "text", "path": str(tmp_path / "{language}.txt"), "spoken_share": 0.0,
        "max_texts": 0,
    }  # fmt: skip
    return Splits(config, read_massive(tmp_path, ("de-DE", "en-US")))


def test_train_texts_are_those_not_marked_as_held_out(splits):
    count = FilterCount()
    marked = list(splits.marked("web", "de", count))
    assert (count.kept, count.removed) == (200, 1)
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
