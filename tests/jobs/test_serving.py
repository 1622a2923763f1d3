"""An exported predictor answers in a fresh process, at any batch, as the run it was exported from."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from kd_jax.config import to_dict
from kd_jax.config.data import CHARACTER_LOCALES
from kd_jax.data.prepared import Prepared
from kd_jax.evaluation.records import read_records
from kd_jax.jobs import finetune, serving
from kd_jax.main import evaluate, export, predict, prepare
from kd_jax.models.int8 import quantized
from kd_jax.runtime.files import read_json, write_json
from kd_jax.types import UserError
from tests.support.finished_runs import small_config, smoke_config, write_finetuned, write_student

BATCHES = ((1, 5), (3, 32), (17, 9))  # texts, tokens
FRESH = """
import json, sys, jax, numpy as np
from safetensors.numpy import load_file
folder, asked, answered = sys.argv[1:]
program = jax.export.deserialize(bytearray(open(f"{folder}/predictor.stablehlo", "rb").read()))
weights, texts = load_file(f"{folder}/predictor.safetensors"), np.load(asked)
found = {}
for number in range(len(texts.files) // 2):
    for name, value in program.call(weights, texts[f"ids{number}"], texts[f"mask{number}"]).items():
        found[f"{name}{number}"] = np.asarray(value)
assert "kd_jax" not in sys.modules
np.savez(answered, platforms=list(program.platforms), **found)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folder of a DC run and an ICNER run, and (model, parameters, label maps) of each."""
    config, prepared = data
    folder = tmp_path_factory.mktemp("runs")
    return folder, {task: write_finetuned(folder / task, config, prepared, task) for task in ("dc", "icner")}


def exported(data, source, workdir, **changes):
    config = data[0].copy_and_resolve_references()
    config.export.update({"checkpoint": str(source), **changes})
    export.run(config, workdir)
    return workdir


def texts_of(data):
    """For each of BATCHES ids and mask int32 [B, L], as a tokenizer pads them."""
    rng, tokenizer, found = np.random.default_rng(0), data[1].tokenizer, {}
    for number, (count, length) in enumerate(BATCHES):
        sizes = rng.integers(3, length + 1, count)
        mask = (np.arange(length)[None] < sizes[:, None]).astype(np.int32)
        ids = rng.integers(5, tokenizer.vocab_size, (count, length)).astype(np.int32)
        found[f"ids{number}"], found[f"mask{number}"] = np.where(mask, ids, tokenizer.pad_id).astype(np.int32), mask
    return found


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("task", ["dc", "icner"])
def test_program_in_a_fresh_process(data, runs, task, int8, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax serializes programs with flatbuffers")
    folder, found = runs
    out = exported(data, folder / task, tmp_path / "out", stablehlo=True, int8=int8)
    texts = texts_of(data)
    np.savez(tmp_path / "asked.npz", **texts)
    (tmp_path / "fresh.py").write_text(FRESH)
    arguments = [str(out), str(tmp_path / "asked.npz"), str(tmp_path / "answered.npz")]
    subprocess.run([sys.executable, str(tmp_path / "fresh.py"), *arguments], check=True, cwd=tmp_path)
    answered = np.load(tmp_path / "answered.npz")
    assert answered["platforms"].tolist() == ["cpu", "cuda", "tpu"]
    model, params, _ = found[task]
    if int8:
        params = serving.read(out).params
    for number in range(len(BATCHES)):
        ids, mask = texts[f"ids{number}"], texts[f"mask{number}"]
        batch = {
            "tokens": ids,
            "segment_ids": mask,
            "positions": np.where(mask, np.arange(ids.shape[1], dtype=np.int32)[None], 0),
            "first_positions": np.zeros((len(ids), 1), np.int32),
        }
        if task == "dc":
            expected = {"domain": model.domain_logits(params, batch)[:, 0]}
        else:
            intents, tags = model.intent_and_tag_logits(params, batch)
            expected = {"intent": intents[:, 0], "tags": tags}
        for name, value in expected.items():
            real = mask.astype(bool) if name == "tags" else slice(None)
            ours = np.asarray(value)[real]
            assert np.abs(ours).max() > 0.05
            np.testing.assert_allclose(answered[f"{name}{number}"][real], ours, atol=1e-5)


@pytest.mark.parametrize("task", ["dc", "icner"])
def test_example_of_the_card_runs(data, runs, task, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax serializes programs with flatbuffers")
    out = exported(data, runs[0] / task, tmp_path / "out", stablehlo=True, int8=True)
    card = (out / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "import kd_jax" not in code and "predict --model=. " in card
    (out / "example.py").write_text(code)
    done = subprocess.run([sys.executable, "example.py"], cwd=out, capture_output=True, text=True, check=True)
    one = predict.Predictor([str(out)]).predict(["play some jazz"], rows=1)[0]
    assert f"play some jazz -> {one.domain or one.intent}" in done.stdout


def test_predict_reads_a_folder_without_the_prepared_data(data, runs, tmp_path):
    folder, found = runs
    texts = ["weck mich um sieben", "play some jazz", "quelle heure est-il", ""]
    places = []
    for task in ("dc", "icner"):
        places.append(exported(data, folder / task, tmp_path / task, int8=True))
        assert not (places[-1] / "model.safetensors").exists()
        model, params, maps = found[task]
        served = serving.read(places[-1])
        assert served.maps.to_json() == {
            name: names if name in serving.CLASSES[task] else [] for name, names in maps.to_json().items()
        }
        assert served.model == model
        small = quantized(params)
        for name, values in flatten_dict(served.params, sep=".").items():
            scale = small.get(name + ".scale_int8", 1.0)
            np.testing.assert_array_equal(values, small[name] * scale)
    run = predict.Predictor([str(folder / "dc"), str(folder / "icner")]).predict(texts)
    ours = predict.Predictor([str(place) for place in places]).predict(texts)
    same = [one.words == other.words for one, other in zip(run, ours)]
    dc = [predict.Predictor([str(one)]).predict(texts) for one in (folder / "dc", places[0])]
    same += [one.domain == other.domain for one, other in zip(*dc)]
    assert all(same)


def test_an_export_keeps_what_the_run_saw(data, runs, tmp_path):
    prepared, source = data[1], runs[0]
    shutil.copytree(source, tmp_path / "runs")
    file = tmp_path / "runs" / "dc" / finetune.DEV
    write_json(file, read_json(file) | {"threshold": 0.25})
    out = {task: exported(data, tmp_path / "runs" / task, tmp_path / task, int8=True) for task in ("dc", "icner")}
    train = [one for one in prepared.utterances if one.partition == "train"]
    for task, threshold in (("dc", 0.25), ("icner", None)):
        assert serving.read(out[task]).seen == serving.Seen.of(train, CHARACTER_LOCALES)._replace(threshold=threshold)
    both = predict.Predictor([str(out[task]) for task in ("dc", "icner")])
    texts = ["Weck mich, um 7!", "weck mich um 7", "play some jazz", "quelle heure est-il"]
    found = both.predict(texts)
    assert found[0][2:5] == found[1][2:5]
    assert {(one.domain, one.intent) for one in found} <= {(one.domain, one.intent) for one in train}
    for task in out:  # as an older version wrote it
        about = read_json(out[task] / serving.ABOUT)
        assert about.pop("seen")
        write_json(out[task] / serving.ABOUT, about)
    old = predict.Predictor([str(out[task]) for task in ("dc", "icner")]).predict(texts)
    alone = [predict.Predictor([str(out[task])]).predict(texts) for task in ("dc", "icner")]
    assert [(one.domain, one.intent) for one in old] == [(dc.domain, icner.intent) for dc, icner in zip(*alone)]


THAI = [("ปลุกฉัน[time : เจ็ดโมง]", "alarm", "set"), ("เปิด[song : เพลง],[artist : ก]", "music", "play")]


def test_a_locale_that_is_tagged_by_character(tmp_path):
    """The run and its export read a text as in training, and an older run as in 0.2.0."""
    (tmp_path / "nlu").mkdir()
    with (tmp_path / "nlu" / "th-TH.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(24):
            annotated, domain, intent = THAI[number % 2]
            annotated = annotated.replace("ก", "กขคงจฉชซฌญฎฏ"[number // 2])
            partition = ("train", "train", "train", "dev", "test", "test")[number // 4]
            values = {"id": number, "locale": "th-TH", "partition": partition, "scenario": domain, "intent": intent}
            text = re.sub(r"\[\w+ : (.*?)\]", r"\1", annotated)
            lines.write(json.dumps({**values, "utt": text, "annot_utt": annotated}) + "\n")
    config = small_config()
    config.nlu.update({"format": "massive", "path": str(tmp_path / "nlu"), "locales": ("th-TH",), "max_train": 0})
    config.nlu.character_locales = ("th-TH",)
    config.sources.generic.update({"languages": ("en",), "max_texts": 200})
    config.transfer.language_mix = "own"
    config.prepared = str(tmp_path / "data")
    prepare.run(config, tmp_path / "data")
    assert Prepared(config.prepared).utterances[1].spans[0].start == 4
    finetune.run(config, tmp_path / "run", "icner")
    out = exported((config,), tmp_path / "run", tmp_path / "int8", int8=True)
    text = "เปิด เพลง"
    for folder in (tmp_path / "run", out):
        one = predict.Predictor([str(folder)]).predict([text], "th-TH", probabilities=True)[0]
        assert one.words == tuple("เปิดเพลง") and len(one.tags) == 8
        # Joined as in training: a character has a probability unless it shares the token of the one before it.
        ids, words = Prepared(config.prepared).tokenizer.encode_words([one.words], joined=True)[0]
        assert len(ids) < 8
        assert [number for number, chance in enumerate(one.tag_probabilities) if chance is not None] == sorted(
            set(words)
        )
        assert predict.Predictor([str(folder)]).predict([text], "en-US")[0].words == tuple(text.split())
    about = json.loads((out / serving.ABOUT).read_text())
    assert about["seen"].pop("character_locales") == ["th-TH"]
    del about["checksum"]  # as in an export of an older version
    (out / serving.ABOUT).write_text(json.dumps(about))
    old = predict.Predictor([str(out)])
    assert [len(old.predict([text], locale)[0].words) for locale in ("th-TH", "zh-CN")] == [2, 8]
    config.evaluate.checkpoint = str(tmp_path / "run")
    evaluate.run(config, tmp_path / "scores")
    records = read_records(tmp_path / "scores" / evaluate.RECORDS)
    assert records and all(len(one["predicted_tags"]) == len(one["words"]) > 8 for one in records)


def test_float_export_predicts_what_the_run_predicts(data, runs, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax serializes programs with flatbuffers")
    texts = [one.text for one in data[1].utterances[:40]]
    out = exported(data, runs[0] / "icner", tmp_path / "icner", stablehlo=True)
    assert (out / "model.safetensors").is_file()  # beside it
    assert predict.Predictor([str(out)]).predict(texts) == predict.Predictor([str(runs[0] / "icner")]).predict(texts)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "pooling"), [pytest.param("dc", "max", marks=pytest.mark.long), ("icner", "mean")])
def test_a_pooled_model_is_served_as_it_was_trained(data, task, pooling, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax serializes programs with flatbuffers")
    config, prepared = data[0].copy_and_resolve_references(), data[1]
    config.finetune.pooling = pooling
    model, *_ = write_finetuned(tmp_path / "run", config, prepared, task)
    out = exported(data, tmp_path / "run", tmp_path / "out", stablehlo=True, int8=task == "icner")
    assert serving.read(out).model == model and model.pooling == pooling
    if task == "dc":
        texts = [one.text for one in prepared.utterances[:20]]
        assert predict.Predictor([str(out)]).predict(texts) == predict.Predictor([str(tmp_path / "run")]).predict(texts)
    program = jax.export.deserialize(bytearray((out / serving.PROGRAM).read_bytes()))
    asked, weights = texts_of(data), load_file(out / serving.WEIGHTS)
    ids, mask = asked["ids1"], asked["mask1"]
    answered = program.call(weights, ids, mask)["domain" if task == "dc" else "intent"]
    expected = serving.answers(model, weights, ids, mask)["domain" if task == "dc" else "intent"]
    np.testing.assert_allclose(answered, expected, atol=1e-5)
    first = dataclasses.replace(model, pooling="first")
    other = serving.answers(first, weights, ids, mask)["domain" if task == "dc" else "intent"]
    assert np.abs(np.asarray(other) - np.asarray(answered)).max() > 1e-3


def test_classes_that_pad_a_label_map_are_left_out(data, tmp_path):
    config, prepared = data
    model, params, maps = write_finetuned(tmp_path / "run", config, prepared, "dc")
    sizes = {"domains": len(maps.domains) + 3}
    wide = finetune.classifier(
        config.student, prepared, config.finetune.dropout, "first", config.compute_dtype, "dc", sizes
    )
    head = params["domain_head"]
    padding = {"kernel": [(0, 0), (0, 3)], "bias": [(0, 3)]}
    classifier = {key: np.pad(leaf, padding[key], constant_values=9.0) for key, leaf in head["classifier"].items()}
    padded = {**params, "domain_head": {**head, "classifier": classifier}}
    cut, rest = serving.without_padding(wide, padded, {"domains": maps.domains})
    assert cut == model
    np.testing.assert_array_equal(rest["domain_head"]["classifier"]["kernel"], head["classifier"]["kernel"])
    np.testing.assert_array_equal(rest["domain_head"]["classifier"]["bias"], head["classifier"]["bias"])


def test_evaluate_scores_an_exported_folder(data, runs, tmp_path):
    out = exported(data, runs[0] / "dc", tmp_path / "out", int8=True)
    config = data[0].copy_and_resolve_references()
    config.evaluate.checkpoint = str(out)
    evaluate.run(config, tmp_path / "scores")
    rows = [json.loads(line) for line in (tmp_path / "scores" / evaluate.RESULTS).read_text().splitlines()]
    assert rows[0]["student"] == "scratch" and {row["metric"] for row in rows} >= {"error_rate"}


def test_mistakes_are_one_sentence(data, runs, tmp_path):
    config, prepared = data
    write_student(tmp_path / "student", config, prepared)
    with pytest.raises(UserError, match=r"config\.export\.int8: a masked LM predicts no classes"):
        exported(data, tmp_path / "student", tmp_path / "out", int8=True)
    assert not (tmp_path / "out").exists()
    plain = exported(data, runs[0] / "dc", tmp_path / "plain")
    with pytest.raises(UserError, match="a model for `transformers` only; name the run"):
        predict.Predictor([str(plain)])
    out = exported(data, runs[0] / "dc", tmp_path / "int8", int8=True)
    about = read_json(out / serving.ABOUT)
    write_json(out / serving.ABOUT, about | {"domains": about["domains"][1:]})
    with pytest.raises(UserError, match=r"domain_head\.classifier\.bias does not match predictor\.json"):
        predict.Predictor([str(out)])
    (out / serving.WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"predictor\.safetensors: was changed or damaged"):
        predict.Predictor([str(out)])
    (out / serving.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"holds predictor\.json without predictor\.safetensors"):
        predict.Predictor([str(out)])
    assert to_dict(config)["export"]["int8"] is False


def test_without_flatbuffers_it_says_so(data, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config\.export\.stablehlo: .*install flatbuffers"):
        exported(data, runs[0] / "dc", tmp_path / "out", stablehlo=True)
    assert not (tmp_path / "out").exists()
