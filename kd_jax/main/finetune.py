"""What the two finetuning commands share: labelled utterances in, a classifier and its dev score out."""

import dataclasses
import functools
import math
import pathlib

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.data.labelled import FinetuneBatches, LabelledSet
from kd_jax.data.prepared import Prepared
from kd_jax.data.utterances import LabelMaps, Utterance
from kd_jax.evaluation.predictions import predict_records
from kd_jax.evaluation.results import headline
from kd_jax.main import masked_lm, trained, training
from kd_jax.models.functional import Functional
from kd_jax.steps.finetune import ABSENT, make_dc_objective, make_icner_objective
from kd_jax.trainer.mesh import global_batch, make_mesh
from kd_jax.trainer.run_directory import mark_done, write_json
from kd_jax.types import UserError

LABELS = "labels.json"
DEV = "dev.json"


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what a finetuning command computes."""
    encoder = () if config.finetune.init_from else ("student",)
    return ("prepared", "seed", "finetune", "compute_dtype", *encoder)


def domain_folders(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """One folder for each domain's model of a finetune.domain='each' run; empty for a run with a single model."""
    folder = workdir / "domains"
    return {entry.name: entry for entry in sorted(folder.iterdir())} if folder.is_dir() else {}


def run(config: ConfigDict, workdir: pathlib.Path, task: str) -> None:
    """Finetunes for `task` ("dc" or "icner"): one model, or with finetune.domain="each" one for each domain."""
    prepared = Prepared(config.prepared)
    block = config.finetune
    check(config, task)
    train = [utterance for utterance in prepared.utterances if utterance.partition == "train"]
    domains = sorted({utterance.domain for utterance in train})
    if task == "icner" and block.domain:
        known = block.domain == "each" or block.domain in domains
        require(known, "finetune.domain", f"{block.domain!r} is no domain", f"use each or one of {', '.join(domains)}")
    if task == "icner" and block.domain == "each":
        # Class counts are padded to the largest domain's, so that all domains share one compiled step.
        maps = [LabelMaps.for_domain(train, domain) for domain in domains]
        sizes = {"intents": max(len(one.intents) for one in maps), "tags": max(len(one.tags) for one in maps)}
        scores = {}
        for domain in domains:
            one = config.copy_and_resolve_references()
            one.finetune.domain = domain
            folder = workdir / "domains" / domain
            finetune_one(one, folder, task, prepared, sizes)
            scores[domain] = trained.read_json(folder / DEV)
        total = sum(score["count"] for score in scores.values())
        mean = sum(score["score"] * score["count"] for score in scores.values()) / total
        write_json(workdir / DEV, {"score": mean, "count": total})
        mark_done(workdir)
        return
    finetune_one(config, workdir, task, prepared, {})


def check(config: ConfigDict, task: str) -> None:
    """Refuses impossible finetuning settings before anything is read."""
    block = config.finetune
    smoothing = block.label_smoothing
    require(0 <= smoothing < 1, "finetune.label_smoothing", f"{smoothing} is outside [0, 1)", "0.1 is usual")
    padded = task == "icner" and block.domain == "each"
    require(
        not (padded and smoothing),
        "finetune.label_smoothing",
        "it cannot be used with config.finetune.domain='each', whose label maps are padded",
        "set it to 0",
    )
    require(0 <= block.dropout < 1, "finetune.dropout", f"{block.dropout} is outside [0, 1)", "0.1 is usual")
    require(block.epochs >= 0, "finetune.epochs", f"{block.epochs} is negative", "0 uses config.finetune.steps")


def classifier(encoder: ConfigDict, prepared: Prepared, config: ConfigDict, task: str, sizes: dict) -> Functional:
    """The finetuned model's shape: the encoder with dropout as config.finetune says, and the task's head."""
    length = prepared.config["rows"]["length"]
    masked = masked_lm.encoder_model(encoder, prepared, config.compute_dtype, length, "student")
    rate = config.finetune.dropout
    encoder_config = dataclasses.replace(masked.config, dropout=rate, attention_dropout=0.0)
    return Functional(task, encoder_config, compute_dtype=masked.compute_dtype, **sizes)


def finetune_one(config: ConfigDict, workdir: pathlib.Path, task: str, prepared: Prepared, sizes: dict) -> None:
    """Trains one classifier and writes labels.json and dev.json beside its checkpoints."""
    mesh = make_mesh(config.mesh)
    block = config.finetune
    chosen = [one for one in prepared.utterances if not block.domain or task == "dc" or one.domain == block.domain]
    train = [utterance for utterance in chosen if utterance.partition == "train"]
    dev = [utterance for utterance in chosen if utterance.partition == "dev"]
    if not train:
        raise UserError("config.nlu: there is no utterance to train on; give a data set with a train partition")
    maps = LabelMaps.from_train(train)
    counts = {"domains": len(maps.domains)} if task == "dc" else {"intents": len(maps.intents), "tags": len(maps.tags)}
    padded = sizes or counts
    encoder = trained.encoder_block(block.init_from, "finetune.init_from") if block.init_from else config.student
    if block.init_from:
        trained.check_tokenizer(block.init_from, prepared, "finetune.init_from")
    model = classifier(encoder, prepared, config, task, padded)
    length = prepared.config["rows"]["length"]
    labelled = LabelledSet(train, prepared.tokenizer, maps, task, length)
    batches = FinetuneBatches(
        labelled, block.batch_size, length, config.seed, row_multiple=math.lcm(8, mesh.size * block.accumulation)
    )
    if block.epochs:
        config = config.copy_and_resolve_references()
        config.finetune.steps = math.ceil(block.epochs * len(train) / block.batch_size)

    def init(params):
        if not block.init_from:
            return params
        masked = masked_lm.encoder_model(encoder, prepared, config.compute_dtype, length, "student")
        return {**params, **trained.trained_params(block.init_from, masked, mesh, subtree="encoder")}

    frozen = class_masks(task, counts, padded)

    def evaluate(params, step):
        del step
        records = predict_records(
            model,
            params,
            frozen,
            dev,
            prepared.tokenizer,
            maps,
            task,
            length,
            place=functools.partial(global_batch, mesh),
        )
        scores = headline(records, task)
        write_json(workdir / DEV, {**scores, "count": len(dev)})
        return {f"dev/{name}": value for name, value in scores.items()}

    smoothing = float(block.label_smoothing)
    job = training.Job(
        command=f"finetune_{task}",
        block="finetune",
        keys=keys(config),
        model=model,
        objective=make_dc_objective if task == "dc" else make_icner_objective,
        arguments=(model, smoothing) if task == "dc" else (model, smoothing, float(block.tag_weight)),
        frozen=frozen,
        batch_at=lambda step: batches.batch(step, jax.process_index(), jax.process_count()),
        data_fingerprint=batches.fingerprint,
        evaluate=evaluate,
        init=init,
        notes={"train_utterances": len(train), "label_counts": counts, "padded_counts": padded},
    )
    training.train(config, workdir, job, prepared, mesh, before=lambda: write_json(workdir / LABELS, maps.to_json()))


def class_masks(task: str, counts: dict[str, int], padded: dict[str, int]) -> dict[str, np.ndarray]:
    """What is added to the logits: 0 for a real class, a large negative number for one that only pads the label map."""

    def mask(name):
        return np.where(np.arange(padded[name]) < counts[name], 0.0, ABSENT).astype(np.float32)

    if task == "dc":
        return {"utterance_classes": mask("domains")}
    return {"utterance_classes": mask("intents"), "tag_classes": mask("tags")}
