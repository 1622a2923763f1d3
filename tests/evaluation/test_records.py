import json

import pytest

from kd_jax.data.text.utterances import Utterance, read_massive
from kd_jax.evaluation.records import assign_test_sets, domain_record, intent_slot_record, read_records
from kd_jax.runtime.files import write_json_lines
from kd_jax.types import UserError


def utterance(text, tags="", partition="test", locale="en-US", id="1"):
    words = tuple(text.split())
    return Utterance(
        id=id,
        locale=locale,
        partition=partition,
        domain="alarm",
        intent="alarm_set",
        text=text,
        words=words,
        tags=tuple(tags.split()) if tags else ("O",) * len(words),
    )


def test_test_sets_by_locale():
    train = [
        utterance("wake me up", partition="train"),
        utterance("set an alarm", partition="train"),
        utterance("guten Morgen", partition="train", locale="de-DE"),
    ]
    cases = {
        "wake me up": ["test"],
        "WAKE me UP": ["test"],  # the same text once normalized, no word unseen
        "wakeme up!": ["test", "tail"],  # spaces and punctuation aside, as in decontamination; a new word all the same
        "wake an alarm": ["test", "test_unseen"],
        "wake me tomorrow": ["test", "test_unseen", "tail"],
        "guten morgen": ["test", "test_unseen", "tail"],  # seen in another locale only
    }
    assert assign_test_sets([utterance(text) for text in cases], train) == list(cases.values())
    assert assign_test_sets([utterance("never seen", partition="dev")], train) == [["dev"]]


def test_intent_slot_record_by_hand():
    gold = utterance("wake me at five on monday", "O O O B-time O B-date")
    predicted = ["B-date", "O", "O", "B-time", "O", "O"]
    record = intent_slot_record(gold, ["test"], "alarm_set", predicted)
    # time is right; the predicted date stands for the gold one (same slot, other words).
    counts = {name: record[name] for name in ("gold_slots", "correct", "substitutions", "insertions", "deletions")}
    assert counts == {"gold_slots": 2, "correct": 1, "substitutions": 1, "insertions": 0, "deletions": 0}
    assert record["exact"] is False
    assert intent_slot_record(gold, [], "alarm_set", gold.tags)["exact"] is True
    assert intent_slot_record(gold, [], "alarm_query", gold.tags)["exact"] is False
    spurious = intent_slot_record(utterance("hello"), [], "alarm_set", ["B-time"])
    assert (spurious["insertions"], spurious["exact"]) == (1, False)
    with pytest.raises(ValueError, match="6 gold tags but 1"):
        intent_slot_record(gold, ["test"], "alarm_set", ["O"])


def test_records_survive_the_file(tmp_path):
    path = tmp_path / "records.jsonl"
    rows = [
        domain_record(utterance("réveille-moi", locale="fr-FR"), ["test", "tail"], "iot"),
        intent_slot_record(utterance("wake me at five", "O O O B-time"), ["test"], "alarm_set", ["O"] * 4),
    ]
    write_json_lines(path, rows)
    assert read_records(path) == rows
    assert [item.name for item in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "records.jsonl"
    write_json_lines(path, [domain_record(utterance("hello"), ["test"], "iot")])
    before = path.read_bytes()

    def broken():
        yield domain_record(utterance("hello"), ["test"], "iot")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_json_lines(path, broken())
    with pytest.raises(ValueError):
        write_json_lines(path, [{"value": float("nan")}])
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["records.jsonl"]
    with pytest.raises(UserError, match="cannot be written"):
        write_json_lines(tmp_path / "missing" / "records.jsonl", [])


def test_errors_name_file_and_line(tmp_path):
    path = tmp_path / "records.jsonl"
    good = domain_record(utterance("hello"), ["test"], "iot")
    bad = {name: value for name, value in good.items() if name != "predicted_domain"}
    for second, problem in (
        ("{", "broken JSON"),
        ("[1]", "holds a JSON list"),
        (json.dumps(bad), "'predicted_domain' is missing"),
        (json.dumps({**good, "task": "ner"}), "task is 'ner'"),
    ):
        path.write_text(json.dumps(good) + "\n" + second + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=rf"records\.jsonl:2: .*{problem}"):
            read_records(path)
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"records\.jsonl:1: broken JSON .*byte 0xff"):
        read_records(path)
    with pytest.raises(UserError, match="No such file"):
        read_records(tmp_path / "absent.jsonl")


def test_test_unseen_against_the_published_overlap_lists(data_dir):
    folder = data_dir / "nlu" / "massive"
    utterances = read_massive(folder, ["de-DE", "en-US"])
    test = [item for item in utterances if item.partition == "test"]
    sets = assign_test_sets(test, [item for item in utterances if item.partition == "train"])
    lists = json.loads((folder / "overlap_with_train.json").read_text(encoding="utf-8"))
    for locale, extra in (("de-DE", 4), ("en-US", 11)):  # extra: equal once normalized, and without spaces
        seen = {item.id for item, names in zip(test, sets) if item.locale == locale and "test_unseen" not in names}
        assert set(lists[locale]["test"]) <= seen and len(seen) == len(lists[locale]["test"]) + extra
