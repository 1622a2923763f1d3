"""The named sizes are whole, and public ones have the parameter counts of the published models."""

import dataclasses

import pytest

from kd_jax.models.encoder_config import PRESETS, EncoderConfig, encoder_config
from kd_jax.models.functional import Functional, parameter_count
from kd_jax.types import UserError

# Of the `transformers` masked-LM classes with tied embeddings, counted from their definitions: body, tables and head.
PUBLISHED = {
    "bert_base": 109_514_298,
    "roberta_base": 124_697_433,
    "xlmr_base": 278_295_186,
    "xlmr_large": 560_142_482,
    "modernbert_base": 149_655_232,
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset_makes_a_model(name):
    assert PRESETS[name].keys() == {field.name for field in dataclasses.fields(EncoderConfig)}
    counts = parameter_count(Functional("mlm", encoder_config(PRESETS[name], 8000)).abstract())
    assert counts["without_embeddings"] < counts["total"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_public_sizes(name):
    config = encoder_config(PRESETS[name], 1)
    total = parameter_count(Functional("mlm", config).abstract())["total"]
    unused = config.hidden_size if config.skip_first_attention_norm else 0  # the first layer's attention norm
    assert total - unused == PUBLISHED[name]


@pytest.mark.parametrize(
    "name, millions",
    [("student_17m", 17), ("student_170m", 170), ("teacher_9b", 9300), ("xlmr_xl", 2832), ("xlmr_xxl", 9664)],
)
def test_sizes_without_embeddings(name, millions):
    count = parameter_count(Functional("mlm", encoder_config(PRESETS[name], 8000)).abstract())["without_embeddings"]
    assert count == pytest.approx(millions * 1e6, rel=0.05)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dropout": 7.0}, r"^config\.student\.dropout: 7\.0 is out of range"),
        ({"local_theta": 0.0}, r"^config\.student\.local_theta: 0\.0 is out of range"),
        ({"norm_epsilon": float("nan")}, r"^config\.student\.norm_epsilon: nan is out of range"),
        ({"hidden_size": 2**31}, r"^config\.student\.hidden_size: 2147483648 is too large"),
        ({"num_layers": 10**12}, r"^config\.student\.num_layers: 1000000000000 is too large"),
        ({"activation": "none"}, r"^config\.student\.activation: 'none' is not known"),
    ],
)
def test_impossible_encoder_settings_are_refused_with_their_key(changes, message):
    with pytest.raises(UserError, match=message):
        encoder_config(PRESETS["tiny"] | changes, 100, "config.student")
