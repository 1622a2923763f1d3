"""Models as pure functions of plain parameter trees: what steps, trainer and evaluation call."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kd_jax.models.encoder import Captured
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.heads import IntentSlotModel, MaskedLanguageModel, SequenceClassifier, encode
from kd_jax.types import Array, Batch, Params


@dataclasses.dataclass(frozen=True)
class Functional:
    """One kind of model at one size: "mlm", "dc" (needs `domains`) or "icner" (needs `intents` and `tags`).

    Hashable, so a jitted function may close over it. Parameters are nested dicts of float32 arrays with string keys;
    those of all layers are stacked on axis 0 under params["encoder"]["layers"]. `compute_dtype` is that of
    activations and logits. Without a `dropout_key` everything is deterministic.
    """

    kind: Literal["mlm", "dc", "icner"]
    config: EncoderConfig
    domains: int = 0
    intents: int = 0
    tags: int = 0
    compute_dtype: Literal["float32", "bfloat16"] = "float32"

    def _build(self, rngs: nnx.Rngs) -> nnx.Module:
        if self.kind == "mlm":
            return MaskedLanguageModel(self.config, rngs=rngs)
        if self.kind == "dc":
            return SequenceClassifier(self.config, self.domains, rngs=rngs)
        return IntentSlotModel(self.config, self.intents, self.tags, rngs=rngs)

    def _merge(self, params: Params) -> Any:
        return nnx.merge(_graph_and_state(self)[0], params)

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters from a PRNG key; may be jitted with output shardings."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(params=key)), nnx.Param))

    def abstract(self) -> Params:
        """The parameters as jax.ShapeDtypeStruct."""
        return nnx.to_pure_dict(_graph_and_state(self)[1])

    def logical_axes(self) -> Params:
        """For each parameter the names of its axes: "layers", "vocab", "positions", "embed", "heads", "mlp" or None."""

        def names(path: tuple, variable: nnx.Variable) -> tuple[str | None, ...]:
            return (("layers",) if path[:2] == ("encoder", "layers") else ()) + variable.get_metadata("axes")

        flat = nnx.to_flat_state(_graph_and_state(self)[1])
        return nnx.traversals.unflatten_mapping({path: names(path, variable) for path, variable in flat})

    def hidden(self, params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """Hidden states [R, L, H] of every token, of any kind of model; padding is finite and without meaning."""
        return self.capture(params, batch, dropout_key).hidden

    def hidden_at(
        self, params: Params, batch: Batch, columns_RxK: Array, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Hidden states [R, K, H] at those columns of each row alone: of an unrolled model's last layer nothing is
        computed for the others but keys and values. With dropout, not the masks that `hidden` draws.
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
        """What `hidden` gives, and with it the states after `layers`, the query, key and value projections of the
        layers in `projections`, and the embeddings. Layers count from 0; ValueError for one that is not there. With
        `columns_RxK` the hidden states are those of `hidden_at`.
        """
        return encode(
            self._merge(params).encoder,
            batch,
            jnp.dtype(self.compute_dtype),
            dropout_key,
            layers=layers,
            projections=projections,
            embeddings=embeddings,
            at_RxK=None if columns_RxK is None else jnp.asarray(columns_RxK),
        )

    def mlm_logits(self, params: Params, hidden_RxKxH: jax.Array) -> jax.Array:
        """Masked-LM logits [R, K, V] of hidden states gathered at the wanted positions."""
        model = self._merge(params)
        return model.mlm_head(hidden_RxKxH, model.encoder.embeddings.tokens[...])

    def mlm_features(self, params: Params, hidden_RxKxH: jax.Array) -> jax.Array:
        """What `decoder` turns into masked-LM logits: features [R, K, H] of hidden states at the wanted positions."""
        return self._merge(params).mlm_head.transform(hidden_RxKxH)

    def decoder(self, params: Params) -> tuple[jax.Array, jax.Array | None]:
        """(table [V, H], bias [V] or None): logits are features @ table.T + bias."""
        bias = params["mlm_head"]["bias"] if self.config.decoder_bias else None
        return params["encoder"]["embeddings"]["tokens"], bias

    def domain_logits(self, params: Params, batch: Batch, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [R, S, domains]."""
        return self._merge(params)(batch, jnp.dtype(self.compute_dtype), dropout_key)

    def intent_and_tag_logits(
        self, params: Params, batch: Batch, dropout_key: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Logits [R, S, intents] and [R, L, tags]."""
        return self._merge(params)(batch, jnp.dtype(self.compute_dtype), dropout_key)


@functools.cache
def _graph_and_state(model: Functional) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: model._build(nnx.Rngs(params=0))))


def parameter_count(params: Params) -> dict[str, int]:
    """{"total": all, "without_embeddings": less the token, position and type tables and the decoder's bias}."""
    total = embeddings = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = tuple(entry.key for entry in path)
        size = int(np.prod(leaf.shape))
        total += size
        if (names[:2] == ("encoder", "embeddings") and names[2] != "norm") or names == ("mlm_head", "bias"):
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
    masked-LM head out. last_layer_at: the number of columns that `hidden_at` is asked for; None counts the whole row.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    matrices = (3 if config.gated else 2) * hidden * inner

    def layer(asking: int) -> float:
        """Keys and values of the whole row; queries, output and feed-forward of the columns that ask."""
        return 2.0 * (length * 2 * hidden**2 + asking * (2 * hidden**2 + matrices + 2 * length * hidden))

    narrow = last_layer_at if last_layer_at is not None and config.scan == "unroll" else length
    layers = (config.num_layers - 1) * layer(length) + layer(narrow)
    head = 2.0 * masked_slots * (hidden**2 + hidden * vocab)
    if not training:
        return layers + head
    return 3 * (layers + head) + (layers if config.remat else 0.0)
