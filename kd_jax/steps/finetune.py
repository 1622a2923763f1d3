"""Finetuning on labeled utterances: domain classification, and intents together with slot tags."""

import functools

import jax.numpy as jnp

from kd_jax.losses.logits import masked_cross_entropy
from kd_jax.models.functional import Functional
from kd_jax.steps.objective import Frozen, Key, Loss, Objective, Scales, scaled_sum
from kd_jax.types import Array, Batch, Params, Term

# Added to the logits of classes that only pad the label map to a common size; the losses leave such classes out.
ABSENT = -jnp.inf


def labeled_weights(batch: Batch) -> Array:
    """float32 [R, S]: 1 for utterances whose label was seen in train."""
    return batch["utterance_weights"] * (batch["utterance_labels"] >= 0)


def utterance_accuracy(logits_RxSxC: Array, batch: Batch) -> Term:
    """Utterances whose most likely class is the gold one; a label unseen in train counts as an error."""
    hits = jnp.argmax(logits_RxSxC, axis=-1) == batch["utterance_labels"]
    return jnp.sum(hits * batch["utterance_weights"]), jnp.sum(batch["utterance_weights"])


@functools.cache
def make_dc_objective(model: Functional, label_smoothing: float) -> Objective:
    """Cross entropy of the domain."""

    def loss(params: Params, frozen: Frozen, batch: Batch, key: Key, scales: Scales, progress: Array) -> Loss:
        del progress
        logits = model.domain_logits(params, batch, key) + frozen["utterance_classes"][None, None, :]
        labels = jnp.maximum(batch["utterance_labels"], 0)
        domain = masked_cross_entropy(logits, labels, labeled_weights(batch), label_smoothing)
        return scaled_sum({"domain": domain, "accuracy": utterance_accuracy(logits, batch)}, scales)

    return Objective(
        weights=lambda batch: {"domain": jnp.sum(labeled_weights(batch))},
        coefficients=lambda progress: {"domain": 1.0},
        loss=loss,
    )


@functools.cache
def make_icner_objective(model: Functional, label_smoothing: float, tag_weight: float) -> Objective:
    """Cross entropy of the intent plus tag_weight times that of the BIO tags on first sub-words."""

    def loss(params: Params, frozen: Frozen, batch: Batch, key: Key, scales: Scales, progress: Array) -> Loss:
        del progress
        intent_logits, tag_logits = icner_logits(model, params, frozen, batch, key)
        labels = jnp.maximum(batch["utterance_labels"], 0)
        tags = jnp.maximum(batch["tag_labels"], 0)
        tag_hits = jnp.argmax(tag_logits, axis=-1) == batch["tag_labels"]
        terms = {
            "intent": masked_cross_entropy(intent_logits, labels, labeled_weights(batch), label_smoothing),
            "tags": masked_cross_entropy(tag_logits, tags, batch["tag_weights"], label_smoothing),
            "accuracy": utterance_accuracy(intent_logits, batch),
            "tag_accuracy": (jnp.sum(tag_hits * batch["tag_weights"]), jnp.sum(batch["tag_weights"])),
        }
        return scaled_sum(terms, scales)

    def weights(batch: Batch) -> Scales:
        return {"intent": jnp.sum(labeled_weights(batch)), "tags": jnp.sum(batch["tag_weights"])}

    return Objective(weights, lambda progress: {"intent": 1.0, "tags": tag_weight}, loss)


def icner_logits(
    model: Functional, params: Params, frozen: Frozen, batch: Batch, key: Key = None
) -> tuple[Array, Array]:
    """Intent logits [R, S, I] and tag logits [R, L, T], classes that only pad the label map made impossible."""
    intent_logits, tag_logits = model.intent_and_tag_logits(params, batch, key)
    return intent_logits + frozen["utterance_classes"][None, None, :], tag_logits + frozen["tag_classes"][None, None, :]
