"""Heads for masked-LM, domain classification, and intents with slots, shaped like those of `transformers`."""

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, drop


def gather_positions(hidden_RxLxH: jax.Array, positions_RxK: jax.Array) -> jax.Array:
    """The hidden states [R, K, H] at the given columns of each row."""
    return jnp.take_along_axis(hidden_RxLxH, positions_RxK[:, :, None], axis=1)


def _dense(config: EncoderConfig, rngs: nnx.Rngs) -> Linear:
    size = (config.hidden_size,)
    return Linear(size, size, ("embed", None), bias=config.head_bias, std=config.output_std, rngs=rngs)


def _classifier(config: EncoderConfig, classes: int, rngs: nnx.Rngs) -> Linear:
    # As in `transformers`: ModernBERT draws its classifiers with std hidden_size ** -0.5, the others like all matrices.
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
        """The features [R, K, H] that the token table turns into logits, in the dtype of the hidden states."""
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
