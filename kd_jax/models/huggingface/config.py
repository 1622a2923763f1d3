"""config.json of a `transformers` model as the keys of an encoder, and back.

Keys that are absent have the default of the model's class in `transformers` 5, as they have there.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.huggingface.names import family
from kd_jax.models.presets import PRESETS
from kd_jax.types import UserError

CONFIG = "config.json"

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
_THEIR_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu", "tanh": "tanh"}

# Options that change what a model computes, with the value that ours computes.
_REQUIRED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "sinusoidal_pos_embds": False,
    "quantization_config": None,
    "rope_scaling": None,
}
# A layer this wide is computed again in the backward pass rather than kept.
_REMAT_WIDTH = 2048


class _Values:
    """config.json with the place named in every complaint."""

    def __init__(self, values: Mapping[str, Any], place: str):
        self.values, self.place = values, place

    def refuse(self, key: str, problem: str) -> UserError:
        return UserError(f"{self.place}: {key}: {problem}; import another model, or mend the file if it is wrong")

    def number(self, key: str, default: Any, least: float = 0, whole: bool = True) -> Any:
        value = self.values.get(key, default)
        wanted = int if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted) or value < least:
            raise self.refuse(key, f"{value!r} is no {'whole ' if whole else ''}number of at least {least}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, f"{value!r} is neither true nor false")
        return value

    def activation(self, key: str) -> str:
        value = self.values.get(key, "gelu")
        if value not in _ACTIVATIONS:
            raise self.refuse(key, f"{value!r} is not supported, only {', '.join(sorted(_ACTIVATIONS))}")
        return _ACTIVATIONS[value]


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """The keys of an EncoderConfig from `folder`/config.json.

    Raises UserError naming the key: for an unknown architecture, and for an option that ours does not compute.
    """
    file = pathlib.Path(folder) / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {CONFIG}; name a folder that `save_pretrained` wrote") from None
    except ValueError as error:
        raise UserError(f"{file}: broken JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: is no JSON object; download it again")
    return encoder_values(values, str(file))


def encoder_values(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The keys of an EncoderConfig from the values of a config.json; `place` begins every complaint."""
    read = _Values(values, place)
    kind = values.get("model_type")
    for key, wanted in _REQUIRED.items():
        if kind == "modernbert" and key == "position_embedding_type":
            continue  # it is rotary whatever stands there; in mmBERT's file that is "sans_pos"
        if values.get(key, wanted) != wanted:
            raise read.refuse(key, f"{values[key]!r} is not supported, only {wanted!r}")
    match kind:
        case "bert":
            found = PRESETS["bert_base"] | _bert_like(read, "bert")
        case "distilbert":
            found = PRESETS["distil_mbert"] | _distilbert(read)
        case "roberta" | "xlm-roberta" | "camembert":
            found = PRESETS["roberta_base"] | _bert_like(read, "roberta")
        case "xlm-roberta-xl":
            found = PRESETS["xlmr_xl"] | _bert_like(read, "xlmr_xl")
        case "modernbert":
            found = PRESETS["modernbert_base"] | _modernbert(read)
        case _:
            known = "bert, distilbert, roberta, xlm-roberta, camembert, xlm-roberta-xl or modernbert"
            raise read.refuse("model_type", f"{kind!r} is not supported, only {known}")
    if found["hidden_size"] % found["num_heads"]:
        raise read.refuse("hidden_size", f"{found['hidden_size']} is no multiple of {found['num_heads']} heads")
    layout = {"scan": "unroll" if found["num_layers"] <= 6 else "scan", "remat": found["hidden_size"] >= _REMAT_WIDTH}
    return found | layout


def _bert_like(read: _Values, kind: str) -> dict[str, Any]:
    xl = kind == "xlmr_xl"
    offset = 0 if kind == "bert" else read.number("pad_token_id", 1) + 1
    positions = read.number("max_position_embeddings", 514 if xl else 512, 1) - offset
    if positions < 1:
        raise read.refuse("max_position_embeddings", f"it leaves no position after the first {offset}")
    activation = read.activation("hidden_act")
    return {
        "vocab_size": read.number("vocab_size", {"roberta": 50_265, "xlmr_xl": 250_880}.get(kind, 30_522), 1),
        "hidden_size": read.number("hidden_size", 2560 if xl else 768, 1),
        "num_layers": read.number("num_hidden_layers", 36 if xl else 12, 1),
        "num_heads": read.number("num_attention_heads", 32 if xl else 12, 1),
        "intermediate_size": read.number("intermediate_size", 10_240 if xl else 3072, 1),
        "max_positions": positions,
        "position_offset": offset,
        "type_vocab_size": read.number("type_vocab_size", 1 if xl else 2, 1),
        "norm_epsilon": float(read.number("layer_norm_eps", 1e-5 if xl else 1e-12, whole=False)),
        "activation": activation,
        "head_activation": activation if kind == "bert" else "gelu",  # RoBERTa's is the same whatever the config says
        "initializer_range": float(read.number("initializer_range", 0.02, whole=False)),
        "dropout": float(read.number("hidden_dropout_prob", 0.1, whole=False)),
        "attention_dropout": float(read.number("attention_probs_dropout_prob", 0.1, whole=False)),
    }


def _distilbert(read: _Values) -> dict[str, Any]:
    activation = read.activation("activation")
    return {
        "vocab_size": read.number("vocab_size", 30_522, 1),
        "hidden_size": read.number("dim", 768, 1),
        "num_layers": read.number("n_layers", 6, 1),
        "num_heads": read.number("n_heads", 12, 1),
        "intermediate_size": read.number("hidden_dim", 3072, 1),
        "max_positions": read.number("max_position_embeddings", 512, 1),
        "activation": activation,
        "head_activation": activation,
        "initializer_range": float(read.number("initializer_range", 0.02, whole=False)),
        "dropout": float(read.number("dropout", 0.1, whole=False)),
        "attention_dropout": float(read.number("attention_dropout", 0.1, whole=False)),
    }


def _modernbert(read: _Values) -> dict[str, Any]:
    layers = read.number("num_hidden_layers", 22, 1)
    bias = read.flag("attention_bias", False)
    if read.flag("mlp_bias", False) != bias:
        raise read.refuse("mlp_bias", f"it must be the same as attention_bias, {bias}")
    every = _global_every(read, layers)
    theta = {kind: _theta(read, kind, old) for kind, old in (("full", "global"), ("sliding", "local"))}
    return {
        "vocab_size": read.number("vocab_size", 50_368, 1),
        "hidden_size": read.number("hidden_size", 768, 1),
        "num_layers": layers,
        "num_heads": read.number("num_attention_heads", 12, 1),
        "intermediate_size": read.number("intermediate_size", 1152, 1),
        "max_positions": read.number("max_position_embeddings", 8192, 1),
        "use_bias": bias,
        "norm_bias": read.flag("norm_bias", False),
        "norm_epsilon": float(read.number("norm_eps", 1e-5, whole=False)),
        "activation": read.activation("hidden_activation"),
        "global_every": every,
        "local_window": read.number("local_attention", 128, 2),
        "global_theta": theta["full"],
        "local_theta": theta["sliding"],
        "head_activation": read.activation("classifier_activation"),
        "head_bias": read.flag("classifier_bias", False),
        "decoder_bias": read.flag("decoder_bias", True),
        "initializer_range": float(read.number("initializer_range", 0.02, whole=False)),
        "dropout": float(read.number("mlp_dropout", 0.0, whole=False)),
        "attention_dropout": float(read.number("attention_dropout", 0.0, whole=False)),
    }


def _global_every(read: _Values, layers: int) -> int:
    """n, where layers 0, n, 2n ... attend to the whole text."""
    every, kinds = read.number("global_attn_every_n_layers", 3, 1), read.values.get("layer_types")
    if kinds is None:
        return every
    whole = [layer for layer, kind in enumerate(kinds) if kind == "full_attention"]
    if whole != list(range(0, layers, every)):  # the list counts where the two differ
        every = whole[1] if len(whole) > 1 else layers
    if len(kinds) != layers or whole != list(range(0, layers, every)):
        raise read.refuse("layer_types", "full attention in layers 0, n, 2n ... is all that is supported")
    return every


def _theta(read: _Values, kind: str, old: str) -> float:
    """The rotary base of one kind of layers, from the keys of either generation of configs."""
    default = {"global": 160_000.0, "local": 10_000.0}[old]
    given = (read.values.get("rope_parameters") or {}).get(f"{kind}_attention")
    if given is None:
        key = f"{old}_rope_theta"
        if old == "local" and read.values.get(key, default) is None:  # null: the local layers have the global base
            key = "global_rope_theta"
        return float(read.number(key, default, 1, whole=False))
    if given.get("rope_type", "default") != "default":
        raise read.refuse("rope_parameters", f"rope_type {given['rope_type']!r} is not supported, only 'default'")
    return float(given.get("rope_theta", default))


def their_config(config: EncoderConfig) -> dict[str, Any]:
    """The values of a config.json whose `encoder_values` are those of `config`: what shapes the model, nothing else.

    Raises UserError naming the field of an encoder that no model of `transformers` computes.
    """
    kind = family(config)
    values = _modernbert_config(config) if kind == "modernbert" else _bert_config(config, kind)
    back = encoder_values(values, "the exported config")
    for key, value in back.items():
        if key not in ("scan", "remat") and value != getattr(config, key) and config.reads(key):
            raise UserError(
                f"encoder.{key}: it is {getattr(config, key)!r}, and a {values['model_type']} model of `transformers` "
                f"has {value!r}; it cannot be exported"
            )
    return values


def _bert_config(config: EncoderConfig, kind: str) -> dict[str, Any]:
    if kind == "distilbert":
        return {
            "model_type": "distilbert",
            "vocab_size": config.vocab_size,
            "dim": config.hidden_size,
            "n_layers": config.num_layers,
            "n_heads": config.num_heads,
            "hidden_dim": config.intermediate_size,
            "max_position_embeddings": config.max_positions,
            "activation": _THEIR_ACTIVATIONS[config.activation],
            "initializer_range": config.initializer_range,
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "sinusoidal_pos_embds": False,
            "tie_word_embeddings": True,
        }
    name = "bert" if kind == "bert" else "xlm-roberta-xl" if config.norm_placement == "pre" else "xlm-roberta"
    return {
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions + config.position_offset,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": _THEIR_ACTIVATIONS[config.activation],
        "initializer_range": config.initializer_range,
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        **({} if kind == "bert" else {"pad_token_id": config.position_offset - 1}),
    }


def _modernbert_config(config: EncoderConfig) -> dict[str, Any]:
    kinds = {True: "full_attention", False: "sliding_attention"}
    theta = {"full_attention": config.global_theta, "sliding_attention": config.local_theta}
    return {
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.use_bias,
        "mlp_bias": config.use_bias,
        "norm_bias": config.norm_bias,
        "norm_eps": config.norm_epsilon,
        "hidden_activation": _THEIR_ACTIVATIONS[config.activation],
        # The keys of transformers 4 and of 5, which read the pattern and the bases from different places.
        "global_attn_every_n_layers": config.global_every,
        "layer_types": [kinds[config.is_global(layer)] for layer in range(config.num_layers)],
        "local_attention": config.local_window,
        "global_rope_theta": config.global_theta,
        "local_rope_theta": config.local_theta,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": base} for name, base in theta.items()},
        "classifier_activation": _THEIR_ACTIVATIONS[config.head_activation],
        "classifier_bias": config.head_bias,
        "classifier_pooling": "cls",
        "decoder_bias": config.decoder_bias,
        "initializer_range": config.initializer_range,
        "embedding_dropout": config.dropout,
        "mlp_dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "tie_word_embeddings": True,
    }
