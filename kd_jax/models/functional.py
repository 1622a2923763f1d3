"""Models as pure functions of plain parameter trees, for steps, trainer and evaluation."""

import dataclasses
import functools
import math
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from kd_jax.models.attention_kernels import PLAIN, Kernel
from kd_jax.models.encoder import Captured, Encoder
from kd_jax.models.encoder_config import EncoderConfig, Pooling
from kd_jax.models.heads import MaskedHead, SequenceHead, TokenHead, pooled
from kd_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Functional:
    """One kind of model at one size: "mlm", "dc" (needs `domains`) or "icner" (needs `intents` and `tags`).

    Hashable, so a jitted function may close over it. Parameters are nested dicts of float32 arrays with string keys;
    those of all layers are stacked on axis 0 under params["encoder"]["layers"]. `compute_dtype` is the dtype of
    activations and logits, `attention` the kernel for attention. `pooling` is how DC and the intent head read a text.
    Without a `dropout_key` everything is deterministic.
    """

    kind: Literal["mlm", "dc", "icner"]
    config: EncoderConfig
    domains: int = 0
    intents: int = 0
    tags: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    pooling: Pooling = "first"
    attention: Kernel = PLAIN

    def _merge(self, params: Params) -> Any:
        return nnx.merge(_graph_and_state(self)[0], params)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters from a PRNG key; may be jitted with output shardings."""
        return nnx.to_pure_dict(nnx.state(_Model(self, nnx.Rngs(params=key)), nnx.Param))

    def abstract(self) -> Params:
        """The parameters as jax.ShapeDtypeStruct."""
        return nnx.to_pure_dict(_graph_and_state(self)[1])

    def logical_axes(self) -> Params:
        """For each parameter the names of its axes: "layers", "vocab", "positions", "embed", "heads", "mlp" or None."""

        found: dict[Any, tuple[str | None, ...]] = {}
        for path, variable in nnx.to_flat_state(_graph_and_state(self)[1]):
            stacked = ("layers",) if path[:2] == ("encoder", "layers") else ()
            found[path] = (*stacked, *variable.get_metadata("axes"))
        return unflatten_dict(found)

    def hidden(self, params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """Hidden states [R, L, H] of every token, of any kind of model; those of padding are finite and meaningless."""
        return self.capture(params, batch, dropout_key).hidden

    def hidden_at(
        self, params: Params, batch: Batch, columns_RxK: Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states [R, K, H] at those columns of each row only.

        The last layer of an unrolled model computes just keys and values for the other columns. Dropout draws other
        masks than in `hidden`.
        """
        return self.capture(params, batch, dropout_key, columns_RxK=columns_RxK).hidden

    def capture(
        self,
        params: Params,
        batch: Batch,
        dropout_key: jax.Array | None = None,
        *,
        layers: tuple[int, ...] = (),
        projections: tuple[int, ...] = (),
        embeddings: bool = False,
        columns_RxK: Array | None = None,
    ) -> Captured:
        """`hidden`, plus the states after `layers`, the query, key and value projections of the layers in
        `projections`, and the embeddings. Layers count from 0; ValueError for one that does not exist. With
        `columns_RxK` the hidden states are those of `hidden_at`.
        """
        wanted = {"layers": layers, "projections": projections, "embeddings": embeddings, "at_RxK": columns_RxK}
        return self._merge(params).encoder(batch, jnp.dtype(self.compute_dtype), dropout_key, self.attention, **wanted)

    def mlm_logits(self, params: Params, hidden_RxKxH: jax.Array) -> jax.Array:
        """Masked-LM logits [R, K, V] of hidden states gathered at the wanted positions."""
        model = self._merge(params)
        return model.mlm_head(hidden_RxKxH, model.encoder.embeddings.tokens[...])

    def mlm_features(self, params: Params, hidden_RxKxH: jax.Array) -> jax.Array:
        """Features [R, K, H] of hidden states at the wanted positions, which `decoder` turns into masked-LM logits."""
        return self._merge(params).mlm_head.transform(hidden_RxKxH)

    def decoder(self, params: Params) -> tuple[jax.Array, jax.Array | None]:
        """(table [V, H], bias [V] or None): logits are features @ table.T + bias; see token_table for [D, V, H]."""
        head = params["mlm_head"]
        table = params["encoder"]["embeddings"]["tokens"] if self.config.tied_decoder else head["decoder"]
        return table, head["bias"] if self.config.decoder_bias else None

    def domain_logits(self, params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [R, S, domains] of the utterances whose first tokens are at `first_positions`."""
        if self.pooling == "first":  # the last layer is needed at these columns only
            text_RxSxH = self.hidden_at(params, batch, batch["first_positions"], dropout_key)
        else:
            text_RxSxH = self._pooled(self.hidden(params, batch, dropout_key), batch)
        return self._merge(params).domain_head(text_RxSxH, _head_key(dropout_key, 0))

    def intent_and_tag_logits(
        self, params: Params, batch: Batch, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [R, S, intents] and [R, L, tags]."""
        hidden_RxLxH, model = self.hidden(params, batch, dropout_key), self._merge(params)
        intents = model.intent_head(self._pooled(hidden_RxLxH, batch), _head_key(dropout_key, 0))
        return intents, model.tag_head(hidden_RxLxH, _head_key(dropout_key, 1))

    def _pooled(self, hidden_RxLxH: jax.Array, batch: Batch) -> jax.Array:
        segments_RxL, firsts_RxS = jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["first_positions"])
        return pooled(hidden_RxLxH, segments_RxL, firsts_RxS, self.pooling)


class _Model(nnx.Module):
    """An encoder with the heads of one kind."""

    def __init__(self, model: Functional, rngs: nnx.Rngs):
        self.encoder = Encoder(model.config, rngs=rngs)
        if model.kind == "mlm":
            self.mlm_head = MaskedHead(model.config, rngs=rngs)
        elif model.kind == "dc":
            self.domain_head = SequenceHead(model.config, model.domains, rngs=rngs)
        else:
            self.intent_head = SequenceHead(model.config, model.intents, rngs=rngs)
            self.tag_head = TokenHead(model.config, model.tags, rngs=rngs)


def _head_key(dropout_key: jax.Array | None, head: int) -> jax.Array | None:
    # The encoder folds layer + 1 into the same key; counting down from 2**31 - 1 never meets those numbers.
    return None if dropout_key is None else jax.random.fold_in(dropout_key, 2**31 - 1 - head)


@functools.cache
def _graph_and_state(model: Functional) -> tuple[Any, Any]:
    # Shapes only, and cached: merging parameters into this graph is all that a call costs at trace time.
    return nnx.split(nnx.eval_shape(lambda: _Model(model, nnx.Rngs(params=0))))


_DECODER = (("mlm_head", "decoder"), ("mlm_head", "bias"))


def parameter_count(params: Params) -> dict[str, int]:
    """{"total": all, "without_embeddings": without the token, position and type tables, the decoder and its bias}."""
    total = embeddings = 0
    for path, leaf in cast(Any, flatten_dict(params)).items():
        size = math.prod(leaf.shape)
        total += size
        if (path[:2] == ("encoder", "embeddings") and path[2] != "norm") or path in _DECODER:
            embeddings += size
    return {"total": total, "without_embeddings": total - embeddings}


def flops_per_row(
    config: EncoderConfig,
    length: int,
    masked_slots: int,
    vocab: int,
    training: bool,
    last_layer_at: int | None = None,
) -> float:
    """Floating-point operations of the matrix products for one row, a multiply-add counting 2.

    Attention is counted over the whole row, as it is computed. Training counts three times the forward pass (Kaplan
    et al., arXiv 2001.08361), and with remat the layers' forward pass once more. `masked_slots` 0 leaves the
    masked-LM head out. last_layer_at: the number of columns given to `hidden_at`; None counts the whole row.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = (3 if config.gated else 2) * hidden * inner

    def layer(asking: int) -> float:
        """Keys and values of the whole row; queries, output and feed-forward of `asking` columns."""
        return 2.0 * (length * 2 * hidden**2 + asking * (2 * hidden**2 + matrices + 2 * length * hidden))

    narrow = last_layer_at if last_layer_at is not None and config.scan == "unroll" else length
    layers = (config.num_layers - 1) * layer(length) + layer(narrow)
    head = 2.0 * masked_slots * (hidden**2 + hidden * vocab)
    if not training:
        return layers + head
    return 3 * (layers + head) + (layers if config.remat else 0.0)
