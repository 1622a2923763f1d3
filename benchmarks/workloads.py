"""What all variants of a section are given, on disk: fixed batches with fixed masks, and the same weights."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.data import Masking, Transfer
from kd_jax.config.settings import read
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

Batches = Sequence[Mapping[str, np.ndarray]]


def encoder_of(config: ConfigDict, which: str, vocab_size: int) -> EncoderConfig:
    """config.<which> without dropout, in ModernBERT's shape, which PyTorch builds too."""
    values = encoder_config(config[which].to_dict(), vocab_size)
    known = values.head_style == "modernbert"
    require(known, f"{which}.head_style", f"{values.head_style!r} is not compared", "take one of our small presets")
    dropout = values.dropout or values.attention_dropout
    require(
        not dropout, f"{which}.dropout", "losses can only agree without it", "set dropout and attention_dropout to 0"
    )
    return values


def masked_batches(config: ConfigDict, prepared: Prepared, task_share: float) -> Batches:
    """The first config.benchmark.batches batches of the transfer set with that share of task text, packed."""
    stores = prepared.stores("train")
    transfer = dataclasses.replace(read(Transfer, config.transfer, "transfer"), task_share=task_share)
    weights = {name: source.weight for name, source in config.sources.items()}
    masking = read(Masking, config.masking, "masking")
    transfer_set = TransferSet(stores, transfer=transfer, seed=config.seed, weights=weights)
    batches = MaskedBatches(stores, transfer_set, masking, prepared.tokenizer, config.distill.batch_size)
    return [arrays(batches.batch(step)) for step in range(config.benchmark.batches)]


def labeled_batches(config: ConfigDict, prepared: Prepared) -> tuple[Batches, Batches, dict[str, int]]:
    """Packed batches for ICNER: train utterances for finetuning, dev utterances for prediction; sizes of the heads."""
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
    """Saves NAME-cached.npz, the batches with the teacher's features as a cache of format "hidden" in float32 has them,
    and weights/decoder.npz, which turns them into logits. The teacher's weights are those of `write_weights`.
    """
    params = read_tree(folder / "weights" / "teacher.npz")
    predict = jax.jit(make_prediction_step(teacher, TeacherForm(), {"format": "hidden", "dtype": "float32"}))
    cached = []
    for batch in batches:
        fields, _ = predict(params, {}, batch)
        cached.append({**batch, **{f"teacher_{field}": np.asarray(values) for field, values in fields.items()}})
    write_batches(folder / f"{name}-cached.npz", cached)
    table, bias = teacher.decoder(params)
    decoder = {"table": table} if bias is None else {"table": table, "bias": bias}
    write_arrays(folder / "weights" / "decoder.npz", decoder)


def write_weights(folder: pathlib.Path, models: Mapping[str, Functional], seed: int) -> None:
    """Draws each model's parameters and saves them as NAME.npz for jax, and masked LMs also as NAME-torch.npz with the
    names of `transformers`.
    """
    for number, (name, model) in enumerate(models.items()):
        params = jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.fold_in(jax.random.key(seed), number)))
        leaves = jax.tree_util.tree_leaves_with_path(params)
        by_path = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
        write_arrays(folder / f"{name}.npz", by_path)
        if model.kind == "mlm":
            write_arrays(folder / f"{name}-torch.npz", to_huggingface(params, model.config))


def write_arrays(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Saves arrays by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **dict(arrays))


def read_arrays(path: str | pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of one file by name."""
    with np.load(path, allow_pickle=False) as file:
        return {name: np.ascontiguousarray(file[name]) for name in file.files}


def write_batches(path: pathlib.Path, batches: Batches) -> None:
    """Saves batches in order."""
    write_arrays(path, {f"{index}/{name}": values for index, one in enumerate(batches) for name, values in one.items()})


def read_batches(path: str | pathlib.Path) -> list[dict[str, np.ndarray]]:
    """The batches that `write_batches` saved, in order."""
    tree = read_tree(path)
    return [tree[str(index)] for index in range(len(tree))]


def read_tree(path: str | pathlib.Path) -> dict[str, Any]:
    """Arrays by path, e.g. the parameters of `write_weights`, as nested dicts."""
    tree: dict[str, Any] = {}
    for name, values in read_arrays(path).items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = values
    return tree
