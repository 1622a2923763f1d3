"""What all variants of a section are handed: prepared texts, fixed batches of them with fixed masks, and weights."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks.handover import read_tree, write_arrays, write_batches
from kd_jax.config import require
from kd_jax.data.batches import MaskedBatches
from kd_jax.data.labeled import FinetuneBatches, LabeledSet, packed
from kd_jax.data.prepared import Prepared
from kd_jax.data.text.utterances import LabelMaps
from kd_jax.data.transfer_set import TransferSet
from kd_jax.models.encoder_config import EncoderConfig, encoder_config
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.checkpoint import to_huggingface
from kd_jax.steps.teacher_logits import TeacherForm
from kd_jax.steps.teacher_predictions import make_prediction_step
from kd_jax.types import Params

Batches = Sequence[Mapping[str, np.ndarray]]


def encoder_of(config: ConfigDict, which: str, vocab_size: int) -> EncoderConfig:
    """config.<which> without dropout; only ModernBERT's shape is compared, since PyTorch builds that one."""
    values = encoder_config(config[which].to_dict(), vocab_size)
    known = values.head_style == "modernbert"
    require(known, f"{which}.head_style", f"{values.head_style!r} is not compared", "take one of our small presets")
    still = values.dropout == 0 and values.attention_dropout == 0
    require(
        still, f"{which}.dropout", "it is not 0, so losses could not agree", "set dropout and attention_dropout to 0"
    )
    return values


def masked_batches(config: ConfigDict, prepared: Prepared, task_share: float) -> Batches:
    """The first config.benchmark.batches batches of the transfer set with that share of task text, packed."""
    stores = prepared.stores("train")
    transfer = config.transfer.copy_and_resolve_references()
    transfer.task_share = task_share
    weights = {name: source.weight for name, source in config.sources.items()}
    transfer_set = TransferSet(stores, transfer=transfer, seed=config.seed, weights=weights)
    batches = MaskedBatches(stores, transfer_set, config.masking, prepared.tokenizer, config.distill.batch_size)
    return [arrays(batches.batch(step)) for step in range(config.benchmark.batches)]


def labeled_batches(config: ConfigDict, prepared: Prepared) -> tuple[Batches, Batches, dict[str, int]]:
    """Packed batches for ICNER: (for finetuning, for prediction, sizes of the heads), train and dev utterances."""
    train = [one for one in prepared.utterances if one.partition == "train"]
    dev = [one for one in prepared.utterances if one.partition == "dev"]
    maps, length = LabelMaps.from_train(train), config.rows.length
    training = LabeledSet(train, prepared.tokenizer, maps, "icner", length)
    batches = FinetuneBatches(training, config.finetune.batch_size, length, config.seed, row_multiple=1)
    finetune = [arrays(batches.batch(step)) for step in range(config.benchmark.batches)]
    predicted = LabeledSet(dev, prepared.tokenizer, maps, "icner", length)
    all_dev = packed(predicted, length, config.evaluate.batch_rows)
    predict = [arrays(batch) for batch, _ in all_dev][: config.benchmark.batches]
    return finetune, predict, {"intents": len(maps.intents), "tags": len(maps.tags)}


def arrays(batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The batch as NumPy arrays."""
    return {name: np.asarray(values) for name, values in batch.items()}


def write_predictions(folder: pathlib.Path, name: str, teacher: Functional, batches: Batches) -> None:
    """Saves NAME-cached.npz: the batches with the teacher's features as a cache of format "hidden" in float32 brings
    them; and weights/decoder.npz, which turns them into logits. The teacher's weights are those of `write_weights`.
    """
    params = read_tree(folder / "weights" / "teacher.npz")
    settings = {"format": "hidden", "dtype": "float32"}
    predict = jax.jit(make_prediction_step(teacher, TeacherForm(), settings))
    cached = []
    for batch in batches:
        fields, _ = predict(params, {}, batch)
        cached.append({**batch, **{f"teacher_{field}": np.asarray(values) for field, values in fields.items()}})
    write_batches(folder / f"{name}-cached.npz", cached)
    table, bias = teacher.decoder(params)
    write_arrays(
        folder / "weights" / "decoder.npz", {"table": table} if bias is None else {"table": table, "bias": bias}
    )


def write_weights(folder: pathlib.Path, models: Mapping[str, Functional], seed: int) -> None:
    """Draws each model's parameters and saves them twice: NAME.npz for jax, NAME-torch.npz in the names of
    `transformers` for masked LMs.
    """
    for number, (name, model) in enumerate(models.items()):
        params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.fold_in(jax.random.key(seed), number)))
        write_arrays(folder / f"{name}.npz", flatten(params))
        if model.kind == "mlm":
            write_arrays(folder / f"{name}-torch.npz", to_huggingface(params, model.config))


def flatten(params: Params) -> dict[str, np.ndarray]:
    """Parameters by path, parts joined with "/"."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}
