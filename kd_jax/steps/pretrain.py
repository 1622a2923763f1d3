"""Masked language modeling: the hard loss on the masked positions."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.losses.blocked import block_for, blocked_losses
from kd_jax.losses.fused import fused_losses, serves_mesh
from kd_jax.losses.logits import distill_loss, masked_cross_entropy
from kd_jax.losses.tiling import Decoder
from kd_jax.models.functional import Functional
from kd_jax.steps.objective import Frozen, Key, Loss, Objective, Scales
from kd_jax.types import Array, Batch, Params, Term


def masked_accuracy(logits_RxKxV: Array, batch: Batch) -> Term:
    """Masked tokens whose most likely prediction is the original token."""
    hits = jnp.argmax(logits_RxKxV, axis=-1) == batch["masked_targets"]
    weights = batch["masked_weights"]
    return jnp.sum(hits * weights), jnp.sum(weights)


def masked_logits(model: Functional, params: Params, batch: Batch, key: Key = None) -> Array:
    """Logits [R, K, V] at the masked positions only."""
    return model.mlm_logits(params, model.hidden_at(params, batch, batch["masked_positions"], key))


@functools.cache
def make_pretrain_objective(model: Functional, fused: bool = False) -> Objective:
    """Cross entropy at the masked positions, whose logits are formed in blocks, or stay in kernels (fused)."""

    def of_block(logits_BxV: jax.Array, per_position: Any, constants: Any) -> Any:
        targets, weights = per_position["targets"], per_position["weights"]
        return distill_loss(logits_BxV, (), targets, weights, 1.0, constants)

    def loss(params: Params, frozen: Frozen, batch: Batch, key: Key, scales: Scales, progress: Array) -> Loss:
        del frozen, progress
        features = model.mlm_features(params, model.hidden_at(params, batch, batch["masked_positions"], key))
        table, bias = model.decoder(params)
        targets, weights = jnp.asarray(batch["masked_targets"]), jnp.asarray(batch["masked_weights"])
        if fused and serves_mesh(targets.shape[0]):
            total, sums = fused_losses(Decoder(features, table, bias), None, targets, weights, 1.0, scales)
        else:
            masked, block = {"targets": targets, "weights": weights}, block_for(table.shape[-2])
            total, sums = blocked_losses(of_block, features, table, bias, masked, dict(scales), block=block)
        count = jnp.sum(weights)
        return total, {name: (value, count) for name, value in sums.items()}

    return Objective(
        weights=lambda batch: {"mlm": jnp.sum(batch["masked_weights"])},
        coefficients=lambda progress: {"mlm": 1.0},
        loss=loss,
    )


def make_heldout_step(model: Functional):
    """(params, batch) -> {"loss", "accuracy", "unigram_loss"} as (sum, weight) over the masked tokens.

    batch["unigram"] float32 [R, K] holds a unigram's log probability of each target, to set the loss against.
    """

    def heldout_step(params: Params, batch: Batch) -> dict[str, Term]:
        logits = masked_logits(model, params, batch)
        return {
            "loss": masked_cross_entropy(logits, batch["masked_targets"], batch["masked_weights"]),
            "accuracy": masked_accuracy(logits, batch),
            "unigram_loss": (-jnp.sum(batch["unigram"] * batch["masked_weights"]), jnp.sum(batch["masked_weights"])),
        }

    return heldout_step
