import numpy as np
import pytest
from seqeval.metrics import f1_score as seqeval_f1
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score

from kd_jax.evaluation.results import macro_f1, results
from kd_jax.evaluation.slots import count_slots, merge_adjacent, repair_bio

IDENTITY = {"student": "s", "transfer_set": "task", "teacher": "generic", "seed": 0}


def icner(gold, predicted, *, intent="i", guess="i", locale="en-US", domain="alarm", test_sets=("test",), id="1"):
    gold, predicted = gold.split(), predicted.split()
    counts = count_slots(gold, predicted)
    record = {"id": id, "locale": locale, "domain": domain, "intent": intent, "partition": "test", "task": "icner"}
    record |= {"test_sets": list(test_sets), "words": gold, "gold_tags": gold, "predicted_tags": predicted}
    record |= {"predicted_intent": guess, "gold_slots": counts.correct + counts.substitutions + counts.deletions}
    return {**record, **counts._asdict(), "exact": intent == guess and sum(counts) == counts.correct}


def dc(domain, guess, locale="en-US", test_sets=("test",)):
    place = {"id": "1", "locale": locale, "domain": domain, "intent": "i", "partition": "test", "task": "dc"}
    return {**place, "test_sets": list(test_sets), "words": ["w"], "predicted_domain": guess}


def table(rows, **place):
    place = {"scope": "all", "test_set": "test", **place}
    chosen = [row for row in rows if all(row[key] == value for key, value in place.items())]
    return {row["metric"]: (row["value"], row["count"]) for row in chosen}


def test_icner_by_hand():
    records = [
        icner("B-a I-a O", "B-a I-a O"),  # all right
        icner("B-a I-a O B-b", "B-a O O B-b", guess="j"),  # one right, one substituted, wrong intent
        icner("O O", "B-a O"),  # one inserted
        icner("O O B-b", "O O O"),  # one deleted
    ]
    got = table(results(records, identity=IDENTITY))
    assert got["intent_accuracy"] == (0.75, 4) and got["intent_error_rate"] == (0.25, 4)
    # 4 gold spans, 4 predicted, 2 correct; SemER (1 + 1 + 1 + 1 wrong intent) / (4 + 4)
    assert got["slot_f1"] == (0.5, 8) and got["slot_error_rate"] == (0.5, 8)
    assert got["exact_match"] == (0.25, 4) and got["exact_match_error_rate"] == (0.75, 4)
    assert got["semer"] == (0.5, 8)
    assert set(got) == {
        *("intent_accuracy", "intent_error_rate", "slot_f1", "slot_error_rate"),
        *("exact_match", "exact_match_error_rate", "semer"),
    }


def test_scopes_and_test_sets():
    records = [
        icner("O", "O", locale="en-US", domain="alarm", test_sets=("test", "tail")),
        icner("O", "O", locale="en-US", domain="music", guess="j"),
        icner("O", "O", locale="de-DE", domain="music"),
    ]
    rows = results(records, identity=IDENTITY)

    def intent(**place):
        return table(rows, **place)["intent_accuracy"]

    assert intent() == (pytest.approx(2 / 3), 3)
    assert intent(scope="locale", locale="en-US", domain="all") == (0.5, 2)
    assert intent(scope="domain", locale="all", domain="music") == (0.5, 2)
    assert intent(scope="locale_domain", locale="de-DE", domain="music") == (1.0, 1)
    assert intent(test_set="tail") == (1.0, 1)
    # No slot in gold or prediction: undefined, and null in the file.
    assert table(rows)["slot_f1"] == (None, 0) and table(rows)["slot_error_rate"] == (None, 0)
    assert {row["scope"] for row in rows} == {"all", "locale", "domain", "locale_domain"}
    keys = {*IDENTITY, "task", "scope", "locale", "domain", "test_set", "metric", "value", "count"}
    assert all(row.keys() == keys for row in rows)
    assert results([], identity=IDENTITY) == []


def test_dc_against_scikit_learn():
    rng = np.random.default_rng(0)
    records = [
        dc(f"d{a}", f"d{a if rng.random() < 0.7 else rng.integers(5)}", locale=("en-US", "de-DE")[a % 2])
        for a in rng.integers(0, 5, 100)
    ]
    rows = results(records, identity=IDENTITY)
    for scope, locale in (("all", "all"), ("locale", "de-DE")):
        inside = [record for record in records if locale in ("all", record["locale"])]
        gold, guess = ([record[name] for record in inside] for name in ("domain", "predicted_domain"))
        got = table(rows, scope=scope, locale=locale)
        assert got["accuracy"] == (pytest.approx(accuracy_score(gold, guess)), len(inside))
        assert got["error_rate"][0] == pytest.approx(1 - accuracy_score(gold, guess))
        assert got["macro_f1"] == (pytest.approx(f1_score(gold, guess, average="macro")), len(inside))
    assert table(rows, scope="domain", domain="d1")["macro_f1"] == (None, 0)


def random_records(number):
    rng = np.random.default_rng(1)
    tags = ("O", "B-a", "I-a", "B-b", "I-b")
    records = []
    for _ in range(number):
        gold = repair_bio([tags[i] for i in rng.integers(0, 5, 6)])
        predicted = repair_bio([tag if rng.random() < 0.8 else tags[rng.integers(5)] for tag in gold])
        records.append(icner(" ".join(gold), " ".join(predicted), guess="ij"[rng.random() < 0.2]))
    return records


def test_slot_f1_equals_seqeval_in_both_modes():
    records = random_records(200)
    got = table(results(records, identity=IDENTITY, mode="massive"))
    gold, predicted = ([record[name] for record in records] for name in ("gold_tags", "predicted_tags"))
    assert got["slot_f1"][0] == pytest.approx(seqeval_f1(gold, predicted, mode="strict", scheme=IOB2))
    merged = [[merge_adjacent(tags) for tags in side] for side in (gold, predicted)]
    assert got["massive_slot_f1"][0] == pytest.approx(
        seqeval_f1(*merged)
    )  # seqeval's default mode, as MASSIVE calls it
    exact = np.mean([a == b and r["predicted_intent"] == "i" for a, b, r in zip(*merged, records)])
    assert got["massive_exact_match"][0] == pytest.approx(exact)
    assert got["massive_intent_accuracy"] == got["intent_accuracy"]
    assert got["massive_slot_f1"] != got["slot_f1"]


def test_bad_calls():
    record = icner("B-a", "B-a")
    with pytest.raises(ValueError, match="seqeval gives 1"):
        results([{**record, "correct": 0, "deletions": 1}], identity=IDENTITY)
    with pytest.raises(ValueError, match="several tasks"):
        results([record, dc("a", "a")], identity=IDENTITY)
    with pytest.raises(ValueError, match="exactly student"):
        results([record], identity={"student": "s"})
    with pytest.raises(ValueError, match="strict, massive"):
        results([record], identity=IDENTITY, mode="lenient")


def test_macro_f1_against_scikit_learn():
    rng = np.random.default_rng(0)
    gold = [f"d{i}" for i in rng.integers(0, 6, 200)]
    predicted = [g if rng.random() < 0.6 else f"d{rng.integers(0, 8)}" for g in gold]
    assert macro_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, average="macro"), abs=1e-12)


def test_macro_f1_of_a_label_unseen_in_train_and_of_nothing():
    # The model can only answer "a" or "b".
    assert macro_f1(["a", "b", "new", "a"], ["a", "b", "b", "a"]) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert macro_f1([], []) is None
    with pytest.raises(ValueError):
        macro_f1(["a", "b"], ["a"])
