"""config.json to the keys of an encoder and back; what is not supported is named."""

import dataclasses
import json

import pytest

from kd_jax.models.encoder_config import PRESETS, EncoderConfig
from kd_jax.models.huggingface.config import encoder_values, read_config, their_config
from kd_jax.types import UserError
from tests.support.small_models import FAMILIES, small_config

# As the hub has them, shortened to what shapes the model.
PUBLIC = {
    "mbert": {
        "model_type": "bert",
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 0,
        "type_vocab_size": 2,
        "vocab_size": 119547,
        "directionality": "bidi",
    },
    "xlmr_base": {
        "model_type": "xlm-roberta",
        "hidden_act": "gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 514,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "position_embedding_type": "absolute",
        "type_vocab_size": 1,
        "vocab_size": 250002,
    },
    "xlmr_xl": {"model_type": "xlm-roberta-xl"},
    "distil_mbert": {"model_type": "distilbert", "activation": "gelu", "dim": 768, "vocab_size": 119547},
    "mmbert_base": {
        "model_type": "modernbert",
        "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000,
        "local_rope_theta": 160000,
        "local_attention": 128,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "max_position_embeddings": 8192,
        "num_attention_heads": 12,
        "num_hidden_layers": 22,
        "vocab_size": 256000,
        "position_embedding_type": "sans_pos",
    },
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_configs_are_our_presets(name):
    layout = ("scan", "remat")
    read = {key: value for key, value in encoder_values(PUBLIC[name], "x").items() if key not in layout}
    assert read == {key: value for key, value in PRESETS[name].items() if key not in layout}


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_there_and_back(name):
    config = EncoderConfig(**PRESETS[name] | {"vocab_size": PRESETS[name]["vocab_size"] or 50})
    values = json.loads(json.dumps(their_config(config)))
    back = EncoderConfig(**encoder_values(values, "x"))
    for field in dataclasses.fields(config):
        if config.reads(field.name) and field.name not in ("scan", "remat"):
            assert getattr(back, field.name) == getattr(config, field.name), field.name


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mbert", {"model_type": "gpt2"}, "model_type: 'gpt2' is not supported"),
        ("mbert", {"position_embedding_type": "relative_key"}, "position_embedding_type: 'relative_key'"),
        ("mbert", {"hidden_act": "mish"}, "hidden_act: 'mish'"),
        ("mbert", {"num_hidden_layers": "12"}, "num_hidden_layers.*'12'"),
        ("mbert", {"num_attention_heads": 7}, "hidden_size: 768 is not a multiple of 7"),
        ("mbert", {"is_decoder": True}, "is_decoder: True"),
        ("xlmr_base", {"max_position_embeddings": 2}, "max_position_embeddings"),
        ("xlmr_base", {"pad_token_id": None}, "pad_token_id: None"),
        ("distil_mbert", {"sinusoidal_pos_embds": True}, "sinusoidal_pos_embds: True"),
        ("mmbert_base", {"mlp_bias": True}, "mlp_bias"),
        ("mmbert_base", {"layer_types": ["sliding_attention"] * 22}, "layer_types"),
        ("mmbert_base", {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, "rope_parameters.*yarn"),
        (
            "mmbert_base",
            {"rope_parameters": {"full_attention": {"type": "yarn", "factor": 2.0}}},
            "rope_parameters.*yarn",
        ),
        ("mmbert_base", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e3}}, "rope_parameters"),  # flat
    ],
)
def test_what_is_not_supported_is_named(kind, changes, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        encoder_values(PUBLIC[kind] | changes, "folder/config.json")


def test_an_untied_decoder_is_read_and_written():
    for name in PUBLIC:
        values = encoder_values(PUBLIC[name] | {"tie_word_embeddings": False}, "x")
        assert values["tied_decoder"] is False
        assert their_config(EncoderConfig(**values))["tie_word_embeddings"] is False


def test_the_other_spelling_of_the_local_window():
    values = PUBLIC["mmbert_base"] | {"sliding_window": 16}  # on each side, not counting the token itself
    assert encoder_values(values, "x")["local_window"] == 32


def test_patterns_of_global_layers():
    kinds = ["full_attention", "sliding_attention"] * 3
    values = encoder_values({"model_type": "modernbert", "num_hidden_layers": 6, "layer_types": kinds}, "x")
    assert values["global_every"] == 2
    null = {"model_type": "modernbert", "global_rope_theta": 70_000.0, "local_rope_theta": None}
    assert encoder_values(null, "x")["local_theta"] == 70_000.0


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [("bert", "final_norm", True), ("roberta", "head_activation", "relu"), ("modernbert", "gated", False)],
)
def test_encoders_that_transformers_does_not_have_are_refused(family, field, value):
    assert family in FAMILIES
    with pytest.raises(UserError, match=rf"encoder\.{field}"):
        their_config(small_config(family, **{field: value}))


def test_the_head_of_roberta_has_its_own_activation():
    for name, expected in (("mbert", "relu"), ("xlmr_base", "gelu")):
        values = encoder_values(PUBLIC[name] | {"hidden_act": "relu"}, "x")
        assert (values["activation"], values["head_activation"]) == ("relu", expected)


def test_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        read_config(tmp_path)
    for text in ("{", "[]"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: (broken JSON|is not a JSON object)"):
            read_config(tmp_path)
