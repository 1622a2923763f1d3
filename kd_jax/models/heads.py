"""Heads for masked-LM, domain classification, and intents with slots, in the shapes of their `transformers`
counterparts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.encoder import Captured, Encoder
from kd_jax.models.encoder_config import ACTIVATIONS, EncoderConfig, output_std
from kd_jax.models.linear import LayerNorm, Linear
from kd_jax.models.random_numbers import drop
from kd_jax.types import Batch


def gather_positions(hidden_RxLxH: jax.Array, positions_RxK: jax.Array) -> jax.Array:
    """The hidden states [R, K, H] at the given columns of each row."""
    return jnp.take_along_axis(hidden_RxLxH, positions_RxK[:, :, None], axis=1)


def _dense(config: EncoderConfig, rngs: nnx.Rngs) -> Linear:
    size, std = (config.hidden_size,), output_std(config)
    return Linear(size, size, ("embed", None), bias=config.head_bias, std=std, rngs=rngs)


def _classifier(config: EncoderConfig, classes: int, rngs: nnx.Rngs) -> Linear:
    # ModernBERT starts its classifiers at hidden_size ** -0.5, the others at the range of all matrices.
    std = config.hidden_size**-0.5 if config.head_style == "modernbert" else config.initializer_range
    return Linear((config.hidden_size,), (classes,), ("embed", None), bias=True, std=std, rngs=rngs)


class MaskedHead(nnx.Module):
    """Dense, activation, norm, then the token table transposed plus a bias (BertForMaskedLM, RobertaForMaskedLM,
    ModernBertForMaskedLM)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.activation = config.head_activation
        self.dense = _dense(config, rngs)
        self.norm = LayerNorm(config)
        bias = jnp.zeros(config.vocab_size, jnp.float32)
        self.bias = nnx.Param(bias, axes=("vocab",)) if config.decoder_bias else None

    def transform(self, hidden_RxKxH: jax.Array) -> jax.Array:
        """What the token table is multiplied with, [R, K, H] in the dtype of the hidden states."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden_RxKxH)))

    def __call__(self, hidden_RxKxH: jax.Array, table_VxH: jax.Array) -> jax.Array:
        """Logits [R, K, V] in the dtype of the hidden states."""
        transformed = self.transform(hidden_RxKxH)
        logits = jnp.einsum("rkh,vh->rkv", transformed, table_VxH.astype(transformed.dtype))
        if self.bias is not None:
            logits = logits + self.bias[...].astype(logits.dtype)[None, None, :]
        return logits


class SequenceHead(nnx.Module):
    """Classifies a text by its first token: BertPooler and classifier, RobertaClassificationHead, or ModernBERT's
    prediction head and classifier.
    """

    def __init__(self, config: EncoderConfig, classes: int, *, rngs: nnx.Rngs):
        self.config = config
        self.dense = _dense(config, rngs)
        self.norm = LayerNorm(config) if config.head_style == "modernbert" else None
        self.classifier = _classifier(config, classes, rngs)

    def __call__(self, first_RxSxH: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Logits [R, S, classes]."""
        config = self.config
        if config.head_style == "roberta":
            first_RxSxH = drop(first_RxSxH, config.dropout, dropout_key, 0)
        x = self.dense(first_RxSxH)
        x = jnp.tanh(x) if self.norm is None else self.norm(ACTIVATIONS[config.head_activation](x))
        return self.classifier(drop(x, config.dropout, dropout_key, 1))


class TokenHead(nnx.Module):
    """Classifies each token: a linear layer, after ModernBERT's prediction head in that style."""

    def __init__(self, config: EncoderConfig, classes: int, *, rngs: nnx.Rngs):
        self.config = config
        modern = config.head_style == "modernbert"
        self.dense = _dense(config, rngs) if modern else None
        self.norm = LayerNorm(config) if modern else None
        self.classifier = _classifier(config, classes, rngs)

    def __call__(self, hidden_RxLxH: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Logits [R, L, classes]."""
        config = self.config
        x = hidden_RxLxH
        if self.dense is not None and self.norm is not None:
            x = self.norm(ACTIVATIONS[config.head_activation](self.dense(x)))
        return self.classifier(drop(x, config.dropout, dropout_key, 0))


def encode(
    encoder: Encoder, batch: Batch, compute_dtype: Any, dropout_key: jax.Array | None, **wanted: Any
) -> Captured:
    """Hidden states [R, L, H] of a batch, and what is wanted beside them or instead (`layers`, `projections`,
    `embeddings`, `at_RxK`)."""
    return encoder(
        jnp.asarray(batch["tokens"]),
        jnp.asarray(batch["segment_ids"]),
        jnp.asarray(batch["positions"]),
        compute_dtype=compute_dtype,
        dropout_key=dropout_key,
        **wanted,
    )


def _head_key(dropout_key: jax.Array | None, head: int) -> jax.Array | None:
    """The encoder folds small numbers into its key, one a layer; the heads take theirs from the far end."""
    return None if dropout_key is None else jax.random.fold_in(dropout_key, 2**31 - 1 - head)


class MaskedLanguageModel(nnx.Module):
    """An encoder with its masked-LM head, whose decoder is tied to the token embeddings."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.mlm_head = MaskedHead(config, rngs=rngs)


class SequenceClassifier(nnx.Module):
    """Domain classification (DC)."""

    def __init__(self, config: EncoderConfig, domains: int, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.domain_head = SequenceHead(config, domains, rngs=rngs)

    def __call__(self, batch: Batch, compute_dtype: Any, dropout_key: jax.Array | None) -> jax.Array:
        """Logits [R, S, domains] of the utterances whose first tokens stand at `first_positions`."""
        first_RxS = jnp.asarray(batch["first_positions"])
        first = encode(self.encoder, batch, compute_dtype, dropout_key, at_RxK=first_RxS).hidden
        return self.domain_head(first, _head_key(dropout_key, 0))


class IntentSlotModel(nnx.Module):
    """Intent classification and named-entity recognition together (ICNER): a sequence classifier and a token
    classifier.
    """

    def __init__(self, config: EncoderConfig, intents: int, tags: int, *, rngs: nnx.Rngs):
        self.encoder = Encoder(config, rngs=rngs)
        self.intent_head = SequenceHead(config, intents, rngs=rngs)
        self.tag_head = TokenHead(config, tags, rngs=rngs)

    def __call__(self, batch: Batch, compute_dtype: Any, dropout_key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Intent logits [R, S, intents] and tag logits [R, L, tags]."""
        hidden = encode(self.encoder, batch, compute_dtype, dropout_key).hidden
        first = gather_positions(hidden, jnp.asarray(batch["first_positions"]))
        return self.intent_head(first, _head_key(dropout_key, 0)), self.tag_head(hidden, _head_key(dropout_key, 1))
