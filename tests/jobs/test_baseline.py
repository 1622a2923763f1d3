"""Each baseline against direct use of the library, and on incomplete data."""

import dataclasses
import types

import numpy as np
import pycrfsuite
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline, make_union

from kd_jax.config import base
from kd_jax.config.commands import Baseline
from kd_jax.config.execution import Mesh
from kd_jax.config.training import Finetune
from kd_jax.data.text.tokenizer import train_tokenizer
from kd_jax.data.text.utterances import Utterance
from kd_jax.evaluation.results import results
from kd_jax.evaluation.significance import error_counts
from kd_jax.evaluation.slots import count_slots
from kd_jax.jobs import baseline, finetune
from kd_jax.jobs.baseline import Labeled
from kd_jax.jobs.states import mean_states
from kd_jax.main import baseline as command
from kd_jax.models.encoder_config import PRESETS, encoder_config
from kd_jax.models.functional import Functional
from kd_jax.runtime.files import write_json_lines
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError
from tests.support.finished_runs import random_params

THINGS = {"alarm": ("wecker", "alarm", "uhr"), "light": ("licht", "lampe", "light"), "music": ("lied", "song", "radio")}
VERBS = {"set": ("stelle", "mach", "set"), "stop": ("stoppe", "aus mit", "stop"), "ask": ("zeig", "wo ist", "show")}
PLACES = ("küche", "bad", "kitchen", "garten", "keller")
IDENTITY = {"student": "ngrams", "transfer_set": "", "teacher": "", "seed": None}


def utterances(count: int, partition: str, seed: int, locale: str = "de-DE") -> list[Utterance]:
    """Sentences with a thing, a verb and sometimes a place; one in ten has a wrong domain and intent."""
    rng, found = np.random.default_rng(seed), []
    for number in range(count):
        domain, verb = rng.choice(list(THINGS)), rng.choice(list(VERBS))
        words = [*rng.choice(VERBS[verb]).split(), rng.choice(THINGS[domain])]
        tags = ["O"] * len(words)
        if rng.random() < 0.6:
            words += ["in", "der", rng.choice(PLACES)]
            tags += ["O", "B-place", "I-place"]
        if rng.random() < 0.1:
            domain, verb = rng.choice(list(THINGS)), rng.choice(list(VERBS))
        place = (f"{partition}{number}", locale, partition, str(domain), f"{domain}_{verb}")
        found.append(Utterance(*place, " ".join(words), tuple(map(str, words)), tuple(tags)))
    return found


@pytest.fixture(scope="module")
def data() -> Labeled:
    return Labeled(utterances(120, "train", 0), utterances(60, "dev", 1), utterances(80, "test", 2))


def fitted(task: str, data: Labeled, **changes) -> baseline.Fitted:
    return baseline.fit(task, data, baseline.ngrams(data.train), Baseline(**changes))


def texts(part: list[Utterance]) -> list[str]:
    return [one.text for one in part]


@pytest.mark.parametrize("task, field", [("dc", "domain"), ("icner", "intent")])
def test_ngrams_predict_what_scikit_learn_predicts(data, task, field):
    def gold(part):
        return [getattr(one, field) for one in part]

    scores, predicted = [], []
    for c in (0.01, 1.0, 10.0):
        words = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+")
        characters = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5))
        model = make_pipeline(make_union(words, characters), LogisticRegression(C=c, max_iter=1000))
        model.fit(texts(data.train), gold(data.train))
        scores.append(float(np.mean(model.predict(texts(data.dev)) == np.array(gold(data.dev)))))
        predicted.append(model.predict(texts(data.test)).tolist())
    assert len({tuple(one) for one in predicted}) > 1, "C decides nothing here"
    found = fitted(task, data, c_values=(0.01, 1.0, 10.0))
    tried = [trial for trial in found.trials if trial.part == field]
    assert [trial.dev_score for trial in tried] == scores
    best = int(np.argmax(scores))
    assert [trial.chosen for trial in tried] == [number == best for number in range(3)]
    records = found.records(data.test, data.train)
    name = "predicted_domain" if task == "dc" else "predicted_intent"
    assert [record[name] for record in records] == predicted[best]


def test_slots_are_those_of_crfsuite_with_the_same_penalty(data, tmp_path):
    found = fitted("icner", data, c_values=(0.1, 5.0))
    (c,) = (trial.c for trial in found.trials if trial.part == "slots" and trial.chosen)
    trainer = pycrfsuite.Trainer(algorithm="lbfgs", verbose=False, params={"c1": 0.0, "c2": 1 / (2 * c)})
    trainer.set_params({"max_iterations": baseline.CRF_ITERATIONS})
    for one in data.train:
        trainer.append(baseline.word_features(one.words), one.tags)
    trainer.train(str(tmp_path / "model"))
    tagger = pycrfsuite.Tagger()
    tagger.open(str(tmp_path / "model"))
    records = found.records(data.test, data.train)
    for record in records:
        assert record["predicted_tags"] == tagger.tag(baseline.word_features(record["words"]))
    wrong = sum(sum(count_slots(record["gold_tags"], record["predicted_tags"])[1:]) for record in records)
    assert wrong == 0, "a place always follows the same words"


def test_features_of_a_word():
    first, second = baseline.word_features(("Um", "7:30Uhr"))
    assert first == [
        "word=um",
        "shape=Xx",
        "-1=<s>",
        "+1=7:30uhr",
        "-2=<s>",
        "+2=</s>",
        "-1,0=<s> um",
        "0,+1=um 7:30uhr",
    ]
    ends = ["begin=7:", "end=hr", "begin=7:3", "end=uhr", "begin=7:30", "end=0uhr"]
    around = ["-1=um", "+1=</s>", "-2=<s>", "+2=</s>", "-1,0=um 7:30uhr", "0,+1=7:30uhr </s>"]
    assert second == ["word=7:30uhr", "shape=0:00Xxx", *ends, *around]


def test_the_probe_reads_the_mean_state_of_each_utterance_alone(data):
    tokenizer = train_tokenizer(texts(data.train), 200)
    shape = encoder_config({**PRESETS["tiny"], "num_layers": 1, "hidden_size": 16}, tokenizer.vocab_size)
    model = Functional("mlm", shape)
    params = random_params(model)
    folder = types.SimpleNamespace(
        tokenizer=tokenizer, settings=types.SimpleNamespace(rows=types.SimpleNamespace(length=32))
    )
    states = mean_states(model, params, folder, data.dev, make_mesh(Mesh()))
    assert states.shape == (60, 16) and states.dtype == np.float32
    for number in (0, 7, 59):
        ids, _ = tokenizer.encode_words([data.dev[number].words], [False])[0]
        alone = np.full((1, 32), tokenizer.pad_id, np.int32)
        alone[0, : len(ids) + 2] = [tokenizer.cls_id, *ids, tokenizer.sep_id]
        segments = (np.arange(32) < len(ids) + 2)[None].astype(np.int32)
        batch = {"tokens": alone, "segment_ids": segments, "positions": np.arange(32, dtype=np.int32)[None]}
        hidden = np.asarray(model.hidden(params, batch))[0, : len(ids) + 2]
        np.testing.assert_allclose(states[number], hidden.mean(axis=0), rtol=1e-4, atol=1e-5)


def test_the_probe_predicts_what_scikit_learn_predicts_and_no_slots(data):
    rng = np.random.default_rng(0)
    names = sorted({one.intent for one in data.train})
    centers = rng.normal(size=(len(names), 8))
    everyone = [*data.train, *data.dev, *data.test]
    rows = {id(one): centers[names.index(one.intent)] + rng.normal(size=8) for one in everyone}

    def features(part):
        return np.stack([rows[id(one)] for one in part])

    found = baseline.fit("icner", data, features, Baseline(features="teacher", c_values=(1e-4, 1.0)))
    model = LogisticRegression(C=1.0, max_iter=1000).fit(features(data.train), [one.intent for one in data.train])
    assert [trial.part for trial in found.trials] == ["intent", "intent"] and found.trials[1].chosen
    records = found.records(data.test, data.train)
    assert [record["predicted_intent"] for record in records] == model.predict(features(data.test)).tolist()
    rows_of = {row["metric"]: row for row in results(records, identity=IDENTITY) if row["scope"] == "all"}
    assert rows_of["intent_error_rate"]["value"] is not None
    for metric in ("slot_f1", "slot_error_rate", "exact_match", "exact_match_error_rate", "semer"):
        assert (rows_of[metric]["value"], rows_of[metric]["count"]) == (None, 0)
        assert error_counts({None: records}, metric, test_set="test") is None
    assert error_counts({None: records}, "intent_error_rate", test_set="test").seeds == (None,)
    assert {
        row["value"] for row in results(records, identity=IDENTITY, mode="massive") if "exact" in row["metric"]
    } == {None}
    scores = baseline.scores(records, "icner")
    assert scores["score"] == scores["intent_accuracy"] and "slot_f1" not in scores


def test_without_a_dev_partition_c_is_fixed_and_reported(data):
    found = fitted("icner", data._replace(dev=[]), c_without_dev=3.0)
    assert [(trial.part, trial.c, trial.dev_score) for trial in found.trials] == [
        ("intent", 3.0, None),
        ("slots", 3.0, None),
    ]
    assert found.notes == ["there is no dev partition, so C was fixed at 3"]
    assert len(found.records(data.test, data.train)) == len(data.test)
    assert found.records([], data.train) == [] and baseline.scores([], "icner")["score"] is None


def test_one_class_is_predicted_for_every_utterance(data):
    plain = [dataclasses.replace(one, intent="only", tags=("O",) * len(one.words)) for one in data.train]
    found = fitted("icner", data._replace(train=plain))
    assert {record["predicted_intent"] for record in found.records(data.test, plain)} == {"only"}
    assert {tag for record in found.records(data.test, plain) for tag in record["predicted_tags"]} == {"O"}
    assert found.notes == [
        "all labels are 'only', which is predicted for every utterance",
        "no label has a slot, so none is predicted",
    ]


def test_a_label_that_only_test_has_is_an_error(data):
    odd = [dataclasses.replace(one, domain="new", tags=("B-new",) * len(one.words)) for one in data.test[:10]]
    for task, wrong in (("dc", "error_rate"), ("icner", "exact_match_error_rate")):
        records = fitted(task, data).records(odd, data.train)
        rows = results(records, identity=IDENTITY)
        assert {row["value"] for row in rows if row["metric"] == wrong} == {1.0}


def test_twenty_labels_and_a_locale_without_any(data):
    few = Labeled(data.train[:20], data.dev, [*data.test, *utterances(30, "test", 3, locale="fr-FR")])
    for task in ("dc", "icner"):
        records = fitted(task, few).records(few.test, few.train)
        rows = results(records, identity=IDENTITY)
        assert {row["locale"] for row in rows} == {"all", "de-DE", "fr-FR"}
        assert all(0 <= row["value"] <= 1 for row in rows if row["value"] is not None)
        accuracy = "accuracy" if task == "dc" else "intent_accuracy"
        assert min(row["value"] for row in rows if row["metric"] == accuracy and row["locale"] == "de-DE") >= 0


def in_memory(*parts: list[Utterance]):
    return types.SimpleNamespace(utterances=[one for part in parts for one in part])


def test_nothing_to_train_or_to_test_on_is_the_users_mistake(data):
    with pytest.raises(UserError, match=r"config\.nlu: there is no utterance to train on"):
        baseline.labeled(in_memory(data.dev, data.test), Baseline(max_train=0, max_dev=0), "dc")
    with pytest.raises(UserError, match=r"config\.nlu: there is no utterance to test on"):
        baseline.labeled(in_memory(data.train, data.dev), Baseline(max_train=0, max_dev=0), "dc")


def test_predicted_labels_are_added_to_the_given_ones(data, tmp_path):
    prepared = in_memory(data.train, data.dev, data.test)
    rest = finetune.unlabeled_train(prepared, 30)
    given = finetune.labeled_train(prepared, 30, "")
    assert len(given) == 30 and len(rest) == 90 and not {one.id for one in given} & {one.id for one in rest}
    teacher = fitted("icner", data._replace(train=given))
    write_json_lines(tmp_path / "records.jsonl", teacher.records(rest, given))
    settings = Finetune(max_train=30, labels=str(tmp_path))
    found = finetune.predicted_labels(prepared, settings, "icner", "finetune")
    assert [(one.id, one.text) for one in found] == [(one.id, one.text) for one in rest]
    assert [one.intent for one in found] == [record["predicted_intent"] for record in teacher.records(rest, given)]
    assert any(one.intent != gold.intent for one, gold in zip(found, rest)), "these are predictions"
    both = baseline.labeled(prepared, Baseline(max_train=30, max_dev=0, labels=str(tmp_path)), "icner")
    assert both.train == [*given, *found]

    with pytest.raises(UserError, match=r"config\.finetune\.labels: .* has predictions of icner, not of dc"):
        finetune.predicted_labels(prepared, settings, "dc", "finetune")
    with pytest.raises(UserError, match=r"labels \d+ utterances that have labels already"):
        finetune.predicted_labels(prepared, Finetune(max_train=60, labels=str(tmp_path)), "icner", "finetune")
    with pytest.raises(UserError, match=r"config\.baseline\.labels: .*nowhere.* does not exist"):
        baseline.labeled(prepared, Baseline(max_train=30, labels=str(tmp_path / "nowhere")), "icner")
    with pytest.raises(UserError, match=r"config\.finetune\.labels: .*domain"):
        finetune.read(Finetune, {**dataclasses.asdict(settings), "domain": "each"}, "finetune")


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("features", "bert", "'bert' is unknown"),
        ("c_values", (), "it is empty"),
        ("c_values", (0.0,), "0.0 is not positive"),
        ("tasks", ("dc", "ner"), "'ner' is unknown"),
        ("max_train", -2, "-2 is negative"),
    ],
)
def test_impossible_settings_are_named(tmp_path, key, value, message):
    config = base.get_config()
    config.baseline[key] = value
    with pytest.raises(UserError, match=rf"config\.baseline\.{key}: {message}"):
        command.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
