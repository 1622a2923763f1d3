"""Our models as those of `transformers`: the class, the tensors and the config.json of each kind."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.config import their_config
from kd_jax.models.huggingface.names import (
    Tensor,
    body_map,
    family,
    linear_entries,
    named,
    norm_entries,
    to_huggingface,
)
from kd_jax.types import Params, UserError

_PREFIX = {"bert": "Bert", "distilbert": "DistilBert", "modernbert": "ModernBert"}
_SUFFIX = {"mlm": "ForMaskedLM", "dc": "ForSequenceClassification", "icner": "ForTokenClassification"}


class Exported(NamedTuple):
    """A model in the form of `transformers`; `beside` is the intent head of an ICNER model, under names of its own."""

    config: dict[str, Any]  # of config.json, without the tokenizer's ids
    tensors: dict[str, np.ndarray]  # of model.safetensors
    beside: dict[str, np.ndarray]


def exported(model: Functional, params: Params, classes: dict[str, tuple[str, ...]]) -> Exported:
    """The model with its class names: "domains" for DC, "intents" and "tags" for ICNER, nothing for a masked LM.

    Heads may be padded to more classes than there are names. Raises UserError for an encoder that `transformers` lacks.
    """
    shape = model.config
    if model.kind == "mlm":
        return Exported(_config(shape, "mlm"), to_huggingface(params, shape), {})
    if family(shape) == "distilbert":  # its classifiers have another head than BERT's and ours
        shape = dataclasses.replace(shape, type_vocab_size=1)
        params = _with_types(params, shape)
    labels = classes["domains" if model.kind == "dc" else "tags"]
    numbered = {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "classifier_dropout": shape.dropout,
    }
    tensors = named(params, body_map(shape))
    if model.kind == "dc":
        tensors |= _cut(named(params, _sequence_head(shape, "domain_head", family(shape))), len(labels))
        return Exported(
            {**_config(shape, "dc"), **numbered, "problem_type": "single_label_classification"}, tensors, {}
        )
    tensors |= _cut(named(params, _token_head(shape)), len(labels))
    intents = classes["intents"]
    head = _cut(named(params, _sequence_head(shape, "intent_head", "")), len(intents))
    return Exported({**_config(shape, "icner"), **numbered, "intents": list(intents)}, tensors, head)


def _config(shape: EncoderConfig, kind: str) -> dict[str, Any]:
    values = their_config(shape)
    xl = {"xlm-roberta": "XLMRoberta", "xlm-roberta-xl": "XLMRobertaXL"}
    prefix = xl[values["model_type"]] if values["model_type"] in xl else _PREFIX[family(shape)]
    return {"architectures": [prefix + _SUFFIX[kind]], **values, "dtype": "float32"}


def _with_types(params: Params, shape: EncoderConfig) -> Params:
    """With a table of one token type that adds nothing."""
    encoder = params["encoder"]
    types = jnp.zeros((1, shape.hidden_size), jnp.float32)
    return {**params, "encoder": {**encoder, "embeddings": {**encoder["embeddings"], "types": types}}}


def _sequence_head(shape: EncoderConfig, name: str, kind: str) -> list[Tensor]:
    """The head of a text's class under the names of a family, or ("") as dense, norm and classifier."""
    dense, norm, classifier = {
        "bert": ("bert.pooler.dense", "", "classifier"),
        "roberta": ("classifier.dense", "", "classifier.out_proj"),
        "modernbert": ("head.dense", "head.norm", "classifier"),
        "": ("dense", "norm", "classifier"),
    }[kind]
    entries = [*linear_entries(dense, (name, "dense"), bias=shape.head_bias)]
    if shape.head_style == "modernbert":
        entries += norm_entries(norm, (name, "norm"), bias=shape.norm_bias)
    return [*entries, *linear_entries(classifier, (name, "classifier"))]


def _token_head(shape: EncoderConfig) -> list[Tensor]:
    if shape.head_style == "modernbert":
        return _sequence_head(shape, "tag_head", "modernbert")
    return [*linear_entries("classifier", ("tag_head", "classifier"))]


def _cut(tensors: dict[str, np.ndarray], classes: int) -> dict[str, np.ndarray]:
    """Without the classes that only pad a label map: they are the last rows of the classifier."""
    last = [name for name in tensors if name.split(".")[-2] in ("classifier", "out_proj")]
    return tensors | {name: np.ascontiguousarray(tensors[name][:classes]) for name in last}


def tokenizer_ids(shape: EncoderConfig, *, cls: int, sep: int, pad: int) -> dict[str, int]:
    """What config.json says of the tokenizer. Raises UserError where the model counts positions by another padding."""
    if shape.position_offset and pad != shape.position_offset - 1:
        raise UserError(
            f"encoder.position_offset: models of this family find their positions by a padding id of "
            f"{shape.position_offset - 1}, and the tokenizer's is {pad}; train a student of another family to export it"
        )
    ids = {"pad_token_id": pad, "bos_token_id": cls, "eos_token_id": sep}
    return ids | ({"cls_token_id": cls, "sep_token_id": sep} if shape.head_style == "modernbert" else {})
