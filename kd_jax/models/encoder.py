"""One bidirectional encoder for BERT, RoBERTa / XLM-R, XLM-R XL and ModernBERT / mmBERT, on packed rows."""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.attention import Attention, at_columns, rotary_tables
from kd_jax.models.encoder_config import ACTIVATIONS, EncoderConfig, output_std
from kd_jax.models.linear import LayerNorm, Linear
from kd_jax.models.random_numbers import drop, truncated_normal
from kd_jax.models.row_layout import by_rows
from kd_jax.types import UserError


class Captured(NamedTuple):
    """Hidden states of an encoder, and what of its inner states was asked for, all in the compute dtype.

    hidden, embeddings and those of layers are [R, L, H]; projections are [R, L, N, D] for N heads of size D.
    """

    hidden: jax.Array  # what the encoder gives
    embeddings: jax.Array | None  # what layer 0 reads
    layers: dict[int, jax.Array]  # what a layer gives, before any final norm
    projections: dict[int, tuple[jax.Array, ...]]  # (query, key, value) as projected, neither turned nor scaled


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
        if not self.config.gated:
            return self.output(activation(inner))
        activated, gate = jnp.split(inner, 2, axis=1)
        return self.output((activation(activated) * gate)[:, 0])


class Layer(nnx.Module):
    """Attention and feed-forward with their norms before (pre) or after (post) each."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = LayerNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x_TxH, mask_RxLxL, tables, skip_norm, dropout_key, at_RxK=None):
        """The states after the layer, and the attention's projections. `skip_norm` is a bool or a traced bool scalar:
        leave out the attention norm. With columns `at_RxK` of each row, only their states are computed, [R * K, H].
        """
        rate, post = self.config.dropout, self.config.norm_placement == "post"
        if post or (isinstance(skip_norm, bool) and skip_norm):
            normed = x_TxH
        else:
            normed = self.attention_norm(x_TxH)
            normed = normed if isinstance(skip_norm, bool) else jnp.where(skip_norm, x_TxH, normed)
        mixed, projected = self.attention(normed, mask_RxLxL, tables, dropout_key, at_RxK)
        x_TxH = x_TxH if at_RxK is None else at_columns(x_TxH, at_RxK)
        x_TxH = x_TxH + drop(mixed, rate, dropout_key, 1)
        if post:
            x_TxH = self.attention_norm(x_TxH)
            return self.mlp_norm(x_TxH + drop(self.mlp(x_TxH), rate, dropout_key, 2)), projected
        return x_TxH + drop(self.mlp(self.mlp_norm(x_TxH)), rate, dropout_key, 2), projected


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
        return drop(by_rows(x.astype(compute_dtype)), self.config.dropout, dropout_key, 0)


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
        layers: tuple[int, ...] = (),
        projections: tuple[int, ...] = (),
        embeddings: bool = False,
        at_RxK: jax.Array | None = None,
    ) -> Captured:
        """Hidden states [R, L, H] in `compute_dtype`, and the states after `layers`, the projections of the layers in
        `projections` and the embeddings. What is not asked for is not kept: a scan over the layers carries no more than
        that. Texts of one row do not see each other; a text longer than `max_positions` raises UserError. What stands
        at padding is finite and without meaning.

        With columns `at_RxK` of each row, the hidden states are those at them, [R, K, H]. Where the last layer is
        unrolled and nothing is asked for of it, its queries and all that follows are computed for them alone.
        """
        config = self.config
        rows, length = tokens_RxL.shape
        if length > config.max_positions:
            raise UserError(
                f"rows.length: rows of {length} tokens do not suit a model of {config.max_positions} positions; "
                f"shorten the rows or raise max_positions"
            )
        for layer in (*layers, *projections):
            if not 0 <= layer < config.num_layers:
                raise ValueError(f"layer {layer} is not one of the {config.num_layers} layers")
        # Padding is a segment of its own, so every token sees at least itself and no softmax is empty.
        whole = segment_ids_RxL[:, :, None] == segment_ids_RxL[:, None, :]
        columns = jnp.arange(length)
        near = jnp.abs(columns[:, None] - columns[None, :]) <= config.local_window // 2
        masks = {True: whole, False: whole & near[None]}
        tables = {True: None, False: None}
        if config.positions == "rotary":
            # A program that is exported for any length knows no more of it than that it is at most max_positions.
            longest = config.max_positions if jax.export.is_symbolic_dim(length) else length
            tables = {
                True: rotary_tables(positions_RxL, longest, config.head_dim, config.global_theta),
                False: rotary_tables(positions_RxL, longest, config.head_dim, config.local_theta),
            }
        first_TxH = self.embeddings(tokens_RxL, positions_RxL, compute_dtype, dropout_key)
        wanted = sorted(set(layers)), sorted(set(projections))
        narrow = at_RxK if config.scan == "unroll" and config.num_layers - 1 not in (*layers, *projections) else None
        if config.scan == "scan":
            x_TxH, after, projected = self._scanned(first_TxH, masks, tables, dropout_key, *wanted)
        else:
            x_TxH, after, projected = self._unrolled(first_TxH, masks, tables, dropout_key, *wanted, narrow)
        if at_RxK is not None and narrow is None:
            x_TxH = at_columns(x_TxH, at_RxK)
        if self.final_norm is not None:
            x_TxH = self.final_norm(x_TxH)
        x_TxH = by_rows(x_TxH)
        shape = (rows, length, config.hidden_size)
        return Captured(
            hidden=x_TxH.reshape(rows, -1, config.hidden_size),
            embeddings=first_TxH.reshape(shape) if embeddings else None,
            layers={layer: state.reshape(shape) for layer, state in after.items()},
            projections=projected,
        )

    def _unrolled(self, x_TxH, masks, tables, dropout_key, layers, projections, at_RxK):
        config = self.config
        graph, stacked = nnx.split(self.layers)

        def apply(layer, x_TxH, parameters, masks, tables, dropout_key, at_RxK):
            x_TxH = by_rows(x_TxH)
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer + 1)
            skip_norm = config.skip_first_attention_norm and layer == 0
            kind = config.is_global(layer)
            x_TxH, projected = nnx.merge(graph, parameters)(x_TxH, masks[kind], tables[kind], skip_norm, key, at_RxK)
            return x_TxH, projected if layer in projections else None

        if config.remat:
            apply = jax.checkpoint(apply, static_argnums=0)
        after, projected = {}, {}
        for layer in range(config.num_layers):
            parameters = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            at_last = at_RxK if layer == config.num_layers - 1 else None
            x_TxH, projected[layer] = apply(layer, x_TxH, parameters, masks, tables, dropout_key, at_last)
            after[layer] = x_TxH
        return x_TxH, {layer: after[layer] for layer in layers}, {layer: projected[layer] for layer in projections}

    def _scanned(self, x_TxH, masks, tables, dropout_key, layers, projections):
        config = self.config
        graph, stacked = nnx.split(self.layers)
        mixed = any(not config.is_global(layer) for layer in range(config.num_layers))

        def apply(x_TxH, layer, parameters):
            x_TxH = by_rows(x_TxH)
            mask, table = masks[True], tables[True]
            if mixed:
                is_global = layer % config.global_every == 0
                mask = jnp.where(is_global, masks[True], masks[False])
                if table is not None:
                    table = jnp.where(is_global, tables[True], tables[False])
            skip_norm = layer == 0 if config.skip_first_attention_norm else False
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer + 1)
            x_TxH, projected = nnx.merge(graph, parameters)(x_TxH, mask, table, skip_norm, key)
            return x_TxH, projected if projections else None

        if config.remat:
            apply = jax.checkpoint(apply, prevent_cse=False)

        def body(carry, scanned):
            x_TxH, after, projected = carry
            layer, parameters = scanned
            x_TxH, projections_here = apply(x_TxH, layer, parameters)
            # Outside of what remat computes again, so that the buffers are not kept for each layer.
            after = _put(after, layers, layer, x_TxH)
            return (x_TxH, after, _put(projected, projections, layer, projections_here)), None

        rows, length, _ = masks[True].shape
        heads = (rows, length, config.num_heads, config.head_dim)
        carry = (
            x_TxH,
            _buffer(layers, config.num_layers, x_TxH.shape, x_TxH.dtype),
            (_buffer(projections, config.num_layers, heads, x_TxH.dtype),) * 3,
        )
        (x_TxH, after, projected), _ = jax.lax.scan(body, carry, (jnp.arange(config.num_layers), stacked))
        return (
            x_TxH,
            {layer: after[slot] for slot, layer in enumerate(layers)},
            {layer: tuple(part[slot] for part in projected) for slot, layer in enumerate(projections)},
        )


def _buffer(wanted: list[int], num_layers: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Room for the states of the wanted layers, in order, and where the last layer is not among them one place more."""
    spare = bool(wanted) and wanted[-1] < num_layers - 1
    return jnp.zeros((len(wanted) + spare, *shape), dtype) if wanted else None


def _put(buffer: Any, wanted: list[int], layer: jax.Array, state: Any) -> Any:
    """The buffer with a layer's state where it belongs. Every layer writes to the place of the next wanted one, which
    overwrites it; those after the last wanted one write to the spare place.
    """
    if not wanted:
        return buffer
    place = jnp.sum(jnp.asarray(wanted) < layer)
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, place, 0), buffer, state)
