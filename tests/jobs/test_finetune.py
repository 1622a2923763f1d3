"""One ICNER model for each domain: routed by the gold domain, one compilation, nothing lost in evaluation."""

import json
import shutil
import types
from typing import Any

import numpy as np
import pytest

from kd_jax.config.data import CHARACTER_LOCALES
from kd_jax.config.training import Finetune
from kd_jax.data.text.utterances import Utterance
from kd_jax.evaluation.records import read_records
from kd_jax.jobs import finetune, serving
from kd_jax.jobs.job import compiled_step
from kd_jax.main import evaluate, finetune_icner, prepare
from kd_jax.runtime.paths import file_name
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError
from tests.support import pretrained
from tests.support.finished_runs import smoke_config


def test_class_masks_leave_only_real_classes():
    masks = finetune.class_masks({"intents": 2, "tags": 3}, {"intents": 4, "tags": 3})
    assert masks["utterance_classes"].tolist() == [0.0, 0.0, -np.inf, -np.inf]
    assert masks["tag_classes"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("label_smoothing", 1.0),
        ("dropout", -0.1),
        ("epochs", -1),
        ("max_train", -5),
        ("max_dev", -1),
        ("patience", -2),
        ("encoder_rate", 0.0),
        ("encoder_rate", 1.5),
        ("pooling", "sum"),
    ],
)
def test_impossible_settings_are_named(tmp_path, key, value):
    config = pretrained.get_config()
    config.finetune[key] = value
    with pytest.raises(UserError, match=rf"config\.finetune\.{key}: {value!r}"):
        finetune.run(config, tmp_path / "run", "dc")
    assert not (tmp_path / "run").exists()


def utterances(partition, count, locale, domains=("alarm", "music")):
    """Utterances with only the fields that the selection reads."""
    return [
        Utterance(f"{partition}{number}", locale, partition, domains[number % len(domains)], "x", "a", ("a",), ("O",))
        for number in range(count)
    ]


def test_the_dev_utterances_that_are_seen_are_the_same_in_each_locale_and_part_of_more():
    locales = ("de-DE", "en-US", "fr-FR")
    known = [one for locale in locales for part in ("train", "dev", "test") for one in utterances(part, 30, locale)]
    prepared = types.SimpleNamespace(utterances=known)

    def chosen(most, domain=""):
        found = finetune.labeled_dev(prepared, Finetune(max_dev=most), domain)
        assert {one.partition for one in found} == {"dev"}
        return {locale: [one.id for one in found if one.locale == locale] for locale in locales}

    few, more, everything = chosen(5), chosen(12), chosen(0)
    assert [len(few["de-DE"]), len(more["de-DE"]), len(everything["de-DE"])] == [5, 12, 30]
    assert few["de-DE"] == few["en-US"] == few["fr-FR"] and set(few["de-DE"]) < set(more["de-DE"])
    assert few["de-DE"] != everything["de-DE"][:5], "not simply the first"
    alarms = chosen(12, "alarm")["de-DE"]
    assert 0 < len(alarms) < 12 and set(alarms) < set(more["de-DE"])
    assert len(finetune.labeled_train(prepared, 4, "")) == 12, "train has a limit of its own"


@pytest.mark.parametrize(
    ("settings", "every", "steps"),
    [
        (Finetune(epochs=3, patience=2), 4, 10),
        (Finetune(epochs=3), 0, 10),
        (Finetune(epochs=3, patience=2, evaluate_every=7), 7, 10),
        (Finetune(steps=50, patience=2), 4, 50),
    ],
)
def test_with_patience_there_is_an_evaluation_every_epoch(settings, every, steps):
    found = finetune.with_steps(settings, 100)  # 100 utterances are 3.1 batches of 32
    assert (found.evaluate_every, found.steps) == (every, steps)


def test_stopping_early_without_dev_utterances_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    config = pretrained.get_config("smoke")
    config.finetune.patience = 3
    train, dev = utterances("train", 20, "de-DE"), utterances("dev", 20, "de-DE", ("alarm",))
    for task, domain, known, problem in (
        ("icner", "each", train + dev, "there is no dev utterance of domain music by which"),
        ("dc", "", train, "there is no dev utterance by which"),
    ):
        config.finetune.domain = domain
        monkeypatch.setattr(finetune, "Prepared", lambda path, known=known: types.SimpleNamespace(utterances=known))
        monkeypatch.setattr(finetune, "prepared_for", lambda config, prepared: prepared)
        with pytest.raises(UserError, match=rf"^config\.finetune\.patience: {problem} .*; give some utterances"):
            finetune.run(config, tmp_path / "run", task)
    assert not (tmp_path / "run").exists()


def test_the_labels_used_are_those_of_the_run(tmp_path):
    def utterance(number, partition="train"):
        return Utterance(str(number), "en-US", partition, "alarm", "alarm_set", f"text {number}", ("text",), ("O",))

    prepared: Any = types.SimpleNamespace(utterances=[*map(utterance, range(9)), utterance(9, "test")])
    config = pretrained.get_config()
    config.finetune.max_train = 4
    written = {"command": "finetune_dc", "config": {"finetune": config.finetune.to_dict()}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    used = finetune.labels_used(tmp_path, prepared)
    assert used == finetune.labeled_train(prepared, 4, "") and len(used) == 4


def test_a_domain_whose_name_is_a_path_keeps_its_name(tmp_path):
    names = ("alarm/timer", "..", "music")
    for name in names:
        (tmp_path / "run" / "domains" / file_name(name)).mkdir(parents=True)
    assert set(finetune.domain_folders(tmp_path / "run")) == set(names)
    assert [one.name for one in tmp_path.iterdir()] == ["run"]


def test_threshold_is_the_quantile_of_right_answers():
    def record(task, probability, right):
        gold, predicted = ("domain", "predicted_domain") if task == "dc" else ("intent", "predicted_intent")
        other = {"domain": "a", "intent": "a"} if task == "dc" else {"domain": "b", "intent": "a"}
        return {"task": task, **other, gold: "a", predicted: "a" if right else "b", "probability": probability}

    for task in ("dc", "icner"):
        records = [record(task, number / 100, True) for number in range(101)] + [record(task, 0.0, False)] * 50
        assert finetune.threshold(records) == {"threshold": pytest.approx(0.05)}
        assert finetune.threshold([record(task, 0.5, False)]) == finetune.threshold([]) == {}


def test_a_run_records_what_it_has_seen(tmp_path):
    config, prepared = smoke_config(tmp_path / "data")
    config.finetune.max_train = 10
    finetune.run(config, tmp_path / "dc", "dc")
    mesh = make_mesh(config.mesh)
    one = finetune.load_finetuned(tmp_path / "dc", prepared, mesh, config.compute_dtype, "model")
    train = finetune.labeled_train(prepared, 10, "")
    assert one.seen._replace(threshold=None) == serving.Seen.of(train, CHARACTER_LOCALES)
    assert one.seen._replace(threshold=None) != serving.Seen.of(prepared.utterances, CHARACTER_LOCALES)
    assert "seen" in json.loads((tmp_path / "dc" / "run.json").read_text())
    dev = finetune.of_domain(prepared.utterances, "dev", "")
    which = (one.model, one.params, one.masks, dev, train, one.tokenizer, one.length, one.maps, mesh)
    right = [
        record["probability"]
        for record in finetune.predict(*which, probabilities="label")
        if record["predicted_domain"] == record["domain"]
    ]
    assert one.seen.threshold == pytest.approx(np.quantile(right, 0.05), abs=1e-6)


@pytest.mark.long
def test_one_model_for_each_domain(tmp_path):
    config = pretrained.get_config("smoke")
    config.progress = config.tensorboard = False
    config.prepared = str(tmp_path / "data")
    prepare.run(config, tmp_path / "data")
    config.finetune.domain = "each"
    config.finetune.label_smoothing = 0.1
    compiled_step.cache_clear()
    finetune_icner.run(config, tmp_path / "icner")
    assert compiled_step.cache_info().misses == 1, "domains share one compiled step"
    folders = finetune.domain_folders(tmp_path / "icner")
    assert len(folders) > 5
    for domain, folder in folders.items():
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        assert run["labels"]["domains"] == [domain]
        assert len(run["labels"]["intents"]) <= run["classes"]["intents"]

    config.evaluate.checkpoint = str(tmp_path / "icner")
    evaluate.run(config, tmp_path / "scores")
    records = read_records(tmp_path / "scores" / evaluate.RECORDS)
    known = {one: json.loads((folder / "run.json").read_text())["labels"]["intents"] for one, folder in folders.items()}
    assert all(record["predicted_intent"] in known[record["domain"]] for record in records)

    # A domain whose model is gone stands for one without a train utterance: its utterances are errors, not a crash.
    lost = sorted(folders)[0]
    shutil.rmtree(folders[lost])
    evaluate.run(config, tmp_path / "again")
    again = read_records(tmp_path / "again" / evaluate.RECORDS)
    assert len(again) == len(records)
    orphans = [record for record in again if record["domain"] == lost]
    assert orphans and not any(record["exact"] for record in orphans)
    assert {record["predicted_intent"] for record in orphans} == {""}

    config.finetune.domain = "kitchen"
    with pytest.raises(UserError, match=r"config\.finetune\.domain: 'kitchen' is not a domain; use each or one of"):
        finetune_icner.run(config, tmp_path / "other")
