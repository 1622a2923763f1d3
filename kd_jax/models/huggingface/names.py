"""Names and shapes of `transformers` masked-LM checkpoints, and where each of their tensors lies in our tree."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.types import Params, UserError

LAYERS = ("encoder", "layers")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint, and the part of one of our arrays that it fills.

    `inputs` counts the leading axes of our part that are a linear layer's inputs: `transformers` stores its weight as
    [outputs, inputs], and its bias, which has 0 inputs, as [outputs], with heads and projections merged. Without a
    count, both sides are the same.
    """

    name: str
    path: tuple[str, ...]
    index: tuple[Any, ...] = ()  # of the part in our array: the layer, and the place in a merged projection
    inputs: int | None = None

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.inputs is None:
            return shape
        outputs, inputs = math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (outputs, inputs) if self.inputs else (outputs,)

    def to_ours(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor's values as our part of that shape. Raises UserError when they do not fit."""
        expected = self.their_shape(shape)
        if values.shape != expected:
            raise UserError(f"{self.name}: its shape is {values.shape}, the model needs {expected}; check the config")
        return values if self.inputs is None else values.T.reshape(shape)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.inputs is None:
            return part
        return np.ascontiguousarray(part.reshape(self.their_shape(part.shape)[::-1]).T)


def linear_entries(
    name: str, path: tuple[str, ...], index: tuple = (), inputs: int = 1, bias: bool = True
) -> Iterator[Tensor]:
    """The weight of a linear layer and, where it has one, its bias."""
    yield Tensor(f"{name}.weight", (*path, "kernel"), index, inputs)
    if bias:
        # The part of a merged projection is chosen after the kernel's input axis, which a bias does not have.
        yield Tensor(f"{name}.bias", (*path, "bias"), tuple(item for item in index if item != slice(None)), 0)


def norm_entries(name: str, path: tuple[str, ...], index: tuple = (), bias: bool = True) -> Iterator[Tensor]:
    """The scale of a norm and, where it has one, its bias."""
    yield Tensor(f"{name}.weight", (*path, "scale"), index)
    if bias:
        yield Tensor(f"{name}.bias", (*path, "bias"), index)


def _bert_like(config: EncoderConfig, body: str) -> Iterator[Tensor]:
    """BERT, RoBERTa and XLM-R (norms after each block), XLM-R XL (norms before)."""
    embeddings = ("encoder", "embeddings")
    yield Tensor(f"{body}.embeddings.word_embeddings.weight", (*embeddings, "tokens"))
    yield Tensor(f"{body}.embeddings.position_embeddings.weight", (*embeddings, "positions"))
    yield Tensor(f"{body}.embeddings.token_type_embeddings.weight", (*embeddings, "types"))
    pre = config.norm_placement == "pre"
    if not pre:
        yield from norm_entries(f"{body}.embeddings.LayerNorm", (*embeddings, "norm"))
    attention_norm, mlp_norm = (
        ("attention.self_attn_layer_norm", "LayerNorm") if pre else ("attention.output.LayerNorm", "output.LayerNorm")
    )
    for layer in range(config.num_layers):
        name, index = f"{body}.encoder.layer.{layer}", (layer,)
        for part, projection in enumerate(("query", "key", "value")):
            path = (*LAYERS, "attention", "query_key_value")
            yield from linear_entries(f"{name}.attention.self.{projection}", path, (layer, slice(None), part))
        yield from linear_entries(f"{name}.attention.output.dense", (*LAYERS, "attention", "output"), index, inputs=2)
        yield from norm_entries(f"{name}.{attention_norm}", (*LAYERS, "attention_norm"), index)
        yield from linear_entries(f"{name}.intermediate.dense", (*LAYERS, "mlp", "input"), index)
        yield from linear_entries(f"{name}.output.dense", (*LAYERS, "mlp", "output"), index)
        yield from norm_entries(f"{name}.{mlp_norm}", (*LAYERS, "mlp_norm"), index)
    if pre:
        yield from norm_entries(f"{body}.encoder.LayerNorm", ("encoder", "final_norm"))


def _distilbert(config: EncoderConfig) -> Iterator[Tensor]:
    """BERT's shape without token types, under DistilBERT's names."""
    embeddings = ("encoder", "embeddings")
    yield Tensor("distilbert.embeddings.word_embeddings.weight", (*embeddings, "tokens"))
    yield Tensor("distilbert.embeddings.position_embeddings.weight", (*embeddings, "positions"))
    yield from norm_entries("distilbert.embeddings.LayerNorm", (*embeddings, "norm"))
    for layer in range(config.num_layers):
        name, index = f"distilbert.transformer.layer.{layer}", (layer,)
        for part, projection in enumerate(("q_lin", "k_lin", "v_lin")):
            path = (*LAYERS, "attention", "query_key_value")
            yield from linear_entries(f"{name}.attention.{projection}", path, (layer, slice(None), part))
        yield from linear_entries(f"{name}.attention.out_lin", (*LAYERS, "attention", "output"), index, inputs=2)
        yield from norm_entries(f"{name}.sa_layer_norm", (*LAYERS, "attention_norm"), index)
        yield from linear_entries(f"{name}.ffn.lin1", (*LAYERS, "mlp", "input"), index)
        yield from linear_entries(f"{name}.ffn.lin2", (*LAYERS, "mlp", "output"), index)
        yield from norm_entries(f"{name}.output_layer_norm", (*LAYERS, "mlp_norm"), index)


def _modernbert(config: EncoderConfig) -> Iterator[Tensor]:
    bias, norm_bias = config.use_bias, config.norm_bias
    yield Tensor("model.embeddings.tok_embeddings.weight", ("encoder", "embeddings", "tokens"))
    yield from norm_entries("model.embeddings.norm", ("encoder", "embeddings", "norm"), bias=norm_bias)
    for layer in range(config.num_layers):
        name, index = f"model.layers.{layer}", (layer,)
        if layer > 0:
            yield from norm_entries(f"{name}.attn_norm", (*LAYERS, "attention_norm"), index, norm_bias)
        yield from linear_entries(f"{name}.attn.Wqkv", (*LAYERS, "attention", "query_key_value"), index, bias=bias)
        yield from linear_entries(f"{name}.attn.Wo", (*LAYERS, "attention", "output"), index, inputs=2, bias=bias)
        yield from norm_entries(f"{name}.mlp_norm", (*LAYERS, "mlp_norm"), index, norm_bias)
        yield from linear_entries(f"{name}.mlp.Wi", (*LAYERS, "mlp", "input"), index, bias=bias)
        yield from linear_entries(f"{name}.mlp.Wo", (*LAYERS, "mlp", "output"), index, bias=bias)
    yield from norm_entries("model.final_norm", ("encoder", "final_norm"), bias=norm_bias)


def family(config: EncoderConfig) -> str:
    """Whose names the tensors have: bert | distilbert (BERT's shape without token types) | roberta | modernbert."""
    return "distilbert" if config.head_style == "bert" and not config.type_vocab_size else config.head_style


def body_map(config: EncoderConfig) -> tuple[Tensor, ...]:
    """Every tensor of the encoder."""
    match family(config):
        case "bert":
            return tuple(_bert_like(config, "bert"))
        case "distilbert":
            return tuple(_distilbert(config))
        case "roberta":
            return tuple(_bert_like(config, "roberta"))
        case _:
            return tuple(_modernbert(config))


def head_map(config: EncoderConfig) -> tuple[Tensor, ...]:
    """Every tensor of the masked-LM head, its tied decoder excepted."""
    dense, norm, bias = ("mlm_head", "dense"), ("mlm_head", "norm"), ("mlm_head", "bias")
    match family(config):
        case "bert":
            first, second, third = (
                "cls.predictions.transform.dense",
                "cls.predictions.transform.LayerNorm",
                "cls.predictions",
            )
        case "distilbert":
            first, second, third = "vocab_transform", "vocab_layer_norm", "vocab_projector"
        case "roberta":
            first, second, third = "lm_head.dense", "lm_head.layer_norm", "lm_head"
        case _:
            first, second, third = "head.dense", "head.norm", "decoder"
    entries = [*linear_entries(first, dense, bias=config.head_bias), *norm_entries(second, norm, bias=config.norm_bias)]
    return (*entries, *([Tensor(f"{third}.bias", bias)] if config.decoder_bias else []))


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
_UNUSED = {
    "bert": {
        "bert.embeddings.position_ids",
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    },
    "distilbert": set(),
    "roberta": {
        "roberta.embeddings.position_ids",
        "roberta.pooler.dense.weight",
        "roberta.pooler.dense.bias",
    },
    "modernbert": set(),
}


def canonical_names(names: Iterable[str], config: EncoderConfig) -> dict[str, str]:
    """The name in our map -> the checkpoint's name, for spellings that differ: a body saved alone has no prefix, and
    the first BERT checkpoints call a norm's weight and bias gamma and beta.
    """
    names, prefix = list(names), BODY[family(config)]
    bare = not any(name.startswith(prefix) for name in names)
    found = {}
    for name in names:
        ours = prefix + name if bare else name
        for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
            ours = ours.removesuffix(old) + new if ours.endswith("LayerNorm" + old) else ours
        found[ours] = name
    return found


def check_names(names: Collection[str], config: EncoderConfig) -> bool:
    """Whether a checkpoint with tensors of these (canonical) names has a masked-LM head beside its body.

    Raises UserError naming the first tensor that is unknown or missing; a head is there whole or not at all.
    """
    kind = family(config)
    head = {entry.name for entry in head_map(config)}
    known = {entry.name for entry in body_map(config)} | head | TIED[kind].keys() | _UNUSED[kind]
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no tensor of this name in a {kind} model of this config; check the config")
    has_head = any(name in head or name in TIED[kind] for name in names)
    for entry in name_map(config) if has_head else body_map(config):
        if entry.name not in names:
            raise UserError(f"{entry.name}: the checkpoint lacks this tensor; check that it is a model of this config")
    return has_head


def untied(name: str, first: str) -> UserError:
    """What to tell the user about a decoder of its own."""
    return UserError(f"{name}: differs from {first}, and the model ties the two; tie them before importing")


def from_huggingface(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> Params:
    """Float32 parameters of kind "mlm" from a checkpoint's tensors.

    Raises UserError naming the tensor that is missing, unknown, of another shape, or untied where the model ties it.
    """
    if not check_names(tensors.keys(), config):
        raise UserError(f"{head_map(config)[0].name}: the checkpoint lacks this tensor; it has no masked-LM head")
    for name, first in TIED[family(config)].items():
        if name in tensors and first in tensors and not np.array_equal(tensors[name], tensors[first]):
            raise untied(name, first)
    flat: dict[tuple[str, ...], np.ndarray] = {}
    params: Params = _arrays(Functional("mlm", config).abstract(), (), flat)
    for entry in name_map(config):
        array = flat[entry.path]
        array[entry.index] = entry.to_ours(np.asarray(tensors[entry.name]), array[entry.index].shape)
    return params


def to_huggingface(params: Params, config: EncoderConfig) -> dict[str, np.ndarray]:
    """The checkpoint's tensors from parameters of kind "mlm"; tied tensors stand under their first name only."""
    return named(params, name_map(config))


def named(params: Params, entries: Iterable[Tensor]) -> dict[str, np.ndarray]:
    """The tensors of some entries from parameters that have them."""
    tensors = {}
    for entry in entries:
        array: Any = params
        for key in entry.path:
            array = array[key]
        tensors[entry.name] = entry.to_theirs(np.asarray(array)[entry.index])
    return tensors


def _arrays(tree: Any, path: tuple[str, ...], flat: dict[tuple[str, ...], np.ndarray]) -> Any:
    """Arrays of the abstract tree's shapes, also listed by path; ones, for the attention norm ModernBERT leaves out."""
    if isinstance(tree, dict):
        return {key: _arrays(item, (*path, key), flat) for key, item in tree.items()}
    flat[path] = np.ones(tree.shape, np.float32)
    return flat[path]
