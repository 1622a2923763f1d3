"""One ICNER model for each domain: routed by the gold domain, one compilation, nothing lost in evaluation."""

import json
import shutil
import types
from typing import Any

import numpy as np
import pytest

from configs import quickstart
from kd_jax.data.text.utterances import Utterance
from kd_jax.evaluation.records import read_records
from kd_jax.jobs import finetune
from kd_jax.jobs.job import compiled_step
from kd_jax.main import evaluate, finetune_icner, prepare
from kd_jax.runtime.paths import file_name
from kd_jax.types import UserError


def test_class_masks_leave_only_real_classes():
    masks = finetune.class_masks({"intents": 2, "tags": 3}, {"intents": 4, "tags": 3})
    assert masks["utterance_classes"].tolist() == [0.0, 0.0, -np.inf, -np.inf]
    assert masks["tag_classes"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("key", "value"), [("label_smoothing", 1.0), ("dropout", -0.1), ("epochs", -1), ("max_train", -5)]
)
def test_impossible_settings_are_named(tmp_path, key, value):
    config = quickstart.get_config()
    config.finetune[key] = value
    with pytest.raises(UserError, match=rf"config\.finetune\.{key}: {value}"):
        finetune.run(config, tmp_path, "dc")


def test_the_labels_used_are_those_of_the_run(tmp_path):
    def utterance(number, partition="train"):
        return Utterance(str(number), "en-US", partition, "alarm", "alarm_set", f"text {number}", ("text",), ("O",))

    prepared: Any = types.SimpleNamespace(utterances=[*map(utterance, range(9)), utterance(9, "test")])
    config = quickstart.get_config()
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


@pytest.mark.long
def test_one_model_for_each_domain(tmp_path):
    config = quickstart.get_config("smoke")
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
    with pytest.raises(UserError, match=r"config\.finetune\.domain: 'kitchen' is no domain; use each or one of"):
        finetune_icner.run(config, tmp_path / "other")
