"""What pretrain and distill share: masked-LM rows in, a trained encoder and its held-out losses out."""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from kd_jax.config import require
from kd_jax.config.data import Masking, Transfer
from kd_jax.config.training import Training
from kd_jax.data.batches import heldout_batches, process_slice
from kd_jax.data.prepared import Prepared
from kd_jax.data.transfer_set import TransferSet
from kd_jax.models.attention_kernels import PLAIN, Kernel
from kd_jax.models.encoder_config import encoder_config
from kd_jax.models.functional import Functional
from kd_jax.models.projection import WithProjections
from kd_jax.runtime.files import write_json
from kd_jax.runtime.preemption import interruptible
from kd_jax.steps.pretrain import make_heldout_step
from kd_jax.trainer.mesh import global_batch, process_share
from kd_jax.types import Params

HELDOUT = "heldout.json"


def encoder_model(
    encoder: Mapping[str, Any], prepared: Prepared, compute_dtype: str, key: str, attention: Kernel = PLAIN
) -> Functional:
    """The masked LM of one encoder block of the config (config.<key>), with the tokenizer's vocabulary filled in.

    attention: not plain only for steps that set their mesh.
    """
    values = encoder_config(dict(encoder), prepared.tokenizer.vocab_size, f"config.{key}")
    length = prepared.settings.rows.length
    require(
        length <= values.max_positions,
        "rows.length",
        f"rows of {length} tokens do not fit config.{key}.max_positions = {values.max_positions}",
        "shorten the rows and prepare again, or choose a model with more positions",
    )
    return Functional("mlm", values, compute_dtype=resolve_dtype(compute_dtype), attention=attention)


def resolve_dtype(name: str) -> Any:
    """float32 on CPU and bfloat16 elsewhere for "auto"; bfloat16 is slower on CPU."""
    known = name in ("auto", "float32", "bfloat16")
    require(known, "compute_dtype", f"{name!r} is unknown", "use auto, float32 or bfloat16")
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def transfer_set_of(transfer: Transfer, prepared: Prepared, seed: int) -> TransferSet:
    """The transfer set of the prepared train rows, in the order of a seed."""
    weights = {name: source.weight for name, source in prepared.settings.sources.items()}
    return TransferSet(prepared.stores("train"), transfer=transfer, seed=seed, weights=weights)


def heldout_evaluation(
    model: Functional | WithProjections,
    prepared: Prepared,
    masking: Masking,
    mesh: jax.sharding.Mesh,
    settings: Training,
    folder: pathlib.Path,
    *,
    measures: bool = True,
) -> Callable[[Params, int], dict[str, float]]:
    """The evaluation of a masked-LM job: held-out losses as metrics, and by store in heldout.json.

    measures: False if the masked-LM head is not trained; the file then records no loss.
    """
    encoder = model.student if isinstance(model, WithProjections) else model

    def evaluate(params: Params, step: int) -> dict[str, float]:
        del step
        own = model.student_params(params) if isinstance(model, WithProjections) else params
        most = settings.evaluate_rows if measures else 0
        rows = heldout_rows(encoder, own, prepared, masking, mesh, settings.batch_size, most) if most else []
        if jax.process_index() == 0:
            write_json(folder / HELDOUT, rows)
        return summarize(rows)

    return evaluate


@functools.cache
def compiled_heldout_step(model: Functional):
    """The jitted held-out step of a model, the same function for all runs of a study."""
    return jax.jit(make_heldout_step(model))


def heldout_rows(
    model: Functional, params: Params, prepared: Prepared, masking: Masking, mesh, batch_size: int, most_rows: int
) -> list[dict[str, Any]]:
    """One entry per held-out store: loss and unigram loss (nats per masked token), accuracy, number of masked tokens.

    Raises Preempted.
    """
    step = compiled_heldout_step(model)
    unigrams = unigram_log_probabilities(prepared)
    first, last = process_slice(batch_size, *process_share(mesh))
    entries = []
    for store in prepared.stores("heldout"):
        sums = np.zeros(4)
        batches = heldout_batches(store, masking, prepared.tokenizer, batch_size, most_rows)
        for batch in interruptible(batches, "the held-out loss"):
            whole = {**batch, "unigram": unigrams[store.kind][batch["masked_targets"]]}
            mine = {name: values[first:last] for name, values in whole.items()}
            terms = jax.device_get(step(params, global_batch(mesh, mine)))
            sums += [terms["loss"][0], terms["accuracy"][0], terms["unigram_loss"][0], terms["loss"][1]]
        loss, hits, unigram, count = (float(value) for value in sums)
        if count:
            entries.append(
                {
                    "store": store.name,
                    "kind": store.kind,
                    "language": store.language,
                    "loss": loss / count,
                    "accuracy": hits / count,
                    "unigram_loss": unigram / count,
                    "count": int(count),
                }
            )
    return entries


def unigram_log_probabilities(prepared: Prepared) -> dict[str, np.ndarray]:
    """log p of each token by its count (plus one) in the train text of each kind, float32 [vocabulary]."""
    vocabulary = prepared.tokenizer.vocab_size
    counts = {"generic": np.ones(vocabulary), "task": np.ones(vocabulary)}
    for store in prepared.stores("train"):
        if store.kind in counts:  # selected text is a part of the generic text
            counts[store.kind] += store.token_counts(vocabulary)
    for values in counts.values():
        values[list(prepared.tokenizer.special_ids)] = 1e-9  # special tokens are never masked
    return {kind: np.log(values / values.sum()).astype(np.float32) for kind, values in counts.items()}


def summarize(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Held-out loss and accuracy by kind of text over all masked tokens, under the names that metrics.jsonl uses."""
    summary = {}
    for kind in sorted({entry["kind"] for entry in entries}):
        of_kind = [entry for entry in entries if entry["kind"] == kind]
        count = sum(entry["count"] for entry in of_kind)
        for name in ("loss", "accuracy"):
            summary[f"heldout_{kind}/{name}"] = sum(entry[name] * entry["count"] for entry in of_kind) / count
    return summary
