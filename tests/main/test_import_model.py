"""A model of `transformers` as a finished run: others check it, continue it and distill from it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kd_jax.config import base, from_dict
from kd_jax.config.execution import Mesh
from kd_jax.data.text.tokenizer import train_tokenizer
from kd_jax.jobs import finetune, trained
from kd_jax.main import cache_teacher, distill, evaluate, finetune_dc, import_model, pretrain
from kd_jax.models.encoder_config import encoder_config
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.checkpoint import head_map, to_huggingface
from kd_jax.models.huggingface.config import their_config
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError
from tests.support.finished_runs import smoke_config
from tests.support.small_models import small_config


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return smoke_config(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def source(data, tmp_path_factory):
    """(folder of a small BERT as `save_pretrained` would write it, its encoder config, its parameters)."""
    _, prepared = data
    shape = small_config("bert", vocab_size=prepared.tokenizer.vocab_size, num_layers=2)
    params = jax.jit(Functional("mlm", shape).init)(jax.random.key(3))
    folder = tmp_path_factory.mktemp("source")
    write(folder, shape, to_huggingface(params, shape), prepared.tokenizer)
    return folder, shape, params


def write(folder, shape, tensors, tokenizer, **changes):
    (folder / "config.json").write_text(json.dumps(their_config(shape) | changes))
    save_file(tensors, folder / "model.safetensors")
    tokenizer.save(folder)


def imported(data, folder, workdir):
    config = data[0].copy_and_resolve_references()
    config.import_model.path = str(folder)
    import_model.run(config, workdir)
    return config


def read_back(workdir, prepared, config):
    block = trained.encoder_block(workdir, "x")
    model = Functional("mlm", encoder_config(block, prepared.tokenizer.vocab_size))
    return trained.trained_params(workdir, model, make_mesh(Mesh()))


def equal(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)


def test_import_is_a_finished_run(data, source, tmp_path, capsys):
    folder, shape, params = source
    config = imported(data, folder, tmp_path / "run")
    assert capsys.readouterr().out == ""
    heldout = json.loads((tmp_path / "run" / "heldout.json").read_text())
    assert {row["kind"] for row in heldout} == {"generic", "task"}
    equal(read_back(tmp_path / "run", data[1], config), params)
    trained.check_tokenizer(tmp_path / "run", data[1], "x")
    assert len(trained.parameters_fingerprint(tmp_path / "run", "x")) == 64
    assert trained.encoder_block(tmp_path / "run", "x")["norm_epsilon"] == shape.norm_epsilon
    before = (tmp_path / "run" / "DONE").read_text()
    import_model.run(config, tmp_path / "run")
    assert (tmp_path / "run" / "DONE").read_text() == before


def test_records_name_the_embedded_model_and_not_its_folder(data, source, tmp_path, monkeypatch):
    monkeypatch.setattr(import_model, "embedded_model", lambda key: source[0])
    imported(data, "embedded", tmp_path / "run")
    records = [(tmp_path / "run" / name).read_text() for name in ("config.json", "run.json")]
    assert json.loads(records[1])["source"] == "multilingual-e5-small, 4 bits"
    assert not any(str(source[0]) in record for record in records)


def test_a_new_head_is_told_of_and_the_same_for_a_seed(data, source, tmp_path, capsys):
    folder, shape, params = source
    head = {entry.name for entry in head_map(shape)}
    body = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in head}
    other = tmp_path / "body"
    other.mkdir()
    write(other, shape, body, data[1].tokenizer, tie_word_embeddings=False)
    config = imported(data, other, tmp_path / "run")
    assert "no masked-LM head" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["masked_lm_head"] == "new"
    first = read_back(tmp_path / "run", data[1], config)
    equal(first["encoder"], params["encoder"])
    assert "decoder" not in first["mlm_head"], "a new head is tied, whatever the file says"
    counts = np.ones(shape.vocab_size)
    for store in data[1].stores("train"):
        if store.kind == "generic":
            counts += store.token_counts(shape.vocab_size)
    special = list(data[1].tokenizer.special_ids)
    ordinary = np.setdiff1d(np.arange(shape.vocab_size), special)
    bias = np.asarray(first["mlm_head"]["bias"], np.float64)
    np.testing.assert_allclose(np.exp(bias[ordinary]), counts[ordinary] / counts[ordinary].sum(), rtol=1e-4)
    assert bias[special].max() < bias[ordinary].min()
    assert json.loads((tmp_path / "run" / "heldout.json").read_text()) == [], "a head that nobody trained has no loss"
    imported(data, other, tmp_path / "again")
    equal(read_back(tmp_path / "again", data[1], config), first)


def test_rows_without_a_piece_are_left_out(data, source, tmp_path, capsys):
    folder, shape, params = source
    padded = {name: np.asarray(tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        tensor = padded[name]
        padded[name] = np.concatenate([tensor, np.ones((6, *tensor.shape[1:]), np.float32)])
    other = tmp_path / "padded"
    other.mkdir()
    write(other, shape, padded, data[1].tokenizer, vocab_size=shape.vocab_size + 6)
    config = imported(data, other, tmp_path / "run")
    assert "6 rows of the token table" in capsys.readouterr().out
    equal(read_back(tmp_path / "run", data[1], config), params)


def test_mistakes_leave_nothing(data, source, tmp_path):
    folder, shape, _ = source
    tensors = load_file(folder / "model.safetensors")
    other = tmp_path / "other"
    other.mkdir()

    def refused(match, path=other):
        with pytest.raises(UserError, match=match):
            imported(data, path, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    refused(r"config\.import_model\.path: it is empty", "")
    refused(r"config\.import_model\.path: there is no folder /nowhere/at all", "/nowhere/at all")
    refused(r"the hub gave no model of that name", "someone/no-such-model")
    refused(r"holds no config\.json")
    write(other, shape, tensors, data[1].tokenizer, model_type="gpt2")
    refused(r"model_type: 'gpt2' is not supported")
    write(other, shape, tensors, train_tokenizer(["eins zwei drei"] * 5, 40))
    refused(r"config\.prepared: its rows were made with another tokenizer.*: id \d+ stands for")
    write(other, shape, tensors, data[1].tokenizer, vocab_size=shape.vocab_size - 1)
    refused(rf"vocab_size is {shape.vocab_size - 1}, and the tokenizer has {shape.vocab_size} tokens")
    write(other, shape, dict(list(tensors.items())[1:]), data[1].tokenizer)
    refused("the checkpoint lacks this tensor")
    (other / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-50])
    refused("is not a complete safetensors file")


def as_teacher(data, source):
    config = data[0].copy_and_resolve_references()
    config.teacher = base.encoder("mbert", **{**dataclasses.asdict(source[1]), "vocab_size": 0})
    return config


def test_the_head_alone_is_trained(data, source, tmp_path):
    folder, _, params = source
    imported(data, folder, tmp_path / "run")
    config = as_teacher(data, source)
    config.pretrain.init_from = str(tmp_path / "run")
    config.pretrain.steps = 3
    config.train_body = False
    pretrain.run(config, tmp_path / "head")
    after = read_back(tmp_path / "head", data[1], config)
    equal(after["encoder"], params["encoder"])
    moved = jax.tree.map(
        lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), after["mlm_head"], params["mlm_head"]
    )
    assert jax.tree.all(moved)


def test_going_on_asks_for_the_same_model(data, source, tmp_path):
    imported(data, source[0], tmp_path / "run")
    config = as_teacher(data, source)
    config.pretrain.init_from = str(tmp_path / "run")
    config.teacher.norm_epsilon = 1e-3
    with pytest.raises(UserError, match=r"config\.teacher\.norm_epsilon: it is 0\.001, and .* has 1e-12"):
        pretrain.run(config, tmp_path / "other")


def write_finetuned(folder, family, prepared, head):
    """(encoder config, parameters) of a classifier that was finetuned, in a folder as `save_pretrained` writes it."""
    shape = small_config(family, vocab_size=prepared.tokenizer.vocab_size, num_layers=2, max_positions=64)
    params = jax.jit(Functional("mlm", shape).init)(jax.random.key(3))
    own = {entry.name for entry in head_map(shape)}
    tensors = {name: tensor for name, tensor in to_huggingface(params, shape).items() if name not in own}
    tensors |= {name: np.ones(size, np.float32) for name, size in head.items()}
    folder.mkdir()
    labels = {str(number): f"label {number}" for number in range(3)}
    kind = "single_label_classification"
    write(folder, shape, tensors, prepared.tokenizer, id2label=labels, problem_type=kind)
    return shape, params


SEQUENCE_HEAD = {"bert.pooler.dense.weight": (16, 16), "classifier.weight": (3, 16), "classifier.bias": (3,)}


@pytest.mark.parametrize(
    ("family", "head"),
    # BertForSequenceClassification and XLMRobertaForTokenClassification.
    [("bert", SEQUENCE_HEAD), ("roberta", {"classifier.weight": (5, 16), "classifier.bias": (5,)})],
)
def test_a_finetuned_classifier_has_states_and_no_predictions(data, tmp_path, capsys, family, head):
    _, params = write_finetuned(tmp_path / "source", family, data[1], head)
    config = imported(data, tmp_path / "source", tmp_path / "run")
    printed = capsys.readouterr().out
    assert "head of a finetuned model: classifier.bias, classifier.weight." in printed and "new one" in printed
    equal(read_back(tmp_path / "run", data[1], config)["encoder"], params["encoder"])
    config.teacher_checkpoint = str(tmp_path / "run")
    config.distill.kl.weight = 1.0
    for command, key in ((distill, "distill.kl.weight"), (cache_teacher, "teacher_checkpoint")):
        with pytest.raises(UserError, match=rf"^config\.{key}: .*/run was imported without a masked-LM head.*weight=0"):
            command.run(config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def assert_finetuned_from(config, folder, prepared, params):
    """Finetunes folder/run into folder/dc at a rate of next to nothing: the encoder is that of `params`."""
    config.finetune.update({"init_from": str(folder / "run"), "steps": 1, "learning_rate": 1e-9, "warmup_steps": 0})
    finetune_dc.run(config, folder / "dc")
    one = finetune.load_finetuned(folder / "dc", prepared, make_mesh(Mesh()), "float32", "x")
    for a, b in zip(jax.tree.leaves(one.params["encoder"]), jax.tree.leaves(params["encoder"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.long
def test_distilling_the_states_of_a_finetuned_classifier_and_going_on_from_it(data, tmp_path):
    _, params = write_finetuned(tmp_path / "source", "bert", data[1], SEQUENCE_HEAD)
    config = imported(data, tmp_path / "source", tmp_path / "run")
    config.teacher_checkpoint = str(tmp_path / "run")
    config.distill.clean = True
    config.distill.kl.weight = config.distill.mlm.weight = 0.0
    config.distill.hidden.update({"weight": 1.0, "layers": "last"})
    distill.run(config, tmp_path / "student")
    assert (tmp_path / "student" / "DONE").is_file()
    assert_finetuned_from(config, tmp_path, data[1], params)


@pytest.mark.slow
def test_distilling_from_and_finetuning_an_imported_model(data, source, tmp_path):
    imported(data, source[0], tmp_path / "run")
    config = data[0].copy_and_resolve_references()
    config.teacher_checkpoint = str(tmp_path / "run")
    distill.run(config, tmp_path / "student")
    assert (tmp_path / "student" / "DONE").is_file()
    assert_finetuned_from(config, tmp_path, data[1], source[2])
    assert (tmp_path / "dc" / "DONE").is_file()
    assert evaluate.lineage(str(tmp_path / "dc"))["student"] == "imported"
    assert from_dict(json.loads((tmp_path / "dc" / "config.json").read_text())).command == "finetune_dc"
