"""One bidirectional encoder for BERT, RoBERTa / XLM-R, XLM-R XL and ModernBERT / mmBERT, on packed rows."""

from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from kd_jax.models.attention import Attention, Projections, Sight, at_columns, rotary_tables
from kd_jax.models.attention_kernels import PLAIN, Kernel, computes
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.layers import ACTIVATIONS, LayerNorm, Linear, drop, random_table, recomputed
from kd_jax.models.token_table import look_up
from kd_jax.types import Array, Batch, UserError, row_axes


class Captured(NamedTuple):
    """Hidden states of an encoder and the requested inner states, all in the compute dtype.

    States are [R, L, H]; projections are [R, L, N, D] for N heads of size D.
    """

    hidden: jax.Array  # the encoder's output
    embeddings: jax.Array | None  # the input of layer 0
    layers: dict[int, jax.Array]  # the output of a layer, before any final norm
    projections: dict[int, Projections]  # before rotation and scaling


def by_rows(x: jax.Array) -> jax.Array:
    """The same activations [R, ...] or [R * L, ...], with rows over the devices that share them out."""
    # Without this constraint XLA may lay activations along the parameters' axes, since `fsdp` shards both rows and
    # parameters. Every layer would then sum activations over the devices; gathering its parameters moves far less.
    axes, _ = row_axes(x.shape[0])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


# What layers attend to: segment ids [R, L]; and for local and global layers the mask [R, L, L], None if a kernel makes
# its own, and the rotary tables or None.
Views = tuple[jax.Array, dict[bool, tuple[jax.Array | None, jax.Array | None]]]

# The states after the last layer, after the captured layers, and the captured projections.
_Outcome = tuple[jax.Array, dict[int, jax.Array], dict[int, Projections]]


class MLP(nnx.Module):
    """The feed-forward part of a layer, gated (GeGLU) or plain."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size
        std, bias = config.initializer_range, config.use_bias
        # A gated layer's two halves are the activated input and its gate, in this order.
        outputs, axes = ((2, inner), ("embed", None, "mlp")) if config.gated else ((inner,), ("embed", "mlp"))
        self.input = Linear((hidden,), outputs, axes, bias=bias, std=std, rngs=rngs)
        self.output = Linear((inner,), (hidden,), ("mlp", "embed"), bias=bias, std=config.output_std, rngs=rngs)

    def __call__(self, x_TxH: jax.Array) -> jax.Array:
        return self.output(recomputed(self._activated)(self.input(x_TxH)))

    def _activated(self, inner: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.config.activation]
        if not self.config.gated:
            return activation(inner)
        activated, gate = jnp.split(inner, 2, axis=1)
        return (activation(activated) * gate)[:, 0]


class Layer(nnx.Module):
    """Attention and feed-forward with their norms before (pre) or after (post) each."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.attention_norm = LayerNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = LayerNorm(config)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(
        self,
        x_TxH: jax.Array,
        sight: Sight,
        skip_norm: jax.Array | bool,
        dropout_key: jax.Array | None,
        at_RxK: jax.Array | None,
    ) -> tuple[jax.Array, Projections]:
        """The states after the layer, and the attention's projections.

        skip_norm: leave out the attention norm. With columns `at_RxK` of each row, only their states are computed,
        [R * K, H].
        """
        rate, post = self.config.dropout, self.config.norm_placement == "post"
        if post or (isinstance(skip_norm, bool) and skip_norm):
            normed = x_TxH
        else:
            normed = self.attention_norm(x_TxH)
            # Traced in a scan, whose layers share one program: compute the norm, then choose.
            normed = normed if isinstance(skip_norm, bool) else jnp.where(skip_norm, x_TxH, normed)
        mixed, projected = self.attention(normed, sight, dropout_key, at_RxK)
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
        longest = config.max_positions + config.position_offset if config.positions == "learned" else 0
        self.tokens = random_table(config, config.vocab_size, "vocab", rngs)
        self.positions = random_table(config, longest, "positions", rngs) if longest else None
        self.types = random_table(config, config.type_vocab_size, None, rngs) if config.type_vocab_size else None
        self.norm = LayerNorm(config) if config.embedding_norm else None

    def __call__(
        self, tokens_RxL: jax.Array, positions_RxL: jax.Array, compute_dtype: Any, dropout_key: jax.Array | None
    ) -> jax.Array:
        """Embeddings [R * L, H] in the compute dtype."""
        x = look_up(self.tokens[...], tokens_RxL)
        if self.positions is not None:
            x = x + jnp.take(self.positions[...], positions_RxL.reshape(-1) + self.config.position_offset, axis=0)
        if self.types is not None:
            x = x + self.types[0][None]
        if self.norm is not None:
            x = self.norm(x)
        return drop(by_rows(x.astype(compute_dtype)), self.config.dropout, dropout_key, 0)


class Encoder(nnx.Module):
    """Tokens to hidden states.

    The parameters of all layers are stacked on axis 0 of `layers`, scanned or not: a scan compiles one layer for any
    depth, checkpoints do not depend on the choice, and a few large arrays are cheaper to update and save than many.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked(rngs: nnx.Rngs) -> Layer:
            return Layer(config, rngs=rngs)

        self.layers = stacked(rngs)
        self.final_norm = LayerNorm(config) if config.final_norm else None

    def __call__(
        self,
        batch: Batch,
        compute_dtype: Any,
        dropout_key: jax.Array | None = None,
        attention: Kernel = PLAIN,
        *,
        layers: tuple[int, ...] = (),
        projections: tuple[int, ...] = (),
        embeddings: bool = False,
        at_RxK: Array | None = None,
    ) -> Captured:
        """Hidden states [R, L, H] in `compute_dtype`, and the states after `layers`, the projections of the layers in
        `projections` and the embeddings. Only these are kept: a scan over the layers carries nothing else. Texts of one
        row do not attend to each other; a text longer than `max_positions` raises UserError. States at padding are
        finite and meaningless.

        With columns `at_RxK` of each row, the hidden states are those at them, [R, K, H]. If the last layer is unrolled
        and not captured, its queries and all that follows are computed at these columns only.
        """
        config = self.config
        at_RxK = None if at_RxK is None else jnp.asarray(at_RxK)
        names = ("tokens", "segment_ids", "positions")
        tokens_RxL, segment_ids_RxL, positions_RxL = (jnp.asarray(batch[name]) for name in names)
        rows, length = tokens_RxL.shape
        if length > config.max_positions:
            raise UserError(
                f"rows.length: rows of {length} tokens do not fit a model with {config.max_positions} positions; "
                f"shorten the rows or raise max_positions"
            )
        for layer in (*layers, *projections):
            if not 0 <= layer < config.num_layers:
                raise ValueError(f"layer {layer} is not one of the {config.num_layers} layers")
        drops = config.attention_dropout > 0 and dropout_key is not None
        kernel = attention if computes(attention, length, drops) else PLAIN
        masks: dict[bool, jax.Array | None] = {True: None, False: None}
        if kernel == PLAIN:
            # Padding is a separate segment, so every token attends at least to itself and no softmax is empty.
            whole = segment_ids_RxL[:, :, None] == segment_ids_RxL[:, None, :]
            columns = jnp.arange(length)
            near = jnp.abs(columns[:, None] - columns[None, :]) <= config.local_window // 2
            masks = {True: whole, False: whole & near[None]}
        tables: dict[bool, jax.Array | None] = {True: None, False: None}
        if config.positions == "rotary":
            # A program exported for any length only knows that the length is at most max_positions.
            longest = config.max_positions if jax.export.is_symbolic_dim(length) else length
            for kind, theta in ((True, config.global_theta), (False, config.local_theta)):
                tables[kind] = rotary_tables(positions_RxL, longest, config.head_dim, theta)
        views: Views = segment_ids_RxL, {kind: (masks[kind], tables[kind]) for kind in masks}
        first_TxH = self.embeddings(tokens_RxL, positions_RxL, compute_dtype, dropout_key)
        wanted = sorted(set(layers)), sorted(set(projections))
        narrow = at_RxK if config.scan == "unroll" and config.num_layers - 1 not in (*layers, *projections) else None
        if config.scan == "scan":
            x_TxH, after, projected = self._scanned(first_TxH, views, kernel, dropout_key, *wanted)
        else:
            x_TxH, after, projected = self._unrolled(first_TxH, views, kernel, dropout_key, *wanted, narrow)
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

    def _unrolled(
        self,
        x_TxH: jax.Array,
        views: Views,
        kernel: Kernel,
        key: jax.Array | None,
        layers: list[int],
        projections: list[int],
        at_RxK: jax.Array | None,
    ) -> _Outcome:
        """Layer by layer: compiles longer, but each layer knows its kind, and the last one may be narrowed."""
        config = self.config
        graph, stacked = nnx.split(self.layers)

        # Everything traced is an argument: jax.checkpoint would keep what the function closes over.
        def apply(layer: int, x_TxH: jax.Array, parameters: Any, views: Views, key: Any, at_RxK: Any) -> Any:
            x_TxH = by_rows(x_TxH)
            skip_norm = config.skip_first_attention_norm and layer == 0
            layer_key = None if key is None else jax.random.fold_in(key, layer + 1)
            segment_ids_RxL, by_kind = views
            mask_RxLxL, tables = by_kind[config.is_global(layer)]
            sight = Sight(segment_ids_RxL, mask_RxLxL, tables, not config.is_global(layer), kernel)
            x_TxH, projected = nnx.merge(graph, parameters)(x_TxH, sight, skip_norm, layer_key, at_RxK)
            return x_TxH, projected if layer in projections else None

        if config.remat:
            apply = jax.checkpoint(apply, static_argnums=0)
        after: dict[int, jax.Array] = {}
        projected: dict[int, Any] = {}
        for layer in range(config.num_layers):
            parameters = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
            at_last = at_RxK if layer == config.num_layers - 1 else None
            x_TxH, projected[layer] = apply(layer, x_TxH, parameters, views, key, at_last)
            after[layer] = x_TxH
        return x_TxH, {layer: after[layer] for layer in layers}, {layer: projected[layer] for layer in projections}

    def _scanned(
        self,
        x_TxH: jax.Array,
        views: Views,
        kernel: Kernel,
        key: jax.Array | None,
        layers: list[int],
        projections: list[int],
    ) -> _Outcome:
        """One compiled layer in a loop; captured states are written to buffers that the loop carries."""
        config = self.config
        graph, stacked = nnx.split(self.layers)
        has_local = config.global_every > 1 and config.num_layers > 1
        segment_ids_RxL, by_kind = views

        def apply(x_TxH: jax.Array, layer: jax.Array, parameters: Any) -> Any:
            x_TxH = by_rows(x_TxH)
            view, local = by_kind[True], False
            if has_local:
                is_global = layer % config.global_every == 0
                view = jax.tree.map(lambda a, b: jnp.where(is_global, a, b), by_kind[True], by_kind[False])
                local = ~is_global
            mask_RxLxL, tables = view
            sight = Sight(segment_ids_RxL, mask_RxLxL, tables, local, kernel)
            skip_norm = layer == 0 if config.skip_first_attention_norm else False
            layer_key = None if key is None else jax.random.fold_in(key, layer + 1)
            x_TxH, projected = nnx.merge(graph, parameters)(x_TxH, sight, skip_norm, layer_key, None)
            return x_TxH, projected if projections else None

        if config.remat:
            apply = jax.checkpoint(apply, prevent_cse=False)

        def body(carry: Any, scanned: Any) -> Any:
            x_TxH, after, projected = carry
            layer, parameters = scanned
            x_TxH, projections_here = apply(x_TxH, layer, parameters)
            # Outside of the rematerialized function, which would keep the buffers once per layer.
            after = _put(after, layers, layer, x_TxH)
            return (x_TxH, after, _put(projected, projections, layer, projections_here)), None

        heads = (*segment_ids_RxL.shape, config.num_heads, config.head_dim)
        after = _buffer(layers, config.num_layers, x_TxH.shape, x_TxH.dtype)
        projected = (_buffer(projections, config.num_layers, heads, x_TxH.dtype),) * 3
        carry = (x_TxH, after, projected)
        (x_TxH, after, projected), _ = jax.lax.scan(body, carry, (jnp.arange(config.num_layers), stacked))
        return (
            x_TxH,
            {layer: after[slot] for slot, layer in enumerate(layers)},
            {layer: tuple(part[slot] for part in projected) for slot, layer in enumerate(projections)},
        )


def _buffer(wanted: list[int], num_layers: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """Space for the states of the wanted layers, in order, and one slot to discard those of layers after them."""
    spare = bool(wanted) and wanted[-1] < num_layers - 1
    return jnp.zeros((len(wanted) + spare, *shape), dtype) if wanted else None


def _put(buffer: Any, wanted: list[int], layer: jax.Array, state: Any) -> Any:
    """The buffer with a layer's state in its slot."""
    if not wanted:
        return buffer
    # A condition would copy the buffer. Every layer writes to the slot of the next wanted one, which overwrites it.
    slot = jnp.sum(jnp.asarray(wanted) < layer)
    return jax.tree.map(lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, slot, 0), buffer, state)
