"""config.json of a `transformers` model as the keys of an encoder, and back.

`transformers` itself reads the file: its config classes know the defaults of keys that are absent, and older spellings.
"""

import copy
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from kd_jax.models.encoder_config import PRESETS, EncoderConfig
from kd_jax.types import UserError

CONFIG = "config.json"

# model_type -> (family, preset with what the family fixes and config.json does not say).
_KINDS = {
    "bert": ("bert", "bert_base"),
    "distilbert": ("distilbert", "distil_mbert"),
    "roberta": ("roberta", "roberta_base"),
    "xlm-roberta": ("roberta", "roberta_base"),
    "camembert": ("roberta", "roberta_base"),
    "xlm-roberta-xl": ("roberta", "xlmr_xl"),
    "modernbert": ("modernbert", "modernbert_base"),
}

_BERT = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "norm_epsilon": "layer_norm_eps",
    "activation": "hidden_act",
    "initializer_range": "initializer_range",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "tied_decoder": "tie_word_embeddings",
}
# Family -> our field -> their key, read in both directions. What needs more than a copy is in the functions below.
_FIELDS: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": {
        "vocab_size": "vocab_size",
        "hidden_size": "dim",
        "num_layers": "n_layers",
        "num_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "max_positions": "max_position_embeddings",
        "activation": "activation",
        "initializer_range": "initializer_range",
        "dropout": "dropout",
        "attention_dropout": "attention_dropout",
        "tied_decoder": "tie_word_embeddings",
    },
    "modernbert": {
        **{field: key for field, key in _BERT.items() if field != "type_vocab_size"},
        "use_bias": "attention_bias",
        "norm_bias": "norm_bias",
        "norm_epsilon": "norm_eps",
        "activation": "hidden_activation",
        "local_window": "local_attention",
        "head_activation": "classifier_activation",
        "head_bias": "classifier_bias",
        "decoder_bias": "decoder_bias",
        "dropout": "mlp_dropout",
        "attention_dropout": "attention_dropout",
    },
}

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

# Options that change what a model computes, with the only value that our encoder implements.
_REQUIRED = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "sinusoidal_pos_embds": False,
    "quantization_config": None,
    "rope_scaling": None,
}
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
# From this width on a layer is computed again in the backward pass rather than kept.
_REMAT_WIDTH = 2048


def family(config: EncoderConfig) -> str:
    """Whose tensor names and config keys apply: bert | distilbert (BERT without token types) | roberta | modernbert."""
    return "distilbert" if config.head_style == "bert" and not config.type_vocab_size else config.head_style


def read_config(folder: str | pathlib.Path) -> dict[str, Any]:
    """The keys of an EncoderConfig from `folder`/config.json.

    Raises UserError naming the key: for an unknown architecture, and for an option that our encoder does not implement.
    """
    file = pathlib.Path(folder) / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: holds no {CONFIG}; name a folder that `save_pretrained` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: broken JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{file}: is not a JSON object; download it again")
    try:
        found = encoder_values(values, str(file))
        EncoderConfig(**found)
        return found
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(file)) else f"{file}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A value of a type or size that the classes of `transformers` accept.
        raise UserError(f"{file}: describes no encoder ({error}); fix the file, or download it again") from None


def encoder_values(values: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The keys of an EncoderConfig from the values of a config.json; error messages start with `file`."""

    def refusal(key: str, problem: str) -> UserError:
        return UserError(f"{file}: {key}: {problem}; import another model, or fix the file if it is wrong")

    values = dict(values)
    model_type = values.pop("model_type", None)
    if model_type not in _KINDS:
        raise refusal("model_type", f"{model_type!r} is not supported, only {', '.join(_KINDS)}")
    kind, preset = _KINDS[model_type]
    for key, wanted in _REQUIRED.items():
        if kind == "modernbert" and key == "position_embedding_type":
            continue  # ModernBERT ignores the key, and mmBERT's file says "sans_pos"
        if values.get(key, wanted) != wanted:
            raise refusal(key, f"{values[key]!r} is not supported, only {wanted!r}")
    theirs = _their_class(model_type, values, file)
    found: dict[str, Any] = dict(PRESETS[preset])
    for field, key in _FIELDS[kind].items():
        value = getattr(theirs, key)
        if field.endswith("activation"):
            if value not in _ACTIVATIONS:
                raise refusal(key, f"{value!r} is not supported, only {', '.join(sorted(_ACTIVATIONS))}")
            value = _ACTIVATIONS[value]
        # Files write some floats as integers (a dropout of 0); the config's identity must not depend on that.
        found[field] = float(value) if isinstance(found[field], float) else value
    if kind in ("bert", "distilbert"):
        found["head_activation"] = found["activation"]  # RoBERTa's head has gelu whatever the config says
    if kind == "roberta":
        # RoBERTa counts positions from the id after the padding's, so that many rows of the table are never read.
        if theirs.pad_token_id is None:
            raise refusal("pad_token_id", "None leaves open where positions start")
        offset = theirs.pad_token_id + 1
        found |= {"position_offset": offset, "max_positions": found["max_positions"] - offset}
        if found["max_positions"] < 1:
            raise refusal("max_position_embeddings", f"it leaves no position after the first {offset}")
    if kind == "modernbert":
        if theirs.mlp_bias != theirs.attention_bias:
            raise refusal("mlp_bias", f"it must be the same as attention_bias, {theirs.attention_bias}")
        every = _global_every(theirs)
        if every is None:
            raise refusal("layer_types", "full attention in layers 0, n, 2n ... is all that is supported")
        rotary = theirs.rope_parameters
        for one in rotary.values():
            if one.get("rope_type", "default") != "default":
                raise refusal("rope_parameters", f"rope_type {one['rope_type']!r} is not supported, only 'default'")
        whole, local = (rotary[f"{name}_attention"]["rope_theta"] for name in ("full", "sliding"))
        # null: the local layers have the base of the global ones.
        thetas = {"global_theta": float(whole), "local_theta": float(whole if local is None else local)}
        found |= {"global_every": every, **thetas}
    if found["hidden_size"] % found["num_heads"]:
        raise refusal("hidden_size", f"{found['hidden_size']} is not a multiple of {found['num_heads']} heads")
    layout = {"scan": "unroll" if found["num_layers"] <= 6 else "scan", "remat": found["hidden_size"] >= _REMAT_WIDTH}
    return found | layout


def _their_class(model_type: str, values: dict[str, Any], file: str) -> Any:
    """The config object of `transformers`; its classes check types. No code from the model's folder is run."""
    from transformers import AutoConfig  # takes seconds to import

    try:
        return AutoConfig.for_model(model_type, **copy.deepcopy(values))  # it writes into nested dicts
    except Exception as error:  # each check of the library raises an exception of its own
        raise UserError(f"{file}: {' '.join(str(error).split())}; fix the file, or download it again") from error


def _global_every(theirs: Any) -> int | None:
    """n, where layers 0, n, 2n ... attend to the whole text; None for another pattern."""
    layers = theirs.num_hidden_layers
    whole = [layer for layer, kind in enumerate(theirs.layer_types) if kind == "full_attention"]
    every = getattr(theirs, "global_attn_every_n_layers", 3)
    if whole != list(range(0, layers, every)):  # the list wins where the two differ
        every = whole[1] if len(whole) > 1 else layers
    return every if whole == list(range(0, layers, every)) else None


def their_config(config: EncoderConfig) -> dict[str, Any]:
    """The values of a config.json whose `encoder_values` are those of `config`: what shapes the model, nothing else.

    Raises UserError naming the field of an encoder that no model of `transformers` computes.
    """
    kind = family(config)
    model_type = kind
    if kind == "roberta":
        model_type = "xlm-roberta-xl" if config.norm_placement == "pre" else "xlm-roberta"
    values: dict[str, Any] = {"model_type": model_type}
    for field, key in _FIELDS[kind].items():
        value = getattr(config, field)
        values[key] = _THEIR_ACTIVATIONS[value] if field.endswith("activation") else value
    if kind == "roberta":
        values["max_position_embeddings"] += config.position_offset
        values["pad_token_id"] = config.position_offset - 1
    if kind == "distilbert":
        values["sinusoidal_pos_embds"] = False
    elif kind == "modernbert":
        values |= _modernbert_only(config)
    else:
        values["position_embedding_type"] = "absolute"
    # The ids are the tokenizer's, added later; `transformers` would warn that its defaults exceed a small vocabulary.
    back = encoder_values({**dict.fromkeys(_TOKEN_IDS), **values}, "the exported config")
    for key, value in back.items():
        if key not in ("scan", "remat") and value != getattr(config, key) and config.reads(key):
            raise UserError(
                f"encoder.{key}: it is {getattr(config, key)!r}, and a {model_type} model of `transformers` has "
                f"{value!r}; it cannot be exported"
            )
    return values


def _modernbert_only(config: EncoderConfig) -> dict[str, Any]:
    """The pattern of layers and the rotary bases, under the keys of transformers 4 and of 5."""
    kinds = {True: "full_attention", False: "sliding_attention"}
    thetas = {"full_attention": config.global_theta, "sliding_attention": config.local_theta}
    return {
        "mlp_bias": config.use_bias,
        "global_attn_every_n_layers": config.global_every,
        "layer_types": [kinds[config.is_global(layer)] for layer in range(config.num_layers)],
        "global_rope_theta": config.global_theta,
        "local_rope_theta": config.local_theta,
        "rope_parameters": {name: {"rope_type": "default", "rope_theta": base} for name, base in thetas.items()},
        "classifier_pooling": "cls",
        "embedding_dropout": config.dropout,
    }
