"""Our models as checkpoints of `transformers`: the name, shape and layout of each tensor, and exports of each kind."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.config import CONFIG, family, their_config
from kd_jax.types import Params, UserError

Path = tuple[str, ...]

EMBEDDINGS, LAYERS = ("encoder", "embeddings"), ("encoder", "layers")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, and the part of one of our arrays that it fills.

    `inputs` counts the leading axes of our part that are a linear layer's inputs: `transformers` stores its weight as
    [outputs, inputs], and its bias, which has 0 inputs, as [outputs], with heads and projections merged. Where it is
    None, both sides have the same layout.
    """

    name: str
    path: Path
    index: tuple[Any, ...] = ()  # of the part in our array: the layer, and the position in a merged projection
    inputs: int | None = None

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.inputs is None:
            return shape
        outputs, inputs = math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (outputs, inputs) if self.inputs else (outputs,)

    def to_ours(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor's values as our part of that shape."""
        return values if self.inputs is None else values.T.reshape(shape)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.inputs is None:
            return part
        return np.ascontiguousarray(part.reshape(self.their_shape(part.shape)[::-1]).T)


class _Names(NamedTuple):
    """What a family calls the modules of an encoder and its heads; {} is the number of a layer."""

    tokens: str
    positions: str
    types: str
    embedding_norm: str
    attention: tuple[str, ...]  # query, key and value, or all in one
    attention_output: str
    attention_norm: str
    mlp_input: str
    mlp_output: str
    mlp_norm: str
    final_norm: str
    masked_dense: str  # masked-LM head
    masked_norm: str
    masked_bias: str
    decoder: str  # of an untied masked-LM head, with its bias
    text_dense: str = ""  # head for the class of a text
    text_classifier: str = "classifier"


def _names(config: EncoderConfig) -> _Names:
    match family(config):
        case "distilbert":
            layer = "distilbert.transformer.layer.{}"
            return _Names(
                "distilbert.embeddings.word_embeddings",
                "distilbert.embeddings.position_embeddings",
                "",
                "distilbert.embeddings.LayerNorm",
                tuple(f"{layer}.attention.{part}_lin" for part in "qkv"),
                f"{layer}.attention.out_lin",
                f"{layer}.sa_layer_norm",
                f"{layer}.ffn.lin1",
                f"{layer}.ffn.lin2",
                f"{layer}.output_layer_norm",
                "",
                "vocab_transform",
                "vocab_layer_norm",
                "vocab_projector",
                "vocab_projector",
            )
        case "modernbert":
            layer = "model.layers.{}"
            return _Names(
                "model.embeddings.tok_embeddings",
                "",
                "",
                "model.embeddings.norm",
                (f"{layer}.attn.Wqkv",),
                f"{layer}.attn.Wo",
                f"{layer}.attn_norm",
                f"{layer}.mlp.Wi",
                f"{layer}.mlp.Wo",
                f"{layer}.mlp_norm",
                "model.final_norm",
                "head.dense",
                "head.norm",
                "decoder",
                "decoder",
                "head.dense",
            )
        case kind:
            layer, pre = f"{kind}.encoder.layer.{{}}", config.norm_placement == "pre"  # XLM-R XL
            if kind == "roberta":
                head = ("lm_head.dense", "lm_head.layer_norm", "lm_head", "lm_head.decoder")
                text = ("classifier.dense", "classifier.out_proj")
            else:
                name = "cls.predictions"
                head = (f"{name}.transform.dense", f"{name}.transform.LayerNorm", name, f"{name}.decoder")
                text = ("bert.pooler.dense", "classifier")
            return _Names(
                f"{kind}.embeddings.word_embeddings",
                f"{kind}.embeddings.position_embeddings",
                f"{kind}.embeddings.token_type_embeddings",
                f"{kind}.embeddings.LayerNorm",
                tuple(f"{layer}.attention.self.{part}" for part in ("query", "key", "value")),
                f"{layer}.attention.output.dense",
                f"{layer}.attention.self_attn_layer_norm" if pre else f"{layer}.attention.output.LayerNorm",
                f"{layer}.intermediate.dense",
                f"{layer}.output.dense",
                f"{layer}.LayerNorm" if pre else f"{layer}.output.LayerNorm",
                f"{kind}.encoder.LayerNorm",
                *head,
                *text,
            )


def _linear(name: str, path: Path, index: tuple[Any, ...] = (), inputs: int = 1, bias: bool = True) -> Iterator[Tensor]:
    """The weight of a linear layer and, where it has one, its bias."""
    yield Tensor(f"{name}.weight", (*path, "kernel"), index, inputs)
    if bias:
        # The part of a merged projection is chosen after the kernel's input axis, which a bias does not have.
        yield Tensor(f"{name}.bias", (*path, "bias"), tuple(item for item in index if item != slice(None)), 0)


def _norm(name: str, path: Path, index: tuple[Any, ...] = (), bias: bool = True) -> Iterator[Tensor]:
    """The scale of a norm and, where it has one, its bias."""
    yield Tensor(f"{name}.weight", (*path, "scale"), index)
    if bias:
        yield Tensor(f"{name}.bias", (*path, "bias"), index)


def body_map(config: EncoderConfig) -> Iterator[Tensor]:
    """Every tensor of the encoder."""
    names, bias, norm_bias = _names(config), config.use_bias, config.norm_bias
    yield Tensor(f"{names.tokens}.weight", (*EMBEDDINGS, "tokens"))
    if config.positions == "learned":
        yield Tensor(f"{names.positions}.weight", (*EMBEDDINGS, "positions"))
    if config.type_vocab_size:
        yield Tensor(f"{names.types}.weight", (*EMBEDDINGS, "types"))
    if config.embedding_norm:
        yield from _norm(names.embedding_norm, (*EMBEDDINGS, "norm"), bias=norm_bias)
    for layer in range(config.num_layers):
        index = (layer,)
        for part, name in enumerate(names.attention):
            chosen = index if len(names.attention) == 1 else (layer, slice(None), part)
            yield from _linear(name.format(layer), (*LAYERS, "attention", "query_key_value"), chosen, bias=bias)
        output = (*LAYERS, "attention", "output")
        yield from _linear(names.attention_output.format(layer), output, index, inputs=2, bias=bias)
        # Ours has the norm that ModernBERT's first layer lacks, so that layers can be stacked; it is never read there.
        if layer > 0 or not config.skip_first_attention_norm:
            yield from _norm(names.attention_norm.format(layer), (*LAYERS, "attention_norm"), index, norm_bias)
        yield from _linear(names.mlp_input.format(layer), (*LAYERS, "mlp", "input"), index, bias=bias)
        yield from _linear(names.mlp_output.format(layer), (*LAYERS, "mlp", "output"), index, bias=bias)
        yield from _norm(names.mlp_norm.format(layer), (*LAYERS, "mlp_norm"), index, norm_bias)
    if config.final_norm:
        yield from _norm(names.final_norm, ("encoder", "final_norm"), bias=norm_bias)


def head_map(config: EncoderConfig) -> Iterator[Tensor]:
    """Every tensor of the masked-LM head; for a tied decoder only the bias."""
    names = _names(config)
    yield from _linear(names.masked_dense, ("mlm_head", "dense"), bias=config.head_bias)
    yield from _norm(names.masked_norm, ("mlm_head", "norm"), bias=config.norm_bias)
    if not config.tied_decoder:
        yield Tensor(f"{names.decoder}.weight", ("mlm_head", "decoder"))
    if config.decoder_bias:
        yield Tensor(f"{names.masked_bias if config.tied_decoder else names.decoder}.bias", ("mlm_head", "bias"))


def name_map(config: EncoderConfig) -> tuple[Tensor, ...]:
    """Every tensor of the masked-LM checkpoint of that shape, tied ones once."""
    return (*body_map(config), *head_map(config))


# The body's prefix, which a checkpoint of the body alone leaves out.
BODY = {"bert": "bert.", "distilbert": "distilbert.", "roberta": "roberta.", "modernbert": "model."}

# Second names of tied tensors, and what checkpoints carry that a masked-LM does not use.
TIED = {
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "distilbert": {"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    "roberta": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    "modernbert": {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
}


def tied_names(config: EncoderConfig) -> dict[str, str]:
    """Second name -> first name of the tensors that a model of that config ties."""
    return TIED[family(config)] if config.tied_decoder else {}


_UNUSED = {
    *(f"{kind}.{name}" for kind in ("bert", "roberta") for name in ("pooler.dense.weight", "pooler.dense.bias")),
    *("cls.seq_relationship.weight", "cls.seq_relationship.bias"),
}


# The prefix that PyTorch adds to the names of a wrapped model, buffers, and the heads of finetuned models.
_WRAPPERS = ("module.", "_orig_mod.")
_BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|inv_freq)$")
_CLASSIFIERS = re.compile(r"(pre_classifier|classifier|qa_outputs|score)\.")


def canonical_names(names: Iterable[str], config: EncoderConfig) -> dict[str, str]:
    """The name in our map -> the checkpoint's name, where they differ: a body saved alone has no prefix, a wrapped
    model has an extra one, and the first BERT checkpoints call a norm's weight and bias gamma and beta.

    Buffers and the heads of finetuned models are left out; `unused_heads` has the latter.
    """
    plain = {name: name for name in names if not _BUFFERS.search(name)}
    for wrapper in _WRAPPERS * 2:
        if plain and all(name.startswith(wrapper) for name in plain):
            plain = {name.removeprefix(wrapper): stored for name, stored in plain.items()}
    heads = {name for name in plain if _CLASSIFIERS.match(name)}
    if heads and not any(name.startswith("decoder.") for name in plain):  # ModernBERT's classifiers have a dense layer
        heads |= {name for name in plain if name.startswith("head.")}
    names, prefix = [name for name in plain if name not in heads], BODY[family(config)]
    bare = not any(name.startswith(prefix) for name in names)
    found: dict[str, str] = {}
    for name in names:
        ours = prefix + name if bare else name
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            ours = ours.removesuffix(old) + new if ours.endswith("LayerNorm" + old) else ours
        found[ours] = plain[name]
    if not config.tied_decoder:
        # `transformers` 5 uses the decoder's bias; older files may have it only under its other name.
        bias, other = (f"{name}.bias" for name in (_names(config).decoder, _names(config).masked_bias))
        found = ({bias: found[other]} if other in found else {}) | {k: v for k, v in found.items() if k != other}
    return found


def unused_heads(names: Iterable[str], config: EncoderConfig) -> list[str]:
    """The tensors of a checkpoint, by the checkpoint's names, that belong to the head of a finetuned model."""
    names = list(names)
    used = set(canonical_names(names, config).values())
    return sorted(name for name in names if name not in used and not _BUFFERS.search(name))


def check_names(names: Mapping[str, str], config: EncoderConfig) -> bool:
    """Whether a checkpoint with these `canonical_names` has a masked-LM head on its body.

    Raises UserError naming the first tensor that is unknown or missing; a head is complete or absent.
    """
    kind = family(config)
    head = {entry.name for entry in head_map(config)}
    tied = tied_names(config).keys()
    known = {entry.name for entry in body_map(config)} | head | tied | _UNUSED
    for name in names:
        if name not in known:
            problem = f"a {kind} model of this config has no such tensor"
            raise UserError(f"{names[name]}: {problem}; check that {CONFIG} belongs to these weights")
    has_head = any(name in head or name in tied for name in names)
    for entry in name_map(config) if has_head else body_map(config):
        if entry.name not in names:
            raise UserError(f"{entry.name}: the checkpoint lacks this tensor; check that it is a model of this config")
    return has_head


def to_huggingface(params: Params, config: EncoderConfig) -> dict[str, np.ndarray]:
    """A masked-LM checkpoint's tensors from parameters of kind "mlm"; tied tensors appear once."""
    tensors, names = _tensors(params, name_map(config)), _names(config)
    if not config.tied_decoder and config.decoder_bias:
        # `transformers` stores both biases of an untied head, and reads the decoder's.
        tensors[f"{names.masked_bias}.bias"] = tensors[f"{names.decoder}.bias"]
    return tensors


def _tensors(params: Params, entries: Iterable[Tensor]) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for entry in entries:
        array: Any = params
        for key in entry.path:
            array = array[key]
        tensors[entry.name] = entry.to_theirs(np.asarray(array)[entry.index])
    return tensors


class Exported(NamedTuple):
    """A model in the form of `transformers`."""

    config: dict[str, Any]  # of config.json, without the tokenizer's ids
    tensors: dict[str, np.ndarray]  # of model.safetensors
    text_head: dict[str, np.ndarray]  # under our names, if no class of `transformers` has it on that body


# ModernBERT's names for the poolings that its classifier has; the other families read only the first token.
_THEIR_POOLING = {"first": "cls", "mean": "mean"}


def head_apart(model: Functional) -> bool:
    """Whether the head that classifies a text is exported to a separate file: no class of `transformers` has two heads
    (ICNER), or this pooling (DC)."""
    modern = family(model.config) == "modernbert"
    known = model.pooling in _THEIR_POOLING if modern else model.pooling == "first"
    return model.kind == "icner" or (model.kind == "dc" and not known)


def exported(model: Functional, params: Params, classes: dict[str, tuple[str, ...]]) -> Exported:
    """The model with its class names: "domains" for DC, "intents" and "tags" for ICNER, nothing for a masked LM.

    Heads may be padded to more classes than there are names. Raises UserError for an encoder that `transformers` lacks.
    """
    shape = model.config
    if model.kind == "mlm":
        return Exported(_config(shape, "ForMaskedLM"), to_huggingface(params, shape), {})
    if family(shape) == "distilbert":
        # Its classifiers have another head than ours, so it is exported as BERT whose one token type adds nothing.
        shape = dataclasses.replace(shape, type_vocab_size=1)
        embeddings = {**params["encoder"]["embeddings"], "types": jnp.zeros((1, shape.hidden_size), jnp.float32)}
        params = {**params, "encoder": {**params["encoder"], "embeddings": embeddings}}
    tensors, names = _tensors(params, body_map(shape)), _names(shape)
    labels = classes["domains" if model.kind == "dc" else "tags"]
    numbered: dict[str, Any] = {
        "id2label": {str(number): label for number, label in enumerate(labels)},
        "label2id": {label: number for number, label in enumerate(labels)},
        "classifier_dropout": shape.dropout,
    }
    if model.kind == "dc" and head_apart(model):
        head = _classified(params, _text_head(shape, "domain_head", "dense", "norm", "classifier"), labels)
        config = _config(shape, "Model") | {"domains": list(labels), "pooling": model.pooling}
        return Exported(config, tensors, head)
    if model.kind == "dc":
        head = _text_head(shape, "domain_head", names.text_dense, names.masked_norm, names.text_classifier)
        tensors |= _classified(params, head, labels)
        config = _config(shape, "ForSequenceClassification") | numbered
        if "classifier_pooling" in config:
            config["classifier_pooling"] = _THEIR_POOLING[model.pooling]
        # `transformers` refuses the key for a single class, and without it treats such a model as a regression: only
        # its loss differs.
        kind = {"problem_type": "single_label_classification"} if len(labels) > 1 else {}
        return Exported({**config, **kind}, tensors, {})
    # ModernBERT's token classifier has a dense layer and a norm, the others are one linear layer.
    if shape.head_style == "modernbert":
        tag_head = _text_head(shape, "tag_head", names.text_dense, names.masked_norm, "classifier")
    else:
        tag_head = _linear("classifier", ("tag_head", "classifier"))
    tensors |= _classified(params, tag_head, labels)
    intents = classes["intents"]
    intent_head = _classified(params, _text_head(shape, "intent_head", "dense", "norm", "classifier"), intents)
    config = _config(shape, "ForTokenClassification") | numbered
    return Exported({**config, "intents": list(intents), "pooling": model.pooling}, tensors, intent_head)


def _config(shape: EncoderConfig, suffix: str) -> dict[str, Any]:
    values = their_config(shape)
    prefix = {
        "bert": "Bert",
        "distilbert": "DistilBert",
        "modernbert": "ModernBert",
        "xlm-roberta": "XLMRoberta",
        "xlm-roberta-xl": "XLMRobertaXL",
    }[values["model_type"]]
    return {"architectures": [prefix + suffix], **values, "dtype": "float32"}


def _text_head(shape: EncoderConfig, head: str, dense: str, norm: str, classifier: str) -> Iterator[Tensor]:
    """A `SequenceHead` or ModernBERT's `TokenHead` under the given names."""
    yield from _linear(dense, (head, "dense"), bias=shape.head_bias)
    if shape.head_style == "modernbert":
        yield from _norm(norm, (head, "norm"), bias=shape.norm_bias)
    yield from _linear(classifier, (head, "classifier"))


def _classified(params: Params, head: Iterable[Tensor], labels: tuple[str, ...]) -> dict[str, np.ndarray]:
    """A head's tensors without the classes that only pad a label map, which are the last rows of the classifier."""
    entries = tuple(head)
    tensors = _tensors(params, entries)
    for entry in entries:
        if entry.path[-2] == "classifier":
            tensors[entry.name] = np.ascontiguousarray(tensors[entry.name][: len(labels)])
    return tensors


def tokenizer_ids(shape: EncoderConfig, *, cls: int, sep: int, pad: int) -> dict[str, int]:
    """The tokenizer's keys of config.json. UserError where the model counts positions from another padding id."""
    if shape.position_offset and pad != shape.position_offset - 1:
        raise UserError(
            f"encoder.position_offset: models of this family find their positions by a padding id of "
            f"{shape.position_offset - 1}, and the tokenizer's is {pad}; train a student of another family to export it"
        )
    ids = {"pad_token_id": pad, "bos_token_id": cls, "eos_token_id": sep}
    return ids | ({"cls_token_id": cls, "sep_token_id": sep} if shape.head_style == "modernbert" else {})
