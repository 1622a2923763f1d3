"""Tensors of each family: round trip, merged projections, clear errors; exports, which PyTorch computes the same."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.checkpoint import exported, name_map, to_huggingface, tokenizer_ids
from kd_jax.models.huggingface.config import encoder_values
from kd_jax.types import UserError
from tests.support.finished_runs import random_params
from tests.support.huggingface import from_huggingface
from tests.support.small_models import FAMILIES, packed_batch, parameters, small_config

EXPORTED = ("bert", "distilbert", "roberta", "xlmr_xl", "modernbert")
CLASSES = {"domains": ("alarm", "music", "news"), "intents": ("play", "stop"), "tags": ("O", "B-time", "I-time")}
LENGTHS = (12, 5)


@pytest.fixture(params=FAMILIES)
def case(request):
    config = small_config(request.param)
    params = parameters(Functional("mlm", config))
    return config, params, to_huggingface(params, config)


def test_round_trip(case):
    config, params, tensors = case
    assert tensors.keys() == {entry.name for entry in name_map(config)}
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(tensors, config), jax.tree.map(np.asarray, params))


def test_every_value_has_exactly_one_place(case):
    config, _, tensors = case
    numbered, first = {}, 2  # above the ones of the norm that is left out
    for name, tensor in tensors.items():
        numbered[name] = np.arange(first, first + tensor.size, dtype=np.float32).reshape(tensor.shape)
        first += tensor.size
    values = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(from_huggingface(numbered, config))])
    unused = config.hidden_size if config.skip_first_attention_norm else 0
    assert len(values) == sum(tensor.size for tensor in tensors.values()) + unused
    assert len(np.unique(values[values > 1])) == len(values) - unused


def test_tensors_lie_where_the_encoder_reads_them():
    config = small_config("bert")
    tensors = to_huggingface(parameters(Functional("mlm", config)), config)
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    params = from_huggingface(tensors, config)
    kernel = params["encoder"]["layers"]["attention"]["query_key_value"]["kernel"]
    for part, name in enumerate(("query", "key", "value")):
        weight = tensors[f"bert.encoder.layer.2.attention.self.{name}.weight"]
        ours = np.einsum("h,hnd->nd", x, kernel[2, :, part])
        np.testing.assert_allclose(ours.ravel(), weight @ x, rtol=1e-4, atol=1e-5)
    table = tensors["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(params["encoder"]["embeddings"]["tokens"], table)
    output = params["encoder"]["layers"]["attention"]["output"]["kernel"][1]
    weight = tensors["bert.encoder.layer.1.attention.output.dense.weight"]
    np.testing.assert_allclose(np.einsum("nd,ndh->h", x.reshape(2, 8), output), weight @ x, rtol=1e-4, atol=1e-5)


def test_errors_name_the_tensor(case):
    config, _, tensors = case
    last = list(tensors)[-4]
    with pytest.raises(UserError, match=last.replace(".", r"\.")):
        from_huggingface({name: tensor for name, tensor in tensors.items() if name != last}, config)
    with pytest.raises(UserError, match="surprise"):
        from_huggingface(tensors | {"surprise.weight": np.zeros(3)}, config)
    with pytest.raises(UserError, match=last.replace(".", r"\.")):
        from_huggingface(tensors | {last: np.zeros((5, 3, 2), np.float32)}, config)


def test_untied_embeddings_are_refused():
    config = small_config("modernbert")
    tensors = to_huggingface(parameters(Functional("mlm", config)), config)
    table = tensors["model.embeddings.tok_embeddings.weight"]
    from_huggingface(tensors | {"decoder.weight": table.copy()}, config)
    with pytest.raises(UserError, match=r"decoder\.weight: differs .* set its tie_word_embeddings to false"):
        from_huggingface(tensors | {"decoder.weight": table + 1}, config)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_untied_decoder_is_imported_and_exported(family):
    config = small_config(family, tied_decoder=False)
    params = parameters(Functional("mlm", config))
    params["mlm_head"]["bias"] = params["mlm_head"]["bias"] + np.arange(config.vocab_size)
    tensors = to_huggingface(params, config)
    (decoder,) = (name for name in tensors if name.endswith("decoder.weight"))
    assert tensors[decoder].shape == (config.vocab_size, config.hidden_size)

    def same(stored):
        back = from_huggingface(stored, config)
        jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(np.asarray, params))

    same(tensors)
    bias = decoder.replace(".weight", ".bias")
    if (other := {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}.get(config.head_style)) is not None:
        same({name: tensor for name, tensor in tensors.items() if name != bias})  # as older files have it
        same(tensors | {other: tensors[other] + 1})  # which `transformers` does not read
    for missing in (decoder, bias):
        with pytest.raises(UserError, match=missing.replace(".", r"\.")):
            from_huggingface({k: v for k, v in tensors.items() if k not in (missing, other)}, config)


def model_of(family, kind):
    shape = small_config("bert", type_vocab_size=0) if family == "distilbert" else small_config(family)
    # Two more of each class than there are names, as in a model of one domain among several.
    sizes: Any = {"dc": {"domains": 5}, "icner": {"intents": 4, "tags": 5}, "mlm": {}}[kind]
    return Functional(kind, shape, **sizes)


def test_a_masked_lm_reads_back_exactly():
    for family in EXPORTED:
        model = model_of(family, "mlm")
        params = parameters(model)
        found = exported(model, params, {})
        back = from_huggingface(found.tensors, model.config)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), back, params)
        assert encoder_values(found.config, "x")["hidden_size"] == model.config.hidden_size


@pytest.mark.parametrize("family", EXPORTED)
def test_classes_that_only_pad_are_left_out(family):
    dc = exported(model_of(family, "dc"), parameters(model_of(family, "dc")), CLASSES)
    assert dc.config["id2label"] == {"0": "alarm", "1": "music", "2": "news"}
    assert dc.config["label2id"]["news"] == 2
    classifiers = [
        tensor for name, tensor in dc.tensors.items() if name in ("classifier.weight", "classifier.out_proj.weight")
    ]
    assert [len(one) for one in classifiers] == [3]
    icner = exported(model_of(family, "icner"), parameters(model_of(family, "icner")), CLASSES)
    assert icner.config["intents"] == ["play", "stop"]
    assert len(icner.tensors["classifier.weight"]) == 3
    assert len(icner.text_head["classifier.weight"]) == len(icner.text_head["classifier.bias"]) == 2


@pytest.mark.parametrize("family", EXPORTED)
@pytest.mark.parametrize("count", [1, 2])
def test_transformers_reads_the_config_of_every_number_of_classes(family, count, tmp_path):
    from transformers import AutoConfig

    names = ("alarm", "music")[:count]
    for kind, classes in (
        ("dc", {"domains": names}),
        ("icner", {"intents": names, "tags": ("O", "B-a", "I-a")[: 2 * count - 1]}),
    ):
        shape = model_of(family, "mlm").config
        model: Any = Functional(kind, shape, **{key: len(value) for key, value in classes.items()})
        found = exported(model, parameters(model), classes)
        (tmp_path / "config.json").write_text(json.dumps(found.config))
        theirs = AutoConfig.from_pretrained(tmp_path)
        labels = classes["domains" if kind == "dc" else "tags"]
        assert theirs.num_labels == len(labels) and tuple(theirs.id2label.values()) == labels


def test_padding_that_positions_are_counted_by():
    roberta = small_config("roberta")
    assert tokenizer_ids(roberta, cls=0, sep=2, pad=1)["pad_token_id"] == 1
    with pytest.raises(UserError, match=r"encoder\.position_offset: .* padding id of 1, and the tokenizer's is 0"):
        tokenizer_ids(roberta, cls=2, sep=3, pad=0)
    assert tokenizer_ids(small_config("bert"), cls=2, sep=3, pad=0)["pad_token_id"] == 0


@pytest.mark.parametrize(
    ("family", "pooling", "apart"),
    [("bert", "mean", True), ("roberta", "max", True), ("modernbert", "mean", False), ("modernbert", "max", True)],
)
def test_a_pooling_that_the_family_lacks_exports_the_head_separately(family, pooling, apart):
    model = dataclasses.replace(model_of(family, "dc"), pooling=pooling)
    found = exported(model, parameters(model), CLASSES)
    whole = found.config["architectures"][0]
    if apart:
        assert whole.endswith("Model") and found.config["domains"] == list(CLASSES["domains"])
        assert found.config["pooling"] == pooling and found.text_head["classifier.weight"].shape == (3, 16)
        assert not any("classifier" in name for name in found.tensors)
    else:
        assert whole == "ModernBertForSequenceClassification" and not found.text_head
        assert found.config["classifier_pooling"] == pooling
    first = exported(model_of(family, "dc"), parameters(model), CLASSES)
    assert not first.text_head and first.config.get("classifier_pooling", "cls") == "cls"


@pytest.mark.parametrize(
    ("family", "kind", "pooling"),
    [
        *((family, kind, "first") for family in EXPORTED for kind in ("mlm", "dc", "icner")),
        ("modernbert", "dc", "mean"),
        *((family, "untied", "first") for family in EXPORTED),
    ],
)
def test_torch_computes_the_same(family, kind, pooling, tmp_path):
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    transformers = pytest.importorskip("transformers")
    tied, kind = kind != "untied", "mlm" if kind == "untied" else kind
    model = dataclasses.replace(model_of(family, kind), pooling=pooling)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, tied_decoder=tied))
    params = far_from_initial(parameters(model))
    found = exported(model, params, CLASSES)
    values = found.config | tokenizer_ids(model.config, cls=0, sep=2, pad=1)
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(found.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    auto = {"mlm": "MaskedLM", "dc": "SequenceClassification", "icner": "TokenClassification"}[kind]
    theirs, info = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == found.config["architectures"][0]
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]

    batch = packed_batch([[length] for length in LENGTHS], max(LENGTHS))
    batch["tokens"] = np.where(batch["segment_ids"] > 0, np.maximum(batch["tokens"], 3), 1)
    with torch.no_grad():
        logits = theirs.eval()(
            input_ids=torch.tensor(batch["tokens"]), attention_mask=torch.tensor(batch["segment_ids"])
        ).logits.numpy()
    batch["first_positions"] = np.zeros((len(LENGTHS), 1), np.int32)
    if kind == "mlm":
        ours = jax.jit(lambda p: model.mlm_logits(p, model.hidden(p, batch)))(params)
    elif kind == "dc":
        ours = jax.jit(lambda p: model.domain_logits(p, batch))(params)[:, 0, :3]
    else:
        ours = jax.jit(lambda p: model.intent_and_tag_logits(p, batch)[1])(params)[..., :3]
    mask = batch["segment_ids"] > 0 if kind != "dc" else np.ones(len(LENGTHS), bool)
    error = np.abs(np.asarray(ours) - logits)[mask].max()
    print(f"{family} {kind}: largest error {error:.1e} among logits up to {np.abs(logits[mask]).max():.1f}")
    assert np.abs(logits[mask]).max() > 0.1
    assert error < 1e-5 * max(1.0, np.abs(logits[mask]).max())


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", EXPORTED)
def test_torch_loads_every_number_of_classes(family, count, tmp_path):
    torch = pytest.importorskip("torch", reason="loading needs PyTorch")
    transformers = pytest.importorskip("transformers")
    shape, names = model_of(family, "mlm").config, ("alarm", "music")[:count]
    for auto, kind, pooling, classes in (
        ("AutoModelForSequenceClassification", "dc", "first", {"domains": names}),
        ("AutoModel", "dc", "max", {"domains": names}),
        ("AutoModelForTokenClassification", "icner", "first", {"intents": names, "tags": ("O", "B-a", "I-a")[:count]}),
    ):
        sizes: Any = {key: len(value) for key, value in classes.items()}
        model = Functional(kind, shape, pooling=pooling, **sizes)
        found = exported(model, random_params(model), classes)
        folder = tmp_path / auto
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(found.config | tokenizer_ids(model.config, cls=0, sep=2, pad=1)))
        save_file(found.tensors, folder / "model.safetensors", metadata={"format": "pt"})
        theirs, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
        assert type(theirs).__name__ == found.config["architectures"][0]
        assert not info["unexpected_keys"] and not info["mismatched_keys"]
        assert all("pooler" in name for name in info["missing_keys"]), "only AutoModel adds a layer of its own"
        with torch.no_grad():
            output = theirs.eval()(input_ids=torch.tensor([[0, 5, 7, 2]]))
        if auto == "AutoModel":
            assert output.last_hidden_state.shape == (1, 4, 16) and len(found.text_head["classifier.weight"]) == count
        else:
            labels = classes["domains" if kind == "dc" else "tags"]
            assert output.logits.shape == ((1, count) if kind == "dc" else (1, 4, count))
            assert tuple(theirs.config.id2label.values()) == labels


def far_from_initial(params):
    """Norms and biases are ones and zeros at first, which would hide a swapped or missing one."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        tree, [np.asarray(leaf) + 0.1 * rng.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
    )
