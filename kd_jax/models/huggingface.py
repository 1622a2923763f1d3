"""Names and shapes of `transformers` masked-LM checkpoints, and where each of their tensors lies in our tree."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
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

    def _their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.inputs is None:
            return shape
        outputs, inputs = math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return (outputs, inputs) if self.inputs else (outputs,)

    def to_ours(self, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor's values as our part of that shape. Raises UserError when they do not fit."""
        expected = self._their_shape(shape)
        if values.shape != expected:
            raise UserError(f"{self.name}: its shape is {values.shape}, the model needs {expected}; check the config")
        return values if self.inputs is None else values.T.reshape(shape)

    def to_theirs(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        if self.inputs is None:
            return part
        return np.ascontiguousarray(part.reshape(self._their_shape(part.shape)[::-1]).T)


def _linear(
    name: str, path: tuple[str, ...], index: tuple = (), inputs: int = 1, bias: bool = True
) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", (*path, "kernel"), index, inputs)
    if bias:
        # The part of a merged projection is chosen after the kernel's input axis, which a bias does not have.
        yield Tensor(f"{name}.bias", (*path, "bias"), tuple(item for item in index if item != slice(None)), 0)


def _norm(name: str, path: tuple[str, ...], index: tuple = (), bias: bool = True) -> Iterator[Tensor]:
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
        yield from _norm(f"{body}.embeddings.LayerNorm", (*embeddings, "norm"))
    attention_norm, mlp_norm = (
        ("attention.self_attn_layer_norm", "LayerNorm") if pre else ("attention.output.LayerNorm", "output.LayerNorm")
    )
    for layer in range(config.num_layers):
        name, index = f"{body}.encoder.layer.{layer}", (layer,)
        for part, projection in enumerate(("query", "key", "value")):
            path = (*LAYERS, "attention", "query_key_value")
            yield from _linear(f"{name}.attention.self.{projection}", path, (layer, slice(None), part))
        yield from _linear(f"{name}.attention.output.dense", (*LAYERS, "attention", "output"), index, inputs=2)
        yield from _norm(f"{name}.{attention_norm}", (*LAYERS, "attention_norm"), index)
        yield from _linear(f"{name}.intermediate.dense", (*LAYERS, "mlp", "input"), index)
        yield from _linear(f"{name}.output.dense", (*LAYERS, "mlp", "output"), index)
        yield from _norm(f"{name}.{mlp_norm}", (*LAYERS, "mlp_norm"), index)
    if pre:
        yield from _norm(f"{body}.encoder.LayerNorm", ("encoder", "final_norm"))


def _modernbert(config: EncoderConfig) -> Iterator[Tensor]:
    bias, norm_bias = config.use_bias, config.norm_bias
    yield Tensor("model.embeddings.tok_embeddings.weight", ("encoder", "embeddings", "tokens"))
    yield from _norm("model.embeddings.norm", ("encoder", "embeddings", "norm"), bias=norm_bias)
    for layer in range(config.num_layers):
        name, index = f"model.layers.{layer}", (layer,)
        if layer > 0:
            yield from _norm(f"{name}.attn_norm", (*LAYERS, "attention_norm"), index, norm_bias)
        yield from _linear(f"{name}.attn.Wqkv", (*LAYERS, "attention", "query_key_value"), index, bias=bias)
        yield from _linear(f"{name}.attn.Wo", (*LAYERS, "attention", "output"), index, inputs=2, bias=bias)
        yield from _norm(f"{name}.mlp_norm", (*LAYERS, "mlp_norm"), index, norm_bias)
        yield from _linear(f"{name}.mlp.Wi", (*LAYERS, "mlp", "input"), index, bias=bias)
        yield from _linear(f"{name}.mlp.Wo", (*LAYERS, "mlp", "output"), index, bias=bias)
    yield from _norm("model.final_norm", ("encoder", "final_norm"), bias=norm_bias)


def name_map(config: EncoderConfig) -> tuple[Tensor, ...]:
    """Every tensor of the masked-LM checkpoint of that shape, tied ones once."""
    dense, norm, bias = ("mlm_head", "dense"), ("mlm_head", "norm"), ("mlm_head", "bias")
    if config.head_style == "modernbert":
        entries = [*_modernbert(config)]
        entries += _linear("head.dense", dense, bias=config.head_bias)
        entries += _norm("head.norm", norm, bias=config.norm_bias)
        entries += [Tensor("decoder.bias", bias)] if config.decoder_bias else []
    elif config.head_style == "bert":
        entries = [*_bert_like(config, "bert")]
        entries += _linear("cls.predictions.transform.dense", dense)
        entries += _norm("cls.predictions.transform.LayerNorm", norm)
        entries += [Tensor("cls.predictions.bias", bias)]
    else:
        entries = [*_bert_like(config, "roberta")]
        entries += _linear("lm_head.dense", dense)
        entries += _norm("lm_head.layer_norm", norm)
        entries += [Tensor("lm_head.bias", bias)]
    return tuple(entries)


# Second names of tied tensors, and what checkpoints carry that a masked-LM does not use.
_TIED = {
    "bert": {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    "roberta": {
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    "modernbert": {"decoder.weight": "model.embeddings.tok_embeddings.weight"},
}
_UNUSED = {
    "bert.embeddings.position_ids",
    "bert.pooler.dense.weight",
    "bert.pooler.dense.bias",
    "cls.seq_relationship.weight",
    "cls.seq_relationship.bias",
    "roberta.embeddings.position_ids",
    "roberta.pooler.dense.weight",
    "roberta.pooler.dense.bias",
}


def from_huggingface(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> Params:
    """Float32 parameters of kind "mlm" from a checkpoint's tensors.

    Raises UserError naming the tensor that is missing, unknown, of another shape, or untied where the model ties it.
    """
    entries, tied = name_map(config), _TIED[config.head_style]
    names = {entry.name for entry in entries}
    for name in tensors:
        if name not in names and name not in tied and name not in _UNUSED:
            raise UserError(
                f"{name}: no tensor of this name in a {config.head_style} model of this config; check the config"
            )
    for name, first in tied.items():
        if name in tensors and first in tensors and not np.array_equal(tensors[name], tensors[first]):
            raise UserError(f"{name}: differs from {first}, and the model ties the two; tie them before importing")
    flat: dict[tuple[str, ...], np.ndarray] = {}
    params: Params = _arrays(Functional("mlm", config).abstract(), (), flat)
    for entry in entries:
        if entry.name not in tensors:
            raise UserError(
                f"{entry.name}: the checkpoint lacks this tensor; check that it is a masked-LM of this config"
            )
        array = flat[entry.path]
        array[entry.index] = entry.to_ours(np.asarray(tensors[entry.name]), array[entry.index].shape)
    return params


def to_huggingface(params: Params, config: EncoderConfig) -> dict[str, np.ndarray]:
    """The checkpoint's tensors from parameters of kind "mlm"; tied tensors stand under their first name only."""
    tensors = {}
    for entry in name_map(config):
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
