"""Predictions from the command line are those that evaluation scores, whatever texts stand together."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from kd_jax.config.execution import Mesh
from kd_jax.data.text.utterances import read_massive, split_words
from kd_jax.jobs import finetune
from kd_jax.main import predict
from kd_jax.runtime.files import read_json, write_json
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError
from tests.support.finished_runs import smoke_config, write_finetuned


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folder of a DC run and an ICNER run."""
    config, prepared = data
    folder = tmp_path_factory.mktemp("runs")
    for task in ("dc", "icner"):
        write_finetuned(folder / task, config, prepared, task)
    return folder


@pytest.fixture(scope="module")
def predictor(runs):
    return predict.Predictor([str(runs / "dc"), str(runs / "icner")])


def run(capsys, *arguments):
    code = predict.main([str(one) for one in arguments])
    return code, capsys.readouterr()


def test_equal_to_what_evaluation_scores(data, runs):
    _, prepared = data
    mesh = make_mesh(Mesh())
    test = [one for one in prepared.utterances if one.partition == "test"][:60]
    checked = 0
    for task, names in (("dc", ("predicted_domain",)), ("icner", ("predicted_intent", "predicted_tags"))):
        found = predict.Predictor([str(runs / task)]).predict([one.text for one in test])
        ask = {one.text: prediction for one, prediction in zip(test, found)}
        records = finetune.predict_partition(runs / task, prepared, mesh, "test", "float32")
        for record, one in zip(records, [one for one in prepared.utterances if one.partition == "test"], strict=True):
            if one.text in ask:
                mine = ask[one.text]
                values = {
                    "predicted_domain": mine.domain,
                    "predicted_intent": mine.intent,
                    "predicted_tags": list(mine.tags),
                }
                assert {name: record[name] for name in names} == {name: values[name] for name in names}
                checked += 1
    assert checked >= 2 * len(ask)
    assert any(tag != "O" for one in found for tag in one.tags)


def test_a_text_alone_and_among_others(predictor):
    texts = ["weck mich um sieben", "", "play some jazz", "   ", "quelle heure est-il"]
    together = predictor.predict(texts)
    assert [one.text for one in together] == texts
    assert together[1].to_json() == {"text": "", "domain": None, "intent": None, "slots": []}
    for text, one in zip(texts, together):
        assert predictor.predict([text], rows=1) == [one]


def test_slots_name_their_words():
    one = predict.Prediction(
        "wake me at seven", ("wake", "me", "at", "seven"), "alarm", "set", ("O", "O", "B-time", "I-time")
    )
    assert one.to_json()["slots"] == [{"slot": "time", "text": "at seven", "start": 2, "end": 4}]
    words = tuple(split_words("七点", characters=True))
    one = predict.Prediction("七点", words, None, None, ("B-time", "I-time"), characters=True)
    assert one.to_json()["slots"][0]["text"] == "七点"


def test_probabilities(data, runs, predictor):
    """Held against a softmax in float64 of one text alone."""
    prepared, text = data[1], "weck mich morgen um sieben"
    one = predictor.predict(["play some jazz", text], probabilities=True)[1]
    plain = predictor.predict([text])[0]
    assert (plain.domain_probability, plain.intent_probability, plain.tag_probabilities) == (None, None, ())
    assert one[:5] == plain[:5]
    tokenizer = prepared.tokenizer
    ids, words = tokenizer.encode_words([text.split()])[0]
    tokens = np.array([[tokenizer.cls_id, *ids, tokenizer.sep_id]], np.int32)
    batch = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.arange(tokens.shape[1], dtype=np.int32)[None],
        "first_positions": np.zeros((1, 1), np.int32),
    }

    def softmax(logits):
        powers = np.exp(np.asarray(logits, np.float64))
        return powers / powers.sum(-1, keepdims=True)

    mesh = make_mesh(data[0].mesh)
    dc, icner = (finetune.load_finetuned(runs / task, prepared, mesh, "float32", "model") for task in ("dc", "icner"))
    domain = softmax(dc.model.domain_logits(dc.params, batch))[0, 0, dc.maps.domain_id(one.domain)]
    assert one.domain_probability == pytest.approx(domain, abs=1e-5)
    intents, tags = icner.model.intent_and_tag_logits(icner.params, batch)
    assert one.intent_probability == pytest.approx(softmax(intents)[0, 0, icner.maps.intent_id(one.intent)], abs=1e-5)
    firsts = [int(np.flatnonzero(words == word)[0]) for word in range(len(one.words))]
    chances = [softmax(tags[0, 1 + first])[icner.maps.tag_id(tag)] for first, tag in zip(firsts, one.tags)]
    assert one.tag_probabilities == pytest.approx(chances, abs=1e-5)
    values = one.to_json()
    assert values["domain_probability"] == round(one.domain_probability, 4)
    for slot in values["slots"]:
        assert slot["probability"] == pytest.approx(np.prod(chances[slot["start"] : slot["end"]]), abs=1e-4)


def test_a_word_without_a_piece_has_no_probability():
    tags, likely = ("B-time", "I-time", "O"), (0.5, None, 0.9)
    one = predict.Prediction("a b c", ("a", "b", "c"), "x", "y", tags, 0.25, 0.75, likely)
    assert one.to_json() == {
        "text": "a b c",
        "domain": "x",
        "domain_probability": 0.25,
        "intent": "y",
        "intent_probability": 0.75,
        "slots": [{"slot": "time", "text": "a b", "start": 0, "end": 2, "probability": 0.5}],
    }
    (text,) = predict.lines_of([one], "text", "")
    assert text == "text:   a b c\ndomain: x (0.25)\nintent: y (0.75)\nslots:  time = a b (0.50)"


def test_domain_and_intent_were_seen_together(data, runs, predictor):
    """Compared with all pairs for one text, by the probabilities of the models alone."""
    config, prepared = data
    together = {(one.domain, one.intent) for one in prepared.utterances if one.partition == "train"}
    texts = [one.text for one in prepared.utterances if one.partition == "test"][:40]
    both = predictor.predict(texts, probabilities=True)
    assert {(one.domain, one.intent) for one in both} <= together
    alone = [predict.Predictor([str(runs / task)]).predict(texts) for task in ("dc", "icner")]
    own = [(dc.domain, icner.intent) for dc, icner in zip(*alone)]
    assert not set(own) <= together  # or else there was nothing to choose
    mesh = make_mesh(config.mesh)
    chances = []
    for task in ("dc", "icner"):
        one = finetune.load_finetuned(runs / task, prepared, mesh, "float32", "model")
        test = [one for one in prepared.utterances if one.partition == "test"][:40]
        which = (one.model, one.params, one.masks, test, [], one.tokenizer, one.length, one.maps, mesh)
        names = one.maps.domains if task == "dc" else one.maps.intents
        records = finetune.predict(*which, probabilities="all")
        chances.append([dict(zip(names, record["class_probabilities"], strict=True)) for record in records])
    for one, domains, intents in zip(both, *chances):
        assert sum(domains.values()) == pytest.approx(1, abs=1e-5)
        best = max(together, key=lambda pair: domains[pair[0]] * intents[pair[1]])
        assert (one.domain, one.intent) == best
        assert one.domain_probability == pytest.approx(domains[one.domain], abs=1e-5)
        assert one.intent_probability == pytest.approx(intents[one.intent], abs=1e-5)


def test_for_a_run_without_a_record_of_its_labels_the_data_are_read(data, runs, predictor, tmp_path):
    shutil.copytree(runs, tmp_path / "old")
    for task in ("dc", "icner"):
        file = tmp_path / "old" / task / "run.json"
        values = read_json(file)
        assert values.pop("seen")["form"] == {"lower": True, "punctuation": "absent"}
        write_json(file, values)
    old = predict.Predictor([str(tmp_path / "old" / task) for task in ("dc", "icner")])
    texts = ["Wake me up at seven, please!", "play some jazz"]
    assert old.predict(texts, probabilities=True) == predictor.predict(texts, probabilities=True)


def test_text_is_read_in_the_form_of_the_training_data(runs, predictor):
    written, form = "Weck mich, um 7!", "weck mich um 7"
    one, other = predictor.predict([written, form], probabilities=True)
    assert (one.text, one.words) == (written, tuple(written.split()))
    assert one[2:5] == other[2:5]
    assert one.tag_probabilities == pytest.approx(other.tag_probabilities, abs=1e-6)
    as_it_is = predict.Predictor([str(runs / "icner")], normalize=False)
    (raw,) = as_it_is.predict([written], probabilities=True)
    assert raw.tag_probabilities != pytest.approx(one.tag_probabilities, abs=1e-6)
    assert one.bare and not raw.bare
    assert as_it_is.predict([form])[0].tags == other.tags


def test_tags_go_to_the_words_as_given():
    record = {"predicted_tags": ["O", "B-time", "O", "I-time"], "tag_probabilities": [0.1, 0.2, 0.3, 0.4]}
    assert predict.as_given(record, [1, None, 3]) == {
        "predicted_tags": ["B-time", "I-time", "I-time"],
        "tag_probabilities": [0.2, None, 0.4],
    }
    assert predict.as_given({"predicted_tags": ["O", "B-x", "I-x"]}, [None, 0, 2, None]) == {
        "predicted_tags": ["O", "O", "B-x", "O"]
    }


def test_a_slot_without_the_punctuation_around_it():
    words = ("wake", "me", "(at", "seven,", "eight)", "!")
    tags = ("O", "O", "B-time", "I-time", "I-time", "I-time")
    one = predict.Prediction(" ".join(words), words, "x", "y", tags, bare=True)
    assert one.to_json()["slots"] == [{"slot": "time", "text": "at seven, eight", "start": 2, "end": 6}]
    assert one._replace(bare=False).to_json()["slots"][0]["text"] == "(at seven, eight) !"


def test_threshold(runs, predictor, capsys, tmp_path):
    texts = ["weck mich um sieben", "play some jazz"]
    models = {"dc,icner": predictor, "icner": predict.Predictor([str(runs / "icner")])}
    for names, one in models.items():
        decides = "domain" if "dc" in names else "intent"
        known = one.predict(texts, probabilities=True)
        likely = [getattr(answer, f"{decides}_probability") for answer in known]
        assert likely[0] != likely[1]
        strict = predict.Predictor([str(runs / name) for name in names.split(",")], threshold=sum(likely) / 2)
        found = strict.predict(texts, probabilities=True)
        low = min((0, 1), key=lambda number: likely[number])
        assert found[1 - low] == known[1 - low]
        values = found[low].to_json()
        assert (values["domain"], values["intent"], values["slots"]) == (None, None, [])
        assert values[f"{decides}_probability"] == round(likely[low], 4)
    model = f"--model={runs / 'dc'},{runs / 'icner'}"
    code, printed = run(capsys, model, "--threshold=1", texts[0])
    assert code == 0 and printed.out == f"text:   {texts[0]}\ndomain: none\nintent: none\n"
    for given, words in (
        ("auto", "--threshold=auto: the model has none"),
        ("2", "--threshold: '2' is neither auto nor a probability"),
        ("high", "--threshold: 'high' is neither auto nor a probability"),
    ):
        code, printed = run(capsys, model, f"--threshold={given}", texts[0])
        assert code == 2 and words in printed.err and len(printed.err.splitlines()) == 1
    shutil.copytree(runs, tmp_path / "runs")
    file = tmp_path / "runs" / "dc" / finetune.DEV
    write_json(file, read_json(file) | {"threshold": 1.0})
    code, printed = run(capsys, f"--model={tmp_path / 'runs' / 'dc'}", "--threshold=auto", texts[0])
    assert code == 0 and "domain: none" in printed.out


def test_each_domain_has_its_model(data, runs, tmp_path):
    config, prepared = data
    texts = [one.text for one in prepared.utterances if one.partition == "test"][:60]
    domains = [one.domain for one in predict.Predictor([str(runs / "dc")]).predict(texts)]
    with_model = domains[0]
    assert set(domains) != {with_model}
    write_finetuned(tmp_path / "each" / "domains" / with_model, config, prepared, "icner", with_model)
    routed = predict.Predictor([str(runs / "dc"), str(tmp_path / "each")]).predict(texts)
    assert [one.domain for one in routed] == domains
    assert [one.intent is not None for one in routed] == [domain == with_model for domain in domains]
    with pytest.raises(UserError, match="a model for each domain; give a DC run too"):
        predict.Predictor([str(tmp_path / "each")])


def test_forms_of_output(runs, capsys, tmp_path, monkeypatch):
    model = f"--model={runs / 'dc'},{runs / 'icner'}"
    code, printed = run(capsys, model, "weck mich um sieben")
    assert code == 0 and printed.out.startswith("text:   weck mich um sieben\ndomain: ")
    (tmp_path / "lines.txt").write_text("weck mich um sieben\n\nplay some jazz\n", encoding="utf-8")
    code, printed = run(capsys, model, f"--input={tmp_path / 'lines.txt'}")
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["text"] for row in rows] == ["weck mich um sieben", "", "play some jazz"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"play some jazz\nweck mich um sieben\n")))
    monkeypatch.setattr(predict, "CHUNK", 1)
    output = tmp_path / "new" / "de-DE.jsonl"
    code, printed = run(capsys, model, "--input=-", "--format=massive", "--locale=de-DE", f"--output={output}")
    assert code == 0 and printed.out == ""
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(line["id"], line["scenario"]) for line in lines] == [("0", rows[2]["domain"]), ("1", rows[0]["domain"])]
    with output.open("a", encoding="utf-8") as more:  # a reader of MASSIVE asks for a train partition
        more.write(json.dumps(lines[0] | {"id": "x", "partition": "train"}) + "\n")
    back = read_massive(output.parent, ["de-DE"])
    assert [one.intent for one in back[:2]] == [rows[2]["intent"], rows[0]["intent"]]


def test_a_study_predicts_with_the_runs_it_names(runs, capsys):
    (runs / "models.json").write_text('["dc", "icner"]')
    try:
        of_study = run(capsys, f"--model={runs}", "play some jazz")
    finally:
        (runs / "models.json").unlink()
    assert of_study == run(capsys, f"--model={runs / 'dc'},{runs / 'icner'}", "play some jazz")
    assert of_study[0] == 0 and "domain:" in of_study[1].out


def test_a_reader_that_closes_the_pipe_is_no_error(runs):
    command = [sys.executable, "-m", "kd_jax.main.predict", f"--model={runs / 'dc'}", "play some jazz"]
    closed, pipe = os.pipe()
    os.close(closed)
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(pipe)
    assert (done.returncode, "Error" in done.stderr) == (0, False), done.stderr


def test_standard_input_that_is_not_utf8(runs, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"good\ncaf\xe9\n")))
    code, printed = run(capsys, f"--model={runs / 'dc'}", "--input=-")
    assert code == 2 and "standard input:2: byte 0xe9 at column 4 is not UTF-8" in printed.err


def test_mistakes_are_one_sentence(runs, capsys, tmp_path):
    for arguments, words in (
        ((f"--model={runs / 'dc'}",), "give texts, or --input"),
        ((f"--model={runs / 'dc'}", "--probabilities", "--format=massive", "x"), "has no field for them"),
        ((f"--model={runs / 'dc'}", "--input=nowhere.txt"), "--input: there is no file nowhere.txt"),
        ((f"--model={tmp_path}", "x"), "--model: "),
        ((f"--model={runs / 'dc'},{runs / 'dc'}", "x"), "is a second run for dc"),
        (("--model=,", "x"), "--model: it is empty"),
        ((f"--model={runs / 'dc'}", "x", "caf\udce9"), "text 2 of the command line: character 4 is byte 0xe9"),
    ):
        code, printed = run(capsys, *arguments)
        assert code == 2 and printed.err.startswith("error: ") and words in printed.err, printed.err
        assert len(printed.err.splitlines()) == 1
    with pytest.raises(SystemExit) as stop:
        predict.main(["x"])
    assert stop.value.code == 2


def test_a_full_disk_is_one_sentence(tmp_path, capsys, monkeypatch):
    def full(options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(predict, "run", full)
    code, printed = run(capsys, "--model=x", "hello", f"--output={tmp_path / 'out.jsonl'}")
    assert code == 2 and printed.err.startswith(f"error: {tmp_path / 'out.jsonl'}: the disk is full or over its quota")
