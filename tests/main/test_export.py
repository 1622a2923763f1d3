"""An exported folder: it imports again as it was, `transformers` loads it, and its card's example runs."""

import errno
import json
import os
import pathlib
import re
import runpy
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from huggingface_hub import metadata_load

from kd_jax.config import base
from kd_jax.config.data import Vocabulary
from kd_jax.config.execution import Mesh
from kd_jax.config.settings import read
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import serving, trained
from kd_jax.main import evaluate, export, import_model, predict
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.files import TensorFiles
from kd_jax.runtime.files import read_json, read_json_lines, write_json
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError
from tests.support import hub_cache
from tests.support.finished_runs import random_params, smoke_config, write_finetuned, write_student
from tests.support.small_disk import grow, small_disk
from tests.support.small_models import small_config

SHAPES = {"modernbert": "tiny", "bert": "mbert", "roberta": "xlmr_base"}
# Runs whose text head reads more than the first token: (family, pooling).
POOLED = {"dc-class": ("modernbert", "mean"), "dc-apart": ("bert", "mean"), "icner-pooled": ("roberta", "max")}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folder of a student of each family, a DC model, an ICNER model, and what each of them is."""
    config, prepared = data
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for family in SHAPES:
        found[family] = write_student(folder / family, of_family(config, family), prepared)
    for task in ("dc", "icner"):
        found[task] = write_finetuned(folder / task, config, prepared, task)
    for name, (family, pooling) in POOLED.items():
        changed = of_family(config, family)
        changed.finetune.pooling = pooling
        found[name] = write_finetuned(folder / name, changed, prepared, name.split("-")[0])
    return folder, found


def of_family(config, family):
    config = config.copy_and_resolve_references()
    sizes = {"vocab_size": 0, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    config.student = base.encoder(SHAPES[family], **sizes, max_positions=64, scan="unroll")
    return config


def written(data, source, workdir):
    config = data[0].copy_and_resolve_references()
    config.export.checkpoint = str(source)
    export.run(config, workdir)
    return config


@pytest.mark.parametrize("family", SHAPES)
def test_import_of_an_export_is_the_run(data, runs, family, tmp_path):
    folder, found = runs
    config = written(data, folder / family, tmp_path / "out")
    config.import_model.path = str(tmp_path / "out")
    import_model.run(config, tmp_path / "back")
    model, params = found[family]
    back = trained.trained_params(tmp_path / "back", model, make_mesh(Mesh()))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), back, params)
    assert trained.parameters_fingerprint(tmp_path / "back", "x") == trained.parameters_fingerprint(
        folder / family, "x"
    )
    assert Tokenizer.load(tmp_path / "out").fingerprint == data[1].tokenizer.fingerprint


@pytest.mark.parametrize("name", ["bert", "dc"])
def test_a_full_disk_leaves_nothing_of_an_export(data, runs, name, tmp_path):
    """On disks with room for the first file at most, half of the weights, and all but the last file."""
    source, config = runs[0] / name, data[0].copy_and_resolve_references()
    config.export.update({"checkpoint": str(source), "int8": name == "dc"})
    export.run(config, tmp_path / "whole")
    size = sum(-(-file.stat().st_size // 4096) for file in (tmp_path / "whole").iterdir()) * 4096
    for room in (4096, 65536, size // 2, size - 4096):
        with small_disk(tmp_path / f"disk{room}", room) as disk:
            with pytest.raises(
                UserError, match=r"/out(\.partial/\S+)?: the disk is full or over its quota; free some space"
            ):
                export.run(config, disk / "out")
            assert list(disk.iterdir()) == []
            if room == size - 4096:
                grow(disk, size + 8192)
                export.run(config, disk / "out")
                assert {file.name for file in (disk / "out").iterdir()} == {
                    file.name for file in (tmp_path / "whole").iterdir()
                }


@pytest.mark.parametrize("fails", ["save_file", "write_json", "write_text", "copymode"])
def test_an_export_that_fails_at_any_write_leaves_nothing(data, runs, fails, tmp_path, monkeypatch):
    """Like the test before it, without a small disk: the write happens, and then the disk is reported full."""
    holder = {"write_text": pathlib.Path, "copymode": shutil}.get(fails, export)
    write = getattr(holder, fails)

    def full(*arguments, **options):
        write(*arguments, **options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(holder, fails, full)
    with pytest.raises(UserError, match=r"/out(\.partial/\S+)?: the disk is full or over its quota; free some space"):
        written(data, runs[0] / "bert", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_help_the_tokenizer_are_predicted_like_the_unknown_one():
    model = Functional("mlm", small_config("bert", tied_decoder=False))
    params = random_params(model)
    wide, widened = export.with_helpers(model, params, 3, unknown=1)
    shapes = jax.tree.map(np.shape, widened), jax.tree.map(lambda leaf: leaf.shape, wide.abstract())
    assert shapes[0] == shapes[1] and wide.config.vocab_size == model.config.vocab_size + 3
    for before, after in zip(model.decoder(params), wide.decoder(widened), strict=True):
        np.testing.assert_array_equal(after[:-3], before)
        np.testing.assert_array_equal(after[-3:], np.stack([before[1]] * 3))


def test_card_says_what_it_is_and_where_it_comes_from(data, runs, tmp_path):
    folder, _ = runs
    written(data, folder / "bert", tmp_path / "student")
    card = (tmp_path / "student" / "README.md").read_text(encoding="utf-8")
    for words in (
        'pipeline_tag: "fill-mask"',
        "Distilled from",
        "50% task-specific text",
        "masked-LM loss on task text, nats per masked token | 2.50",
        "masked-token accuracy on task text, % | 50.0",
        "No license is stated. Set config.export.license to state one.",
    ):
        assert words in card, words
    assert "base_model" not in card and "\nlicense:" not in card
    written(data, folder / "icner", tmp_path / "icner")
    card = (tmp_path / "icner" / "README.md").read_text(encoding="utf-8")
    for words in (
        "Finetuned on 20 labeled utterances",
        "On the 7 dev utterances, in %:",
        "| DC error | 25.0 |",
        "intent_head.saf",
    ):
        assert words in card, words
    assert "score" not in card.split("## How well")[1].split("## How to")[0]


def front_matter(folder):
    return metadata_load(folder / "README.md")


def test_card_states_base_model_and_license(data, runs, tmp_path, monkeypatch):
    """Those of the imported teacher; config.export.license takes precedence."""
    folder, _ = runs
    config = written(data, folder / "bert", tmp_path / "hub")
    (tmp_path / "hub" / "README.md").write_text("---\nlicense: mit\n---\n# A model\n", encoding="utf-8")
    for name, path in (("from_hub", "org/name"), ("from_folder", str(tmp_path / "hub"))):
        config.import_model.path = path
        monkeypatch.setattr(import_model, "model_folder", lambda name, revision: tmp_path / "hub")
        monkeypatch.setattr(import_model, "check_tokenizer", lambda *which: None)
        import_model.run(config, tmp_path / name)
        student = of_family(data[0].copy_and_resolve_references(), "bert")
        student.teacher_checkpoint = str(tmp_path / name)
        write_student(tmp_path / f"student_{name}", student, data[1])
        written(data, tmp_path / f"student_{name}", tmp_path / f"out_{name}")
        card = front_matter(tmp_path / f"out_{name}")
        assert card["license"] == "mit" and card.get("base_model") == (path if name == "from_hub" else None)
        assert "Set config.export.license" not in (tmp_path / f"out_{name}" / "README.md").read_text(encoding="utf-8")
    config.export.update({"checkpoint": str(tmp_path / "student_from_hub"), "license": "apache-2.0"})
    export.run(config, tmp_path / "licensed")
    assert front_matter(tmp_path / "licensed")["license"] == "apache-2.0"
    config.export.update({"license": ""})
    with pytest.raises(UserError, match="something other than this export"):
        export.run(config, tmp_path / "licensed")


def test_an_export_of_an_older_version_is_the_same_export(data, runs, tmp_path):
    config = written(data, runs[0] / "dc", tmp_path / "out")
    record = json.loads((tmp_path / "out" / serving.RECORD).read_text(encoding="utf-8"))
    assert "license" not in record["config"]["export"]
    export.run(config, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "license"),
    [
        (None, ""),
        ("# A model", ""),
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\ntags: [a]\n---\n", ""),
        ("---\nlicense: [a, b]\n---\n", ""),
        ("---\nlicense: [a\n---\n", ""),
    ],
)
def test_stated_license(text, license, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert import_model.stated_license(tmp_path) == license


def test_card_states_test_results(data, runs, tmp_path):
    """Of the run that is named, or of one that lies beside the model's."""
    folder, _ = runs
    config = data[0].copy_and_resolve_references()
    config.evaluate.checkpoint = str(folder / "dc")
    evaluate.run(config, folder / "dc_test")
    rows = read_json_lines(folder / "dc_test" / evaluate.RESULTS)
    (error,) = [row for row in rows if (row["scope"], row["metric"], row["test_set"]) == ("all", "error_rate", "test")]
    written(data, folder / "dc", tmp_path / "beside")
    card = (tmp_path / "beside" / "README.md").read_text(encoding="utf-8")
    assert "On the test partition (`dc_test`)" in card and f"| DC error | {100 * error['value']:.1f} | " in card
    assert "| in % | test | tail | test_unseen |" in card or "| in % | test | test_unseen | tail |" in card
    written(data, folder / "icner", tmp_path / "icner")
    assert "test partition" not in (tmp_path / "icner" / "README.md").read_text(encoding="utf-8")
    (folder / "dc_test").rename(tmp_path / "scores")
    config.export.update({"checkpoint": str(folder / "dc"), "results": str(tmp_path / "scores")})
    export.run(config, tmp_path / "named")
    assert "On the test partition (`scores`)" in (tmp_path / "named" / "README.md").read_text(encoding="utf-8")
    for checkpoint, results, message in (
        ("icner", tmp_path / "scores", r"config\.export\.results: .* scored .*dc, not .*icner"),
        ("dc", folder / "icner", r"config\.export\.results: .* is not a finished evaluate run"),
    ):
        config.export.update({"checkpoint": str(folder / checkpoint), "results": str(results)})
        with pytest.raises(UserError, match=message):
            export.run(config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_labels_and_heads(data, runs, tmp_path):
    folder, found = runs
    written(data, folder / "icner", tmp_path / "icner")
    maps = found["icner"][2]
    values = json.loads((tmp_path / "icner" / "config.json").read_text())
    assert tuple(values["id2label"].values()) == maps.tags
    assert tuple(values["intents"]) == maps.intents
    with TensorFiles(tmp_path / "icner") as files:
        assert files.shape("classifier.weight")[0] == len(maps.tags)
    modes = {file.stat().st_mode for file in (tmp_path / "icner").iterdir()}
    assert (tmp_path / "icner" / "intent_head.safetensors").is_file() and len(modes) == 1


def test_a_run_of_a_version_without_pooling_reads_the_first_token(data, runs, tmp_path):
    shutil.copytree(runs[0] / "dc", tmp_path / "dc")
    file = tmp_path / "dc" / "config.json"
    values = read_json(file)
    for key in ("pooling", "patience", "encoder_rate", "max_dev"):
        del values["config"]["finetune"][key]
    write_json(file, values)
    one = export.read_run(tmp_path / "dc", make_mesh(Mesh()))
    assert one.model == runs[1]["dc"][0] and one.model.pooling == "first"


def test_a_pooled_classifier_is_a_class_of_transformers_or_has_a_separate_head(data, runs, tmp_path):
    folder, found = runs
    for name in ("dc-class", "dc-apart"):
        written(data, folder / name, tmp_path / name)
    values, apart = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("dc-class", "dc-apart"))
    assert values["architectures"] == ["ModernBertForSequenceClassification"]
    assert values["classifier_pooling"] == "mean" and not (tmp_path / "dc-class" / "domain_head.safetensors").exists()
    assert apart["architectures"] == ["BertModel"] and tuple(apart["domains"]) == found["dc-apart"][2].domains
    assert (tmp_path / "dc-apart" / "domain_head.safetensors").is_file()
    card = (tmp_path / "dc-apart" / "README.md").read_text(encoding="utf-8")
    assert "reads the mean of the last hidden states of all tokens" in card and "pooling mean, seed 0" in card
    assert 'pipeline_tag: "feature-extraction"' in card


def test_the_same_export_is_left_and_another_refused(data, runs, tmp_path):
    folder, _ = runs
    written(data, folder / "dc", tmp_path / "out")
    before = (tmp_path / "out" / "export.json").read_text()
    written(data, folder / "dc", tmp_path / "out")
    assert (tmp_path / "out" / "export.json").read_text() == before
    with pytest.raises(UserError, match="holds something other than this export"):
        written(data, folder / "icner", tmp_path / "out")
    with pytest.raises(UserError, match="holds something other than this export"):
        written(data, folder / "dc", folder / "dc")
    assert (folder / "dc" / "DONE").is_file()


def test_what_cannot_be_exported_is_named(data, tmp_path):
    with pytest.raises(UserError, match=r"config\.export\.checkpoint: it is empty"):
        written(data, "", tmp_path / "out")
    with pytest.raises(UserError, match=r"config\.export\.checkpoint: .* is not finished"):
        written(data, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def trimmed(data, tmp_path_factory):
    """(config, folder, prepared, and what each is) of a student and a DC model with a trimmed vocabulary."""
    config = of_family(data[0], "bert")
    config.vocabulary.update({"trim": True, "min_count": 2})
    prepared = seen_by_student(data[1], read(Vocabulary, config.vocabulary, "vocabulary"))
    folder = tmp_path_factory.mktemp("trimmed")
    found = {"mlm": write_student(folder / "mlm", config, prepared)}
    found["dc"] = write_finetuned(folder / "dc", config, prepared, "dc")
    return config, folder, prepared, found


def test_a_trimmed_vocabulary_is_written_as_a_tokenizer_of_its_own(data, trimmed, tmp_path):
    from transformers import AutoTokenizer

    _, folder, prepared, found = trimmed
    written(data, folder / "mlm", tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [one.text for one in prepared.utterances if one.partition == "train"]
    kept, ours = 0, prepared.tokenizer
    for text, ids in zip(texts, ours.encode(texts)):
        if ours.unk_id not in ids:
            assert theirs(text)["input_ids"] == [ours.cls_id, *ids.tolist(), ours.sep_id], text
            kept += 1
    assert kept > 10
    _, params = found["mlm"]
    with TensorFiles(tmp_path / "out") as files:
        table = files.read("bert.embeddings.word_embeddings.weight")
        bias = files.read("cls.predictions.bias")
    size, unknown = ours.vocab_size, ours.unk_id
    assert len(table) == len(bias) == Tokenizer.load(tmp_path / "out").vocab_size >= size
    np.testing.assert_array_equal(table[:size], params["encoder"]["embeddings"]["tokens"])
    assert (table[size:] == table[unknown]).all() and (bias[size:] == bias[unknown]).all()
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["vocab_size"] == len(table)


def test_a_trimmed_model_answers_alike_from_its_run_and_its_export(data, trimmed, tmp_path):
    _, folder, prepared, _ = trimmed
    one = export.read_run(folder / "dc", make_mesh(Mesh()))
    (tmp_path / "out").mkdir()
    length = prepared.settings.rows.length
    form = {"length": length, "seen": one.seen, "int8": False, "program": False}
    serving.write(tmp_path / "out", one.model, one.params, one.classes, **form)
    one.tokenizer.save(tmp_path / "out")
    run = predict.Predictor([str(folder / "dc")])
    unknown = prepared.tokenizer.unk_id
    texts = [one.text for one in prepared.utterances[:200]]
    texts = [text for text, ids in zip(texts, prepared.tokenizer.encode(texts)) if unknown not in ids]
    assert predict.Predictor([str(tmp_path / "out")]).predict(texts[:20]) == run.predict(texts[:20])


def test_an_export_on_the_hub_is_read_by_its_name(data, runs, tmp_path):
    """Offline, from the cache that a download leaves: its tokenizer, and the folder that import_model reads."""
    written(data, runs[0] / "bert", tmp_path / "out")
    environment = hub_cache.put(tmp_path / "cache", "someone/student", tmp_path / "out")
    code = (
        "from kd_jax.data.text.tokenizer import Tokenizer; from kd_jax.main.import_model import model_folder\n"
        "print(Tokenizer.load('someone/student').fingerprint, model_folder('someone/student'))\n"
    )
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fingerprint, folder = done.stdout.split()[-2:]
    assert fingerprint == data[1].tokenizer.fingerprint == Tokenizer.load(folder).fingerprint
    assert hub_cache.COMMIT in folder
    config = data[0].copy_and_resolve_references()
    config.import_model.path = folder
    import_model.run(config, tmp_path / "back")
    fingerprints = {trained.parameters_fingerprint(one, "x") for one in (tmp_path / "back", runs[0] / "bert")}
    assert len(fingerprints) == 1


def example(folder):
    """The example of a folder's card, as a file beside it."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    (folder / "example.py").write_text(code.group(1))
    return folder / "example.py"


@pytest.mark.parametrize("name", [*SHAPES, "dc", "icner", *POOLED])
def test_examples_of_the_cards_run(data, runs, name, tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="the examples use PyTorch")
    folder, found = runs
    written(data, folder / name, tmp_path / "out")
    file = example(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    values = runpy.run_path(str(file))
    assert capsys.readouterr().out
    tokenizer, text = data[1].tokenizer, "wake me up at seven"
    ids = [tokenizer.cls_id, *tokenizer.encode([text])[0].tolist(), tokenizer.sep_id]
    batch = {
        "tokens": np.array([ids], np.int32),
        "segment_ids": np.ones((1, len(ids)), np.int32),
        "positions": np.arange(len(ids), dtype=np.int32)[None],
        "first_positions": np.zeros((1, 1), np.int32),
    }
    model, params = found[name][:2]
    if name in SHAPES:
        batch["tokens"][0, 2] = tokenizer.mask_id
        ours, theirs = model.mlm_logits(params, model.hidden(params, batch)), values["logits"]
    elif model.kind == "dc":
        ours, theirs = model.domain_logits(params, batch)[0, 0], values["logits"].squeeze(0)
    else:
        intents, tags = model.intent_and_tag_logits(params, batch)
        ours, theirs = intents[0, 0], values["logits"]
        assert tags[0].argmax(-1).tolist() == values["tags"]
    assert isinstance(theirs, torch.Tensor)
    np.testing.assert_allclose(np.asarray(ours), theirs.numpy(), atol=1e-5)


def test_examples_compile_without_torch(data, runs, tmp_path):
    for name in ("bert", "dc", "icner", "dc-apart"):
        written(data, runs[0] / name, tmp_path / name)
        file: pathlib.Path = example(tmp_path / name)
        program = compile(file.read_text(), str(file), "exec")
        assert {"transformers", "from_pretrained"} <= set(program.co_names), name
