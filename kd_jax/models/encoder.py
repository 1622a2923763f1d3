"""One bidirectional encoder for BERT, RoBERTa / XLM-R, XLM-R XL and ModernBERT / mmBERT, on packed rows."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.random_numbers import drop, truncated_normal
from kd_jax.types import UserError

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Everything that shapes an encoder and its heads; the fields are explained in presets.py. Raises UserError."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    positions: Literal["learned", "rotary"]
    position_offset: int
    type_vocab_size: int
    norm_placement: Literal["pre", "post"]
    embedding_norm: bool
    final_norm: bool
    skip_first_attention_norm: bool
    use_bias: bool
    norm_bias: bool
    norm_epsilon: float
    activation: str
    gated: bool
    global_every: int
    local_window: int
    global_theta: float
    local_theta: float
    head_style: Literal["bert", "roberta", "modernbert"]
    head_activation: str
    head_bias: bool
    decoder_bias: bool
    initializer_range: float
    dropout: float
    attention_dropout: float
    scan: Literal["scan", "unroll"]
    remat: bool

    def __post_init__(self) -> None:
        choices = {
            "positions": ("learned", "rotary"),
            "norm_placement": ("pre", "post"),
            "head_style": ("bert", "roberta", "modernbert"),
            "scan": ("scan", "unroll"),
            "activation": tuple(ACTIVATIONS),
            "head_activation": tuple(ACTIVATIONS),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"encoder.{key}: {getattr(self, key)!r} is not known; choose one of {', '.join(allowed)}"
                )
        for key in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
            "max_positions",
            "global_every",
        ):
            if getattr(self, key) < 1:
                raise UserError(f"encoder.{key}: {getattr(self, key)} is too small; give at least 1")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"encoder.num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}; change one"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(
                f"encoder.num_heads: rotary positions need an even size a head, not {self.head_dim}; change it"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def is_global(self, layer: int) -> bool:
        """Whether that layer attends to the whole text rather than inside the local window."""
        return layer % self.global_every == 0


def encoder_config(values: Any, vocab_size: int) -> EncoderConfig:
    """From the keys of `config.teacher` or `config.student`; the tokenizer's `vocab_size` fills in a 0. Raises
    UserError.
    """
    values = dict(values)
    values["vocab_size"] = values["vocab_size"] or vocab_size
    if values["vocab_size"] < vocab_size:
        raise UserError(
            f"encoder.vocab_size: {values['vocab_size']} is less than the tokenizer's {vocab_size}; "
            f"set it to 0 to take the tokenizer's"
        )
    return EncoderConfig(**values)


class Linear(nnx.Module):
    """Contracts the last axes of x, shaped `inputs`, into `outputs`. `axes` name the kernel's axes for sharding."""

    def __init__(self, inputs, outputs, axes, *, bias: bool, std: float, rngs: nnx.Rngs):
        self.num_inputs = len(inputs)
        self.kernel = nnx.Param(truncated_normal(rngs.params(), (*inputs, *outputs), std), axes=axes)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32), axes=axes[len(inputs) :]) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), self.num_inputs)
        if self.bias is not None:
            bias = self.bias[...].astype(x.dtype)
            y = y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))
        return y


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, config: EncoderConfig):
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.hidden_size, jnp.float32), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size, jnp.float32), axes=(None,)) if config.norm_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        leading = range(x.ndim - 1)
        y = centered * jax.lax.rsqrt(variance + self.epsilon) * jnp.expand_dims(self.scale[...], leading)
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...], leading)
        return y.astype(x.dtype)


def rotary_tables(positions_RxL: jax.Array, head_dim: int, theta: float) -> jax.Array:
    """Cosines and sines of the rotary angles (Su et al., arXiv 2104.09864), float32 [2, R, L, 1, head_dim / 2]."""
    frequencies = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions_RxL[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x_RxLxNxD: jax.Array, tables: jax.Array) -> jax.Array:
    """Turns each pair (x[i], x[i + D / 2]) by its angle."""
    cosine, sine = tables
    first, second = jnp.split(x_RxLxNxD.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(x_RxLxNxD.dtype)


class Attention(nnx.Module):
    """Self-attention inside each segment, with one merged projection for queries, keys and values."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        heads = (config.num_heads, config.head_dim)
        std, bias = config.initializer_range, config.use_bias
        self.query_key_value = Linear(
            (config.hidden_size,), (3, *heads), ("embed", None, "heads", None), bias=bias, std=std, rngs=rngs
        )
        self.output = Linear(
            heads, (config.hidden_size,), ("heads", None, "embed"), bias=bias, std=output_std(config), rngs=rngs
        )

    def __call__(self, x_TxH, mask_RxLxL, tables, dropout_key):
        rows, length, _ = mask_RxLxL.shape
        dtype = x_TxH.dtype
        merged = self.query_key_value(x_TxH)
        query, key, value = (
            merged[:, part].reshape(rows, length, self.config.num_heads, self.config.head_dim) for part in range(3)
        )
        if tables is not None:
            query, key = rotate(query, tables), rotate(key, tables)
        query = query * jnp.asarray(self.config.head_dim**-0.5, dtype)
        scores_RxNxQxK = jnp.einsum("rqnd,rknd->rnqk", query, key, preferred_element_type=jnp.float32)
        scores_RxNxQxK = jnp.where(mask_RxLxL[:, None], scores_RxNxQxK, jnp.finfo(jnp.float32).min)
        shares_RxNxQxK = jax.nn.softmax(scores_RxNxQxK, axis=-1).astype(dtype)
        shares_RxNxQxK = drop(shares_RxNxQxK, self.config.attention_dropout, dropout_key, 0)
        mixed_RxLxNxD = jnp.einsum("rnqk,rknd->rqnd", shares_RxNxQxK, value)
        return self.output(mixed_RxLxNxD.reshape(rows * length, self.config.num_heads, self.config.head_dim))


class MLP(nnx.Module):
    """The feed-forward part of a layer, gated (GeGLU) or plain."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        std, bias = config.initializer_range, config.use_bias
        # A gated layer's two halves are the activated input and its gate, in this order.
        outputs, axes = ((2, inner), ("embed", None, "mlp")) if config.gated else ((inner,), ("embed", "mlp"))
        self.input = Linear((hidden,), outputs, axes, bias=bias, std=std, rngs=rngs)
        self.output = Linear((inner,), (hidden,), ("mlp", "embed"), bias=bias, std=output_std(config), rngs=rngs)

    def __call__(self, x_TxH):
        activation = ACTIVATIONS[self.config.activation]
        inner = self.input(x_TxH)
        return self.output(activation(inner[:, 0]) * inner[:, 1] if self.config.gated else activation(inner))


def output_std(config: EncoderConfig) -> float:
    """Matrices that write to a pre-norm residual stream start smaller, so that its size does not grow with depth."""
    if config.norm_placement == "post":
        return config.initializer_range
    return config.initializer_range / math.sqrt(2 * config.num_layers)


class Layer(nnx.Module):
    """Attention and feed-forward with their norms before (pre) or after (post) each."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = LayerNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_TxH, mask_RxLxL, tables, skip_norm, dropout_key):
        """`skip_norm` is a bool or a traced bool scalar: leave out the attention norm."""
        rate = self.config.dropout
        if self.config.norm_placement == "post":
            mixed = drop(self.attention(x_TxH, mask_RxLxL, tables, dropout_key), rate, dropout_key, 1)
            x_TxH = self.attention_norm(x_TxH + mixed)
            return self.mlp_norm(x_TxH + drop(self.mlp(x_TxH), rate, dropout_key, 2))
        if isinstance(skip_norm, bool):
            normed = x_TxH if skip_norm else self.attention_norm(x_TxH)
        else:
            normed = jnp.where(skip_norm, x_TxH, self.attention_norm(x_TxH))
        x_TxH = x_TxH + drop(self.attention(normed, mask_RxLxL, tables, dropout_key), rate, dropout_key, 1)
        return x_TxH + drop(self.mlp(self.mlp_norm(x_TxH)), rate, dropout_key, 2)


class Embeddings(nnx.Module):
    """Token embeddings, with learned positions and token types where the family has them, and their norm."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config

        def table(rows, axis):
            shape = (rows, config.hidden_size)
            return nnx.Param(truncated_normal(rngs.params(), shape, config.initializer_range), axes=(axis, "embed"))

        self.tokens = table(config.vocab_size, "vocab")
        learned = config.positions == "learned"
        self.positions = table(config.max_positions + config.position_offset, "positions") if learned else None
        self.types = table(config.type_vocab_size, None) if config.type_vocab_size else None
        self.norm = LayerNorm(config) if config.embedding_norm else None

    def __call__(self, tokens_RxL, positions_RxL, compute_dtype, dropout_key):
        x = jnp.take(self.tokens[...], tokens_RxL.reshape(-1), axis=0)
        if self.positions is not None:
            x = x + jnp.take(self.positions[...], positions_RxL.reshape(-1) + self.config.position_offset, axis=0)
        if self.types is not None:
            x = x + self.types[0][None]
        if self.norm is not None:
            x = self.norm(x)
        return drop(x.astype(compute_dtype), self.config.dropout, dropout_key, 0)


class Encoder(nnx.Module):
    """Tokens to hidden states. The parameters of all layers are stacked on axis 0 of `layers`, scanned or not."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs):
            return Layer(config, rngs=rngs)

        self.layers = stacked(rngs)
        self.final_norm = LayerNorm(config) if config.final_norm else None

    def __call__(
        self,
        tokens_RxL: jax.Array,
        segment_ids_RxL: jax.Array,
        positions_RxL: jax.Array,
        *,
        compute_dtype: Any,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states [R, L, H] in `compute_dtype`. Texts of one row do not see each other; a text longer than
        `max_positions` raises UserError. What stands at padding is finite and without meaning."""
        config = self.config
        rows, length = tokens_RxL.shape
        if length > config.max_positions:
            raise UserError(
                f"rows.length: rows of {length} tokens do not suit a model of {config.max_positions} positions; "
                f"shorten the rows or raise max_positions"
            )
        # Padding is a segment of its own, so every token sees at least itself and no softmax is empty.
        whole = segment_ids_RxL[:, :, None] == segment_ids_RxL[:, None, :]
        columns = jnp.arange(length)
        near = jnp.abs(columns[:, None] - columns[None, :]) <= config.local_window // 2
        masks = {True: whole, False: whole & near[None]}
        tables = {True: None, False: None}
        if config.positions == "rotary":
            tables = {
                True: rotary_tables(positions_RxL, config.head_dim, config.global_theta),
                False: rotary_tables(positions_RxL, config.head_dim, config.local_theta),
            }
        x_TxH = self.embeddings(tokens_RxL, positions_RxL, compute_dtype, dropout_key)
        run = self._scanned if config.scan == "scan" else self._unrolled
        x_TxH = run(x_TxH, masks, tables, dropout_key)
        if self.final_norm is not None:
            x_TxH = self.final_norm(x_TxH)
        return x_TxH.reshape(rows, length, config.hidden_size)

    def _unrolled(self, x_TxH, masks, tables, dropout_key):
        config = self.config
        graph, stacked = nnx.split(self.layers)

        def apply(layer, x_TxH, parameters, masks, tables, dropout_key):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer + 1)
            skip_norm = config.skip_first_attention_norm and layer == 0
            kind = config.is_global(layer)
            return nnx.merge(graph, parameters)(x_TxH, masks[kind], tables[kind], skip_norm, key)

        if config.remat:
            apply = jax.checkpoint(apply, static_argnums=0)
        for layer in range(config.num_layers):
            parameters = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            x_TxH = apply(layer, x_TxH, parameters, masks, tables, dropout_key)
        return x_TxH

    def _scanned(self, x_TxH, masks, tables, dropout_key):
        config = self.config
        graph, stacked = nnx.split(self.layers)
        mixed = any(not config.is_global(layer) for layer in range(config.num_layers))

        def body(x_TxH, scanned):
            layer, parameters = scanned
            mask, table = masks[True], tables[True]
            if mixed:
                is_global = layer % config.global_every == 0
                mask = jnp.where(is_global, masks[True], masks[False])
                if table is not None:
                    table = jnp.where(is_global, tables[True], tables[False])
            skip_norm = layer == 0 if config.skip_first_attention_norm else False
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer + 1)
            return nnx.merge(graph, parameters)(x_TxH, mask, table, skip_norm, key), None

        if config.remat:
            body = jax.checkpoint(body, prevent_cse=False)
        return jax.lax.scan(body, x_TxH, (jnp.arange(config.num_layers), stacked))[0]
