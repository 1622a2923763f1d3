"""What the two finetuning commands share: labeled utterances in, a classifier and its dev score out."""

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import EXECUTION_KEYS, require, to_dict
from kd_jax.data.labeled import FinetuneBatches, LabeledSet
from kd_jax.data.prepared import Prepared
from kd_jax.data.text.utterances import LabelMaps, Utterance, subset_train
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.evaluation.predictions import Spread, predict_records
from kd_jax.evaluation.records import Record, assign_test_sets, intent_slot_record
from kd_jax.evaluation.results import results
from kd_jax.jobs import job as training
from kd_jax.jobs import masked_lm, serving, trained
from kd_jax.jobs.frozen import Frozen
from kd_jax.models.functional import Functional
from kd_jax.runtime import distributed
from kd_jax.runtime.files import read_json, write_json
from kd_jax.runtime.progress import Count
from kd_jax.steps.finetune import ABSENT, make_dc_objective, make_icner_objective
from kd_jax.trainer.mesh import global_batch, local_rows, make_mesh, process_share, row_multiple, rules_of
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.types import Array, Batch, Params, UserError

DEV = "dev.json"


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what a finetuning command computes."""
    # A student that was trained before brings its shape and its vocabulary along.
    encoder = () if config.finetune.init_from else ("student", "vocabulary")
    return ("prepared", "seed", "finetune", "compute_dtype", *encoder)


def domain_folders(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """One folder for each domain's model of a finetune.domain='each' run; empty for a run with a single model."""
    folder = workdir / "domains"
    return {entry.name: entry for entry in sorted(folder.iterdir())} if folder.is_dir() else {}


def run(config: ConfigDict, workdir: pathlib.Path, task: str) -> None:
    """Finetunes for `task` ("dc" or "icner"): one model, or with finetune.domain="each" one for each domain."""
    check(config)
    block = config.finetune
    prepared = prepared_for(config, Prepared(config.prepared))
    train = labeled_train(prepared, block.max_train, "")
    domains = sorted({utterance.domain for utterance in train})
    if task == "icner" and block.domain:
        known = block.domain == "each" or block.domain in domains
        require(known, "finetune.domain", f"{block.domain!r} is no domain", f"use each or one of {', '.join(domains)}")
    if task == "icner" and block.domain == "each":
        values = to_dict(config)
        names = (*keys(config), *EXECUTION_KEYS)
        directory = RunDirectory(workdir, f"finetune_{task}", {name: values[name] for name in names})
        if directory.done:
            return
        directory.start(tokenizer_fingerprint=prepared.tokenizer.fingerprint, domains=domains)
        # Class counts are padded to the largest domain's, so that all domains share one compiled step.
        maps = [LabelMaps.for_domain(train, domain) for domain in domains]
        sizes = {"intents": max(len(one.intents) for one in maps), "tags": max(len(one.tags) for one in maps)}
        scores = {}
        for domain in domains:
            one = config.copy_and_resolve_references()
            one.finetune.domain = domain
            folder = workdir / "domains" / domain
            finetune_one(one, folder, task, prepared, sizes)
            scores[domain] = read_json(folder / DEV)
        total = max(sum(score["count"] for score in scores.values()), 1)
        mean = sum(score["score"] * score["count"] for score in scores.values()) / total
        if jax.process_index() == 0:
            write_json(workdir / DEV, {"score": mean, "count": total})
        directory.finish()
        return
    finetune_one(config, workdir, task, prepared, {})


def prepared_for(config: ConfigDict, prepared: Prepared) -> Prepared:
    """The prepared folder with the vocabulary of the model that is finetuned; config is a finetuning run's."""
    start = config.finetune.init_from
    if start:
        return trained.run_prepared(start, prepared, "finetune.init_from")
    return seen_by_student(prepared, config.vocabulary)


def check(config: ConfigDict) -> None:
    """Refuses impossible finetuning settings before anything is read."""
    block = config.finetune
    smoothing = block.label_smoothing
    require(0 <= smoothing < 1, "finetune.label_smoothing", f"{smoothing} is outside [0, 1)", "0.1 is usual")
    require(0 <= block.dropout < 1, "finetune.dropout", f"{block.dropout} is outside [0, 1)", "0.1 is usual")
    require(block.max_train >= 0, "finetune.max_train", f"{block.max_train} is negative", "0 takes all")
    require(block.epochs >= 0, "finetune.epochs", f"{block.epochs} is negative", "0 uses config.finetune.steps")


def of_domain(utterances: Sequence[Utterance], partition: str, domain: str) -> list[Utterance]:
    """The utterances of a partition, of one domain or ("") of all."""
    return [one for one in utterances if one.partition == partition and domain in ("", one.domain)]


def labeled_train(prepared: Prepared, max_train: int, domain: str) -> list[Utterance]:
    """The train utterances whose labels finetuning may see."""
    utterances = subset_train(prepared.utterances, max_train) if max_train else prepared.utterances
    return of_domain(utterances, "train", domain)


def classifier(encoder: ConfigDict, prepared: Prepared, config: ConfigDict, task: Any, sizes: dict) -> Functional:
    """The finetuned model's shape: the encoder with dropout as config.finetune says, and the task's head."""
    masked = masked_lm.encoder_model(encoder, prepared, config.compute_dtype, "student")
    shape = dataclasses.replace(masked.config, dropout=float(config.finetune.dropout))
    return Functional(task, shape, compute_dtype=masked.compute_dtype, **sizes)


def finetune_one(config: ConfigDict, workdir: pathlib.Path, task: str, prepared: Prepared, sizes: dict) -> None:
    """Trains one classifier and writes labels.json and dev.json beside its checkpoints."""
    block = config.finetune
    domain = block.domain if task == "icner" else ""
    train = labeled_train(prepared, block.max_train, domain)
    dev = of_domain(prepared.utterances, "dev", domain)
    if not train:
        raise UserError("config.nlu: there is no utterance to train on; give a data set with a train partition")
    if block.epochs:
        config = config.copy_and_resolve_references()
        config.finetune.steps = math.ceil(block.epochs * len(train) / block.batch_size)
        config.finetune.warmup_steps = min(block.warmup_steps, config.finetune.steps)
        if config.finetune.steps < block.warmup_steps and jax.process_index() == 0:
            print(
                f"note: {block.epochs} epochs of {len(train)} utterances are {config.finetune.steps} steps, fewer than "
                f"config.finetune.warmup_steps={block.warmup_steps}: the learning rate barely arrives at its peak; "
                "raise the epochs",
                file=sys.stderr,
            )
    if block.init_from:
        trained.check_tokenizer(block.init_from, prepared, "finetune.init_from")
    encoder = trained.encoder_block(block.init_from, "finetune.init_from") if block.init_from else config.student
    maps = LabelMaps.from_train(train)
    padded = {**class_counts(task, maps), **sizes}
    model = classifier(encoder, prepared, config, task, padded)
    masks = class_masks(class_counts(task, maps), padded)
    mesh = make_mesh(config.mesh)
    length = prepared.config["rows"]["length"]
    rows = math.lcm(row_multiple(mesh) * block.accumulation, 4)
    labeled = LabeledSet(train, prepared.tokenizer, maps, task, length)
    batches = FinetuneBatches(labeled, block.batch_size, length, config.seed, rows)

    rules = rules_of(config.sharding.student, "sharding.student")

    def init(params: Params) -> Params:
        masked = masked_lm.encoder_model(encoder, prepared, config.compute_dtype, "student")
        return {**params, **trained.trained_params(block.init_from, masked, mesh, "encoder", rules)}

    def evaluate(params: Params, step: int) -> dict[str, float]:
        del step
        records = predict(model, params, masks, dev, train, prepared, maps, mesh)
        scores = dev_scores(records, task)
        if jax.process_index() == 0:
            write_json(workdir / DEV, {**scores, "count": len(dev)})
        return {f"dev/{name}": value for name, value in scores.items()}

    smoothing = float(block.label_smoothing)
    objective = make_dc_objective if task == "dc" else make_icner_objective
    arguments = (model, smoothing) if task == "dc" else (model, smoothing, float(block.tag_weight))
    job = training.Job(
        command=f"finetune_{task}",
        block="finetune",
        keys=keys(config),
        model=model,
        phases=(training.JobPhase(0, objective, arguments, lambda: dict(masks), Frozen(whole=tuple(masks))),),
        batch_at=lambda step: batches.batch(step, *process_share(mesh)),
        data_fingerprint=batches.fingerprint,
        evaluate=evaluate,
        init=init if block.init_from else None,
        notes={"train_utterances": len(train), "classes": padded, "labels": maps.to_json()},
    )
    training.train(config, workdir, job, prepared, mesh)


def class_counts(task: str, maps: LabelMaps) -> dict[str, int]:
    """The sizes of a finetuned model's heads, under the names that Functional takes."""
    return {"domains": len(maps.domains)} if task == "dc" else {"intents": len(maps.intents), "tags": len(maps.tags)}


def class_masks(counts: dict[str, int], padded: dict[str, int]) -> dict[str, np.ndarray]:
    """What is added to the logits: 0 for a real class, -inf for one that only pads the label map."""
    masks = {}
    for name, size in padded.items():
        mask = np.where(np.arange(size) < counts[name], 0.0, ABSENT).astype(np.float32)
        masks["tag_classes" if name == "tags" else "utterance_classes"] = mask
    return masks


def predict(
    model: Functional,
    params: Params,
    masks: dict[str, np.ndarray],
    utterances: Sequence[Utterance],
    train: Sequence[Utterance],
    prepared: Prepared | serving.Reader,
    maps: LabelMaps,
    mesh,
    batch_rows: int = 32,
    count: Count | None = None,
    probabilities: bool = False,
) -> list[Record]:
    """Records of the utterances, in their order; count: takes them in as they come. Raises Preempted."""
    count = count or Count("prediction", "utterances", shown=False)

    def put(batch: Batch) -> Mapping[str, Array]:
        count.update(int(batch["utterance_weights"].sum()))
        return global_batch(mesh, batch)

    return predict_records(
        model,
        params,
        masks,
        utterances,
        train,
        prepared.tokenizer,
        maps,
        length=prepared.config["rows"]["length"],
        batch_rows=math.lcm(batch_rows, row_multiple(mesh)),
        spread=Spread(
            put,
            functools.partial(local_rows, mesh),
            process_share(mesh),
            distributed.from_all,
        ),
        probabilities=probabilities,
    )


def dev_scores(records: Sequence[Record], task: str) -> dict[str, float]:
    """The dev metrics and, for choosing recipes, "score": DC accuracy, or intent accuracy and slot F1 averaged."""
    who = {"student": "", "transfer_set": "", "teacher": "", "seed": 0}
    rows = [row for row in results(records, identity=who) if row["scope"] == "all"]
    scores = {row["metric"]: row["value"] for row in rows if row["value"] is not None}
    parts = ("accuracy",) if task == "dc" else ("intent_accuracy", "slot_f1")
    return {"score": float(np.mean([scores.get(name, 0.0) for name in parts])), **scores}


def predict_partition(
    checkpoint: pathlib.Path, prepared: Prepared, mesh, partition: str, compute_dtype: str, progress: bool = False
) -> list[Record]:
    """Records of a partition by a finetuned model, or by that of each gold domain where there are several."""
    total = len(of_domain(prepared.utterances, partition, ""))
    with Count(f"evaluate {partition}", "utterances", total, shown=progress) as count:
        return _predict_partition(checkpoint, prepared, mesh, partition, compute_dtype, count)


def _predict_partition(
    checkpoint: pathlib.Path, prepared: Prepared, mesh, partition: str, compute_dtype: str, count: Count
) -> list[Record]:
    domains = domain_folders(checkpoint)
    if not domains:
        return predict_with(checkpoint, prepared, mesh, partition, "", compute_dtype, count)
    records = []
    for domain, folder in domains.items():
        records += predict_with(folder, prepared, mesh, partition, domain, compute_dtype, count)
    # A domain without a train utterance has no model: its utterances count as errors.
    orphans = [one for one in of_domain(prepared.utterances, partition, "") if one.domain not in domains]
    sets = assign_test_sets(orphans, of_domain(prepared.utterances, "train", ""))
    return records + [intent_slot_record(one, names, "", ["O"] * len(one.words)) for one, names in zip(orphans, sets)]


class Finetuned(NamedTuple):
    """A finetuned model read back from the directory of its run."""

    task: str
    model: Functional
    params: Params
    masks: dict[str, np.ndarray]
    maps: LabelMaps
    prepared: Prepared | serving.Reader  # with the model's vocabulary


def load_finetuned(folder: pathlib.Path, prepared: Prepared, mesh, compute_dtype: str, key: str) -> Finetuned:
    """The single model of a finetuning run, or of a folder that `export` wrote for serving; config.<key> names it."""
    if serving.is_served(folder):
        return served(folder, compute_dtype)
    config = trained.run_config(folder, key)
    if "finetune" not in config:
        raise UserError(f"config.{key}: {folder} is no finetuning run; give the workdir of one")
    prepared = prepared_for(config, prepared)
    trained.check_tokenizer(folder, prepared, key)
    run: dict[str, Any] = read_json(folder / "run.json")
    task = read_json(folder / "config.json")["command"].removeprefix("finetune_")
    maps = LabelMaps.from_json(run["labels"])
    start = config.finetune.init_from
    encoder = trained.encoder_block(start, "finetune.init_from") if start else config.student
    config.compute_dtype = compute_dtype
    model = classifier(encoder, prepared, config, task, run["classes"])
    params = trained.trained_params(folder, model, mesh)
    return Finetuned(task, model, params, class_masks(class_counts(task, maps), run["classes"]), maps, prepared)


def served(folder: pathlib.Path, compute_dtype: str) -> Finetuned:
    """The model of an exported folder, which reads texts with its own tokenizer."""
    one = serving.read(folder)
    model = dataclasses.replace(one.model, compute_dtype=masked_lm.resolve_dtype(compute_dtype))
    sizes = class_counts(model.kind, one.maps)
    return Finetuned(model.kind, model, one.params, class_masks(sizes, sizes), one.maps, one.reader)


def predict_with(
    folder: pathlib.Path, prepared: Prepared, mesh, partition: str, domain: str, compute_dtype: str, count: Count
) -> list[Record]:
    """Records of a partition (of one domain, or of all) by the single model in `folder`."""
    one = load_finetuned(folder, prepared, mesh, compute_dtype, "evaluate.checkpoint")
    utterances = of_domain(prepared.utterances, partition, domain)
    if not utterances:
        return []
    train = of_domain(prepared.utterances, "train", "")
    return predict(one.model, one.params, one.masks, utterances, train, one.prepared, one.maps, mesh, count=count)
