"""Finetuning (ICNER) and prediction with this project's models: packed rows against one utterance a row."""

import abc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.handover import read_batches, read_tree
from benchmarks.jax_variants import MULTIPLE, JaxSteps, Spec
from benchmarks.layouts import labeled_text_a_row, same_shape
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional, flops_per_row
from kd_jax.steps.finetune import make_icner_objective

LAYOUTS = ("packed", "padded", "longest")
Batches = list[dict[str, np.ndarray]]


def layout(batches: Batches, name: str, pad_id: int) -> Batches:
    """The packed batches in a layout: "packed" as they are; one utterance a row, "padded" to the row length, or to the
    "longest" of its batch (rounded up, as are the rows, so that there are few shapes).
    """
    if name == "packed":
        return batches
    length = batches[0]["tokens"].shape[1]
    rows = [labeled_text_a_row(batch, pad_id) for batch in batches]
    if name == "padded":
        return same_shape(rows, MULTIPLE, pad_id, length)
    return [same_shape([batch], MULTIPLE, pad_id)[0] for batch in rows]


class _Labeled(abc.ABC):
    """What finetuning and prediction share."""

    training: bool

    def __init__(self, spec: Spec, layout: str):
        self.spec, self.layout = spec, layout
        sizes = {name: spec["sizes"][name] for name in ("intents", "tags")}
        self.model = Functional("icner", EncoderConfig(**spec["models"]["student"]), compute_dtype="float32", **sizes)

    def prepare(self) -> dict[str, Any]:
        """Reads batches and weights, and makes the step."""
        batches = layout(read_batches(self.spec["batches"]), self.layout, self.spec["pad_id"])
        self.start(read_tree(f"{self.spec['weights']}/icner.npz"), batches)
        shapes = [batch["tokens"].shape for batch in batches]
        # The heads of a few classes are left out of the count.
        flops = [rows * flops_per_row(self.model.config, length, 0, 0, self.training) for rows, length in shapes]
        return {
            "framework": f"jax {jax.__version__}",
            "rows": int(np.mean([rows for rows, _ in shapes])),
            "length": int(np.mean([length for _, length in shapes])),
            "flops": float(sum(flops)),
        }

    @abc.abstractmethod
    def start(self, params, batches: Batches) -> None:
        """Makes `run` possible."""


class Finetune(_Labeled):
    """Training steps; the losses are handed back."""

    training = True

    def start(self, params, batches: Batches) -> None:
        """See _Labeled."""
        objective = make_icner_objective(self.model, 0.0, 1.0)
        classes = {"utterance_classes": self.model.intents, "tag_classes": self.model.tags}
        frozen = {name: np.zeros(size, np.float32) for name, size in classes.items()}
        self._steps = JaxSteps(objective, self.spec["job"], params, frozen, batches, ("intent", "tags"))

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """See worker.Variant."""
        return self._steps.run(first, steps)


class Predict(_Labeled):
    """The best intent of each utterance and the tag scores of each piece, fetched as `predict` fetches them."""

    training = False

    def start(self, params, batches: Batches) -> None:
        """See _Labeled."""

        def predict(params, batch):
            intents_RxSxI, tags_RxLxT = self.model.intent_and_tag_logits(params, batch)
            return jnp.argmax(intents_RxSxI, axis=-1), tags_RxLxT, jnp.max(intents_RxSxI, axis=-1)

        self._predict = jax.jit(predict)
        self._params, self._batches = jax.tree.map(jnp.asarray, params), batches

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """See worker.Variant; the values are means over utterances and over first pieces of words."""
        values = []
        for step in range(first, first + steps):
            batch = self._batches[step % len(self._batches)]
            _, tags_RxLxT, best_RxS = jax.device_get(self._predict(self._params, batch))
            values.append(
                {
                    "intent": weighted_mean(best_RxS, batch["utterance_weights"]),
                    "tags": weighted_mean(tags_RxLxT.max(axis=-1), batch["tag_weights"]),
                }
            )
        return values


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """The mean of the values whose weight is 1."""
    return float((values * weights).sum() / weights.sum())


def _builder(kind: type[_Labeled], name: str):
    return lambda spec: kind(spec, name)


finetune_packed, finetune_padded, finetune_longest = (_builder(Finetune, name) for name in LAYOUTS)
predict_packed, predict_padded, predict_longest = (_builder(Predict, name) for name in LAYOUTS)
