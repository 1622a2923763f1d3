"""Heads for masked-LM, domain classification, and intents with slots, shaped like those of `transformers`."""

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.encoder_config import EncoderConfig, Pooling
from kd_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, drop, random_table


def gather_positions(hidden_RxLxH: jax.Array, positions_RxK: jax.Array) -> jax.Array:
    """The hidden states [R, K, H] at the given columns of each row."""
    return jnp.take_along_axis(hidden_RxLxH, positions_RxK[:, :, None], axis=1)


def pooled(
    hidden_RxLxH: jax.Array, segment_ids_RxL: jax.Array, first_positions_RxS: jax.Array, pooling: Pooling
) -> jax.Array:
    """The vectors [R, S, H] of the texts whose first tokens are at the given columns, in the dtype of the states.

    mean and max are over all tokens of a text, special ones included, like the mean over the attention mask in e5 and
    sentence-transformers; the mean is summed in float32. A slot without a text gets some finite vector, of whatever is
    at its column.
    """
    if pooling == "first":
        return gather_positions(hidden_RxLxH, first_positions_RxS)
    segments_RxS = jnp.take_along_axis(segment_ids_RxL, first_positions_RxS, axis=1)
    inside_RxSxL = segment_ids_RxL[:, None, :] == segments_RxS[:, :, None]
    if pooling == "mean":
        total_RxSxH = jnp.einsum(
            "rsl,rlh->rsh",
            inside_RxSxL.astype(hidden_RxLxH.dtype),
            hidden_RxLxH,
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
        # A segment has at least the token at its column.
        count_RxS = jnp.sum(inside_RxSxL, axis=2, dtype=jnp.float32)
        return (total_RxSxH / count_RxS[:, :, None]).astype(hidden_RxLxH.dtype)
    # First the position of the maximum, then its value: so the gradient is one scatter, and [R, S, L, H] is never kept.
    lowest = jnp.asarray(-jnp.inf, hidden_RxLxH.dtype)
    states_RxSxLxH = jnp.where(inside_RxSxL[:, :, :, None], hidden_RxLxH[:, None], lowest)
    columns_RxSxH = jnp.argmax(jax.lax.stop_gradient(states_RxSxLxH), axis=2)
    return jnp.take_along_axis(hidden_RxLxH, columns_RxSxH, axis=1)


def _dense(config: EncoderConfig, rngs: nnx.Rngs) -> Linear:
    size = (config.hidden_size,)
    return Linear(size, size, ("embed", None), bias=config.head_bias, std=config.output_std, rngs=rngs)


def _classifier(config: EncoderConfig, classes: int, rngs: nnx.Rngs) -> Linear:
    # As in `transformers`: ModernBERT draws its classifiers with std hidden_size ** -0.5, the others like all matrices.
    std = config.hidden_size**-0.5 if config.head_style == "modernbert" else config.initializer_range
    return Linear((config.hidden_size,), (classes,), ("embed", None), bias=True, std=std, rngs=rngs)


class MaskedHead(nnx.Module):
    """Dense, activation, norm, then the transposed token table, or a matrix of its shape, plus a bias (BertForMaskedLM,
    RobertaForMaskedLM, ModernBertForMaskedLM)."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.activation = config.head_activation
        self.dense = _dense(config, rngs)
        self.norm = LayerNorm(config)
        bias = jnp.zeros(config.vocab_size, jnp.float32)
        self.bias = nnx.Param(bias, axes=("vocab",)) if config.decoder_bias else None
        self.decoder = None if config.tied_decoder else random_table(config, config.vocab_size, "vocab", rngs)

    def transform(self, hidden_RxKxH: jax.Array) -> jax.Array:
        """The features [R, K, H] that the token table turns into logits, in the dtype of the hidden states."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden_RxKxH)))

    def __call__(self, hidden_RxKxH: jax.Array, table_VxH: jax.Array) -> jax.Array:
        """Logits [R, K, V] in the dtype of the hidden states; an untied matrix replaces the token table."""
        transformed = self.transform(hidden_RxKxH)
        table_VxH = table_VxH if self.decoder is None else self.decoder[...]
        logits = jnp.einsum("rkh,vh->rkv", transformed, table_VxH.astype(transformed.dtype))
        if self.bias is not None:
            logits = logits + self.bias[...].astype(logits.dtype)[None, None, :]
        return logits


class SequenceHead(nnx.Module):
    """Classifies a text from its vector, see `pooled`: BertPooler and classifier, RobertaClassificationHead, or
    ModernBERT's prediction head and classifier.
    """

    def __init__(self, config: EncoderConfig, classes: int, *, rngs: nnx.Rngs):
        self.config = config
        self.dense = _dense(config, rngs)
        self.norm = LayerNorm(config) if config.head_style == "modernbert" else None
        self.classifier = _classifier(config, classes, rngs)

    def __call__(self, text_RxSxH: jax.Array, dropout_key: jax.Array | None) -> jax.Array:
        """Logits [R, S, classes]."""
        config = self.config
        if config.head_style == "roberta":
            text_RxSxH = drop(text_RxSxH, config.dropout, dropout_key, 0)
        x = self.dense(text_RxSxH)
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
