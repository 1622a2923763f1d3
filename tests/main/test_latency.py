"""Sizes are those of the models, times are of the calls that predict makes, and a model too large is not run."""

import math

import jax
import numpy as np
import pytest

from kd_jax.config.commands import Latency
from kd_jax.config.data import Vocabulary
from kd_jax.config.settings import read
from kd_jax.data.text.utterances import LabelMaps
from kd_jax.jobs import serving
from kd_jax.main import latency
from kd_jax.runtime.files import read_json
from kd_jax.types import UserError
from tests.support.finished_runs import smoke_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    config, prepared = smoke_config(tmp_path_factory.mktemp("data"))
    config.student.num_layers = 1
    config.vocabulary.update({"trim": True, "min_count": 2})
    return config, prepared


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("latency") / "run"
    latency.run(data[0], workdir)
    return workdir, read_json(workdir / latency.LATENCY)


def test_sizes(data, measured):
    config, prepared = data
    teacher, student = measured[1]["models"]
    assert (teacher["name"], student["name"]) == ("teacher", "student")
    assert teacher["vocabulary"] == prepared.tokenizer.vocab_size > student["vocabulary"]
    assert (teacher["layers"], student["layers"]) == (config.teacher.num_layers, 1)
    table = student["vocabulary"] * student["hidden_size"]
    assert student["parameters"] - student["without_embeddings"] == table  # rotary positions, no token types
    assert student["bytes"]["float32"] == 4 * student["parameters"]
    assert 0.25 < student["bytes"]["int8"] / student["bytes"]["float32"] < 0.35


def test_times(data, measured):
    found = measured[1]
    assert (found["task"], found["length"], found["dtype"]) == ("icner", data[0].rows.length, "float32")
    for one in found["models"]:
        assert [batch["utterances"] for batch in one["batches"]] == [1, 64]
        single, many = one["batches"]
        assert single["rows"] == 1 < many["rows"] <= 64
        for batch in (single, many):
            assert batch["calls"] == data[0].latency.calls
            assert 0 < batch["p50_ms"] <= batch["p95_ms"] and math.isfinite(batch["p95_ms"])


def test_a_finished_one_is_left_as_it_is(data, measured):
    workdir, _ = measured
    before = (workdir / latency.LATENCY).stat().st_mtime_ns
    latency.run(data[0], workdir)
    assert (workdir / latency.LATENCY).stat().st_mtime_ns == before


def test_models_are_called_in_turns_until_time_is_up(data, monkeypatch):
    class Clock:
        now = 0.0

    def counter():
        Clock.now += 1.0
        return Clock.now

    called = []

    def compiled(model):
        def predict(params, masks, batch):
            assert set(masks) == {"utterance_classes"} and masks["utterance_classes"].shape == (model.domains,)
            called.append((model.domains, int(np.asarray(batch["x"]))))
            return np.zeros(1)

        return predict

    monkeypatch.setattr(latency.time, "perf_counter", counter)
    monkeypatch.setattr(latency, "compiled_predict", compiled)
    shape = latency.masked_lm.encoder_config(data[0].student, 9)
    models = {
        str(size): latency.Measured(serving.Functional("dc", shape, domains=size), {}, {64: {"x": np.array(size)}})
        for size in (2, 3)
    }
    found = latency.timed(models, 64, 100, 6.0, jax.devices()[0])
    # Each turn takes 2 * 2 ticks and the look at the clock one; 12 seconds are up after the least number of calls.
    assert {name: len(times) for name, times in found.items()} == {"2": latency._LEAST, "3": latency._LEAST}
    assert all(time == 1.0 for times in found.values() for time in times)
    timed = called[2 * latency._UNTIMED :]
    assert timed == [(2, 2), (3, 3)] * latency._LEAST
    assert len(latency.timed(models, 64, 7, 1e9, jax.devices()[0])["2"]) == 7


def test_sampled_utterances_are_of_the_test_partition(data):
    utterances = data[1].utterances
    found = latency.sample(utterances, 64)
    assert len(found) == 64 and {one.partition for one in found} == {"test"}
    test = [one for one in utterances if one.partition == "test"]
    assert found[0] is test[0] and found[-1] is not test[63]
    few = [*test[:3]]
    assert [one.id for one in latency.sample(few, 7)] == [one.id for one in (*few, *few, few[0])]
    with pytest.raises(UserError, match="no test partition"):
        latency.sample([one for one in utterances if one.partition == "train"], 64)


def test_a_batch_holds_each_utterance_once(data):
    _, prepared = data
    maps = LabelMaps.from_train(prepared.utterances)
    utterances = latency.sample(prepared.utterances, 64)
    for task in serving.CLASSES:
        found = latency.batches_of(utterances, prepared, maps, task)
        assert {count: int(batch["utterance_weights"].sum()) for count, batch in found.items()} == {1: 1, 64: 64}


def test_what_no_device_holds_has_sizes_alone(data, monkeypatch):
    config, prepared = data
    fits = latency.fits
    device = jax.devices()[0]
    monkeypatch.setattr(latency, "fits", lambda model, device: model.config.num_layers == 1 and fits(model, device))
    encoders = {name: config[name].to_dict() for name in ("teacher", "student")}
    settings, vocabulary = read(Latency, config.latency, "latency"), read(Vocabulary, config.vocabulary, "vocabulary")
    teacher, student = latency.measure(encoders, settings, vocabulary, prepared)["models"]
    assert teacher["batches"] == [] and teacher["parameters"] > 0
    assert len(student["batches"]) == 2

    class Small:
        def memory_stats(self):
            return {"bytes_limit": 1000}

    shape = latency.masked_lm.encoder_config(config.student, 100)
    model = serving.Functional("dc", shape, domains=2)
    assert fits(model, device) and not fits(model, Small())


def test_mistakes_name_the_key(data, tmp_path):
    for change, message in (
        ({"models": ("teacher", "tutor")}, r"config\.latency\.models: .*'tutor'"),
        ({"task": "mlm"}, r"config\.latency\.task: 'mlm'"),
        ({"calls": 1}, r"config\.latency\.calls: 1 is too few"),
    ):
        config = data[0].copy_and_resolve_references()
        config.latency.update(change)
        with pytest.raises(UserError, match=message):
            latency.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
