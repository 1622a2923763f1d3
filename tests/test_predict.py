"""Predictions from the command line are those that evaluation scores, whatever texts stand together."""

import io
import json

import pytest
from finished_runs import smoke_config, write_finetuned

from kd_jax.data.utterances import read_massive, split_words
from kd_jax.main import finetune, predict
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError


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


def test_equal_to_what_evaluation_scores(data, runs, predictor):
    config, prepared = data
    mesh = make_mesh(config.mesh)
    test = [one for one in prepared.utterances if one.partition == "test"][:60]
    found = predictor.predict([one.text for one in test])
    ask = {one.text: prediction for one, prediction in zip(test, found)}
    checked = 0
    for task, names in (("dc", ("predicted_domain",)), ("icner", ("predicted_intent", "predicted_tags"))):
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
    words = tuple(split_words("七点", "zh-CN"))
    one = predict.Prediction("七点", words, None, None, ("B-time", "I-time"))
    assert one.to_json("zh-CN")["slots"][0]["text"] == "七点"


def test_each_domain_has_its_model(data, runs, predictor, tmp_path):
    config, prepared = data
    texts = [one.text for one in prepared.utterances if one.partition == "test"][:60]
    domains = [one.domain for one in predictor.predict(texts)]
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
    monkeypatch.setattr("sys.stdin", io.StringIO("play some jazz\nweck mich um sieben\n"))
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


def test_mistakes_are_one_sentence(runs, capsys, tmp_path):
    for arguments, words in (
        ((f"--model={runs / 'dc'}",), "give texts, or --input"),
        ((f"--model={runs / 'dc'}", "--input=nowhere.txt"), "--input: there is no file nowhere.txt"),
        ((f"--model={tmp_path}", "x"), "--model: "),
        ((f"--model={runs / 'dc'},{runs / 'dc'}", "x"), "is a second run for dc"),
        (("--model=,", "x"), "--model: it is empty"),
    ):
        code, printed = run(capsys, *arguments)
        assert code == 2 and printed.err.startswith("error: ") and words in printed.err, printed.err
        assert len(printed.err.splitlines()) == 1
    with pytest.raises(SystemExit) as stop:
        predict.main(["x"])
    assert stop.value.code == 2
