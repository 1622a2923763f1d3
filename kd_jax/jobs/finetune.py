"""What the two finetuning commands share: labeled utterances in, a classifier and its dev score out."""

import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import require, resolved
from kd_jax.config.commands import Baseline
from kd_jax.config.data import Vocabulary
from kd_jax.config.execution import Execution, read_execution
from kd_jax.config.settings import read
from kd_jax.config.training import Finetune
from kd_jax.data.labeled import FinetuneBatches, LabeledSet
from kd_jax.data.prepared import Prepared
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.text.utterances import LabelMaps, Utterance, subset, subset_train
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.evaluation.predictions import Probabilities, Spread, predict_records
from kd_jax.evaluation.records import Record, assign_test_sets, intent_slot_record, read_records
from kd_jax.evaluation.results import RECORDS, results
from kd_jax.jobs import serving, trained
from kd_jax.jobs.job import Job, Phase
from kd_jax.jobs.job import train as train_job
from kd_jax.jobs.masked_lm import encoder_model, resolve_dtype
from kd_jax.models.attention_kernels import PLAIN, Kernel, find_kernel
from kd_jax.models.encoder_config import Pooling
from kd_jax.models.functional import Functional
from kd_jax.runtime import distributed
from kd_jax.runtime.files import read_json, read_json_object, write_sealed
from kd_jax.runtime.paths import as_path, file_name, is_there, name_of_file, names_in
from kd_jax.runtime.progress import Count
from kd_jax.steps.finetune import ABSENT, make_dc_objective, make_icner_objective
from kd_jax.trainer.best import Best
from kd_jax.trainer.mesh import global_batch, local_rows, make_mesh, process_share, row_multiple
from kd_jax.trainer.run_directory import RunDirectory, run_once
from kd_jax.types import Array, Batch, Params, UserError

Task = Literal["dc", "icner"]
DEV = "dev.json"
THRESHOLD = "threshold"  # in dev.json
REFUSED = 0.05  # share of the correct answers on dev that a threshold refuses


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what a finetuning command computes."""
    # A student that was trained before brings its shape and its vocabulary along.
    encoder = () if config.finetune.init_from else ("student", "vocabulary")
    return ("prepared", "seed", "finetune", "compute_dtype", *encoder)


def domain_folders(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """One folder for each domain's model of a finetune.domain='each' run; empty for a run with a single model."""
    folder = workdir / "domains"
    return {name_of_file(name): folder / name for name in names_in(folder)}


def run(config: ConfigDict, workdir: pathlib.Path, task: Task) -> None:
    """Finetunes for `task`: one model, or with finetune.domain="each" one for each domain."""
    settings, execution = read(Finetune, config.finetune, "finetune"), read_execution(config)
    prepared = prepared_for(config, Prepared(config.prepared))
    train = labeled_train(prepared, settings.max_train, "")
    predicted = predicted_labels(prepared, settings, task, "finetune")
    domains = sorted({utterance.domain for utterance in train})
    if task == "icner" and settings.domain:
        known = settings.domain == "each" or settings.domain in domains
        remedy = f"use each or one of {', '.join(domains)}"
        require(known, "finetune.domain", f"{settings.domain!r} is not a domain", remedy)
    start = settings.init_from
    encoder = trained.encoder_block(start, "finetune.init_from") if start else config.student.to_dict()
    values = resolved(config, keys(config))
    each_domain = task == "icner" and settings.domain == "each"
    for domain in domains if each_domain else [settings.domain if task == "icner" else ""]:
        check_patience(settings, labeled_dev(prepared, settings, domain), domain)

    def one(settings: Finetune, folder: pathlib.Path, sizes: Mapping[str, int]) -> None:
        domain = settings.domain if task == "icner" else ""
        settings = with_steps(settings, len(labeled_train(prepared, settings.max_train, domain)) + len(predicted))
        own = {**values, "finetune": dataclasses.asdict(settings)}
        work = functools.partial(finetune, values=own, settings=settings, task=task, encoder=encoder, sizes=sizes)
        run_once(folder, f"finetune_{task}", own, execution, lambda it: work(it, prepared, execution))

    def each(directory: RunDirectory) -> dict[str, Any]:
        directory.start(tokenizer_fingerprint=prepared.tokenizer.fingerprint, domains=domains)
        # Class counts are padded to the largest domain's, so that all domains share one compiled step.
        maps = [LabelMaps.for_domain(train, domain) for domain in domains]
        sizes = {"intents": max(len(one.intents) for one in maps), "tags": max(len(one.tags) for one in maps)}
        scores = {}
        for domain in domains:
            folder = workdir / "domains" / file_name(domain)
            one(dataclasses.replace(settings, domain=domain), folder, sizes)
            scores[domain] = read_json(folder / DEV)
        total = max(sum(score["count"] for score in scores.values()), 1)
        mean = sum(score["score"] * score["count"] for score in scores.values()) / total
        if jax.process_index() == 0:
            write_sealed(workdir / DEV, {"score": mean, "count": total})
        return {}

    if each_domain:
        run_once(workdir, f"finetune_{task}", values, execution, each)
    else:
        one(settings, workdir, {})


def prepared_for(config: ConfigDict, prepared: Prepared) -> Prepared:
    """The prepared folder with the vocabulary of the model that is finetuned; config is a finetuning run's."""
    start = config.finetune.init_from
    if start:
        return trained.run_prepared(start, prepared, "finetune.init_from")
    return seen_by_student(prepared, read(Vocabulary, config.vocabulary, "vocabulary"))


def of_domain(utterances: Sequence[Utterance], partition: str, domain: str) -> list[Utterance]:
    """The utterances of a partition, of one domain or ("") of all."""
    return [one for one in utterances if one.partition == partition and domain in ("", one.domain)]


def labeled_train(prepared: Prepared, max_train: int, domain: str) -> list[Utterance]:
    """The train utterances whose labels finetuning may see."""
    utterances = subset_train(prepared.utterances, max_train) if max_train else prepared.utterances
    return of_domain(utterances, "train", domain)


def labeled_dev(prepared: Prepared, settings: Finetune | Baseline, domain: str = "") -> list[Utterance]:
    """The dev utterances, of one domain or of all, by which recipes are chosen and finetuning stops early."""
    most = settings.max_dev
    return of_domain(subset(prepared.utterances, "dev", most) if most else prepared.utterances, "dev", domain)


def check_patience(settings: Finetune, dev: Sequence[Utterance], domain: str) -> None:
    """Raises UserError for early stopping without a dev utterance."""
    of = f" of domain {domain}" if domain else ""
    require(
        bool(dev) or not settings.patience,
        "finetune.patience",
        f"there is no dev utterance{of} by which training could stop early",
        "give some utterances the partition dev, or set it to 0",
    )


def unlabeled_train(prepared: Prepared, max_train: int) -> list[Utterance]:
    """The train utterances whose labels finetuning must not see."""
    labeled = {(one.locale, one.id) for one in labeled_train(prepared, max_train, "")}
    return [one for one in of_domain(prepared.utterances, "train", "") if (one.locale, one.id) not in labeled]


def predicted_labels(prepared: Prepared, settings: Finetune | Baseline, task: str, block: str) -> list[Utterance]:
    """The utterances that the evaluate run config.<block>.labels labeled, with the task's labels replaced by its
    predictions; none without such a run. Raises UserError for a run that adds no labels for the task.
    """
    if not settings.labels:
        return []
    key, file = f"config.{block}.labels", as_path(settings.labels) / RECORDS
    if not is_there(file):
        raise UserError(f"{key}: {file} does not exist; give the workdir of a finished evaluate run")
    found = {(record["locale"], record["id"]): record for record in read_records(trained.whole(file))}
    known = {(one.locale, one.id) for one in labeled_train(prepared, settings.max_train, "")}
    if twice := known & found.keys():
        raise UserError(
            f"{key}: {settings.labels} labels {len(twice)} utterances that have labels already; use an evaluate run "
            f"with evaluate.partition=unlabeled of a model with config.{block}.max_train={settings.max_train}"
        )
    if other := sorted({record["task"] for record in found.values()} - {task}):
        raise UserError(
            f"{key}: {settings.labels} has predictions of {other[0]}, not of {task}; evaluate a {task} model"
        )

    def labeled(one: Utterance, record: Record) -> Utterance:
        if task == "dc":
            return dataclasses.replace(one, domain=record["predicted_domain"])
        return dataclasses.replace(one, intent=record["predicted_intent"], tags=tuple(record["predicted_tags"]))

    unlabeled = unlabeled_train(prepared, settings.max_train)
    return [labeled(one, record) for one in unlabeled if (record := found.get((one.locale, one.id)))]


def with_steps(settings: Finetune, utterances: int) -> Finetune:
    """The settings with epochs converted to steps; with patience, evaluate_every=0 becomes once per epoch.

    Raises UserError if there is nothing to train on.
    """
    if not utterances:
        raise UserError("config.nlu: there is no utterance to train on; give a data set with a train partition")
    if settings.patience and not settings.evaluate_every:
        settings = dataclasses.replace(settings, evaluate_every=math.ceil(utterances / settings.batch_size))
    if not settings.epochs:
        return settings
    steps = math.ceil(settings.epochs * utterances / settings.batch_size)
    if steps < settings.warmup_steps and jax.process_index() == 0:
        print(
            f"note: {settings.epochs} epochs of {utterances} utterances are {steps} steps, fewer than "
            f"config.finetune.warmup_steps={settings.warmup_steps}: the learning rate barely reaches its peak; "
            "raise the epochs",
            file=sys.stderr,
        )
    return dataclasses.replace(settings, steps=steps, warmup_steps=min(settings.warmup_steps, steps))


def classifier(
    encoder: Mapping[str, Any],
    prepared: Prepared,
    dropout: float,
    pooling: Pooling,
    compute_dtype: str,
    task: Task,
    sizes: Mapping,
    attention: Kernel = PLAIN,
) -> Functional:
    """The finetuned model's shape: the encoder with the dropout of finetuning, and the task's head."""
    masked = encoder_model(encoder, prepared, compute_dtype, "student", attention)
    shape = dataclasses.replace(masked.config, dropout=dropout)
    return Functional(task, shape, compute_dtype=masked.compute_dtype, pooling=pooling, attention=attention, **sizes)


def finetune(
    directory: RunDirectory,
    prepared: Prepared,
    execution: Execution,
    *,
    values: Mapping[str, Any],
    settings: Finetune,
    task: Task,
    encoder: Mapping[str, Any],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """Trains one classifier and writes dev.json next to its checkpoints; values: the run's config as plain values.

    sizes: class counts to pad the label maps to, where several models share a compiled step.
    """
    domain, start = settings.domain if task == "icner" else "", settings.init_from
    given = labeled_train(prepared, settings.max_train, domain)
    train = [*given, *predicted_labels(prepared, settings, task, "finetune")]
    dev = labeled_dev(prepared, settings, domain)
    if start:
        trained.check_tokenizer(start, prepared, "finetune.init_from")
    maps = LabelMaps.from_train(given)
    padded = {**class_counts(task, maps), **sizes}
    pooling = cast(Pooling, settings.pooling)
    mesh = make_mesh(execution.mesh)
    kernel = find_kernel(execution.attention, mesh)
    model = classifier(encoder, prepared, settings.dropout, pooling, values["compute_dtype"], task, padded, kernel)
    masks = class_masks(class_counts(task, maps), padded)
    length = prepared.settings.rows.length
    rows = math.lcm(row_multiple(mesh) * settings.accumulation, 4)
    labeled = LabeledSet(train, prepared.tokenizer, maps, task, length)
    rules = execution.sharding.student

    def init(params: Params) -> Params:
        masked = encoder_model(encoder, prepared, values["compute_dtype"], "student")
        return {**params, **trained.trained_params(start, masked, mesh, "encoder", rules)}

    def evaluate(params: Params, step: int) -> dict[str, float]:
        del step
        which = (model, params, masks, dev, given, prepared.tokenizer, length, maps, mesh)
        records = predict(*which, probabilities="label")
        return {f"dev/{name}": value for name, value in {**dev_scores(records, task), **threshold(records)}.items()}

    if task == "dc":
        objective = make_dc_objective(model, settings.label_smoothing)
    else:
        objective = make_icner_objective(model, settings.label_smoothing, settings.tag_weight)
    fingerprint = prepared.tokenizer.fingerprint
    notes = {
        "train_utterances": len(train),
        "predicted_labels": len(train) - len(given),
        "classes": padded,
        "labels": maps.to_json(),
        "seen": serving.Seen.of(given, prepared.settings.nlu.character_locales).to_json(),
    }
    best = Best("dev/score", settings.patience)
    job = Job(
        settings=settings,
        seed=values["seed"],
        model=model,
        phases=(Phase(0, objective, lambda: masks),),
        batches=FinetuneBatches(labeled, settings.batch_size, length, values["seed"], rows),
        evaluate=evaluate,
        best=best,
        init=init if start else None,
        rules=rules,
        notes={"tokenizer_fingerprint": fingerprint, **notes},
    )
    ended = train_job(job, directory, mesh, execution)
    if jax.process_index() == 0:
        scores = {name.removeprefix("dev/"): value for name, value in best.metrics.items()}
        write_sealed(directory.path / DEV, {**scores, "count": len(dev)})
    return ended


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
    tokenizer: Tokenizer,
    length: int,
    maps: LabelMaps,
    mesh,
    batch_rows: int = 32,
    count: Count | None = None,
    probabilities: Probabilities = "none",
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
        tokenizer,
        maps,
        length=length,
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


def threshold(records: Sequence[Record]) -> dict[str, float]:
    """{THRESHOLD: value}: the REFUSED quantile of the probabilities of correct domains or intents; {} if none is."""
    likely = [
        one["probability"]
        for one in records
        if one["predicted_domain" if one["task"] == "dc" else "predicted_intent"]
        == one["domain" if one["task"] == "dc" else "intent"]
    ]
    return {THRESHOLD: float(np.quantile(likely, REFUSED))} if likely else {}


def predict_partition(
    checkpoint: pathlib.Path, prepared: Prepared, mesh, partition: str, compute_dtype: str, progress: bool = False
) -> list[Record]:
    """Records of a partition by a finetuned model, or by that of each gold domain where there are several."""
    total = len(scored_utterances(checkpoint, prepared, partition, ""))
    with Count(f"evaluate {partition}", "utterances", total, shown=progress) as count:
        return _predict_partition(checkpoint, prepared, mesh, partition, compute_dtype, count)


def _predict_partition(
    checkpoint: pathlib.Path, prepared: Prepared, mesh, partition: str, compute_dtype: str, count: Count
) -> list[Record]:
    domains, train = domain_folders(checkpoint), labels_used(checkpoint, prepared)
    if not domains:
        return predict_with(checkpoint, prepared, train, mesh, partition, "", compute_dtype, count)
    records = []
    for domain, folder in domains.items():
        records += predict_with(folder, prepared, train, mesh, partition, domain, compute_dtype, count)
    # A domain without a train utterance has no model: its utterances count as errors.
    orphans = [one for one in scored_utterances(checkpoint, prepared, partition, "") if one.domain not in domains]
    sets = assign_test_sets(orphans, train)
    return records + [intent_slot_record(one, names, "", ["O"] * len(one.words)) for one, names in zip(orphans, sets)]


def scored_utterances(checkpoint: pathlib.Path, prepared: Prepared, partition: str, domain: str) -> list[Utterance]:
    """The utterances of a partition, or the train utterances whose labels a finetuned model has not seen."""
    if partition != "unlabeled":
        return of_domain(prepared.utterances, partition, domain)
    if serving.is_served(checkpoint):
        problem = f"{checkpoint} is exported and does not say which labels it has seen"
        raise UserError(f"config.evaluate.partition: {problem}; name the finetuning run")
    limit = trained.run_config(checkpoint, "evaluate.checkpoint").finetune.max_train
    return [one for one in unlabeled_train(prepared, limit) if domain in ("", one.domain)]


def labels_used(checkpoint: pathlib.Path, prepared: Prepared) -> list[Utterance]:
    """The train utterances whose labels a finetuned model saw; all of them for an exported one, which has no record."""
    exported = serving.is_served(checkpoint)
    limit = 0 if exported else trained.run_config(checkpoint, "evaluate.checkpoint").finetune.max_train
    return labeled_train(prepared, limit, "")


class Finetuned(NamedTuple):
    """A finetuned model read back from the directory of its run."""

    task: str
    model: Functional
    params: Params
    masks: dict[str, np.ndarray]
    maps: LabelMaps
    tokenizer: Tokenizer  # with the model's vocabulary
    length: int  # tokens in a row
    seen: serving.Seen


def load_finetuned(folder: pathlib.Path, prepared: Prepared, mesh, compute_dtype: str, key: str) -> Finetuned:
    """The single model of a finetuning run, or of a folder that `export` wrote for serving; config.<key> names it."""
    if serving.is_served(folder):
        return served(folder, compute_dtype)
    config = trained.run_config(folder, key)
    if "finetune" not in config:
        raise UserError(f"config.{key}: {folder} is not a finetuning run; give the workdir of one")
    prepared = prepared_for(config, prepared)
    trained.check_tokenizer(folder, prepared, key)
    run = trained.run_record(folder, key)
    task = cast(Task, trained.run_command(folder, key).removeprefix("finetune_"))
    maps = LabelMaps.from_json(run["labels"])
    start = config.finetune.init_from
    encoder = trained.encoder_block(start, "finetune.init_from") if start else config.student
    dropout, pooling = float(config.finetune.dropout), config.finetune.pooling
    model = classifier(encoder, prepared, dropout, pooling, compute_dtype, task, run["classes"])
    params = trained.trained_params(folder, model, mesh)
    masks, length = class_masks(class_counts(task, maps), run["classes"]), prepared.settings.rows.length
    return Finetuned(
        task, model, params, masks, maps, prepared.tokenizer, length, seen_by(folder, config, run, prepared)
    )


def seen_by(folder: pathlib.Path, config: ConfigDict, run: Mapping[str, Any], prepared: Prepared) -> serving.Seen:
    """What a run recorded about its labeled text; runs of 0.2.0 did not, so the text is read again."""
    if "seen" in run:
        seen = serving.Seen.from_json(run["seen"])
    else:
        domain = config.finetune.domain if "intents" in run["classes"] else ""
        train = labeled_train(prepared, config.finetune.max_train, domain)
        seen = serving.Seen.of(train, prepared.settings.nlu.character_locales)
    dev = read_json_object(folder / DEV) if is_there(trained.whole(folder / DEV)) else {}
    return seen._replace(threshold=dev.get(THRESHOLD))


def served(folder: pathlib.Path, compute_dtype: str) -> Finetuned:
    """The model of an exported folder, which reads texts with its own tokenizer."""
    one = serving.read(folder)
    model = dataclasses.replace(one.model, compute_dtype=resolve_dtype(compute_dtype))
    sizes = class_counts(model.kind, one.maps)
    masks = class_masks(sizes, sizes)
    return Finetuned(model.kind, model, one.params, masks, one.maps, one.tokenizer, one.length, one.seen)


def predict_with(
    folder: pathlib.Path,
    prepared: Prepared,
    train: Sequence[Utterance],
    mesh,
    partition: str,
    domain: str,
    compute_dtype: str,
    count: Count,
) -> list[Record]:
    """Records of a partition (of one domain, or of all) by the single model in `folder`; train: the labels used."""
    one = load_finetuned(folder, prepared, mesh, compute_dtype, "evaluate.checkpoint")
    utterances = scored_utterances(folder, prepared, partition, domain)
    if not utterances:
        return []
    which = (one.model, one.params, one.masks, utterances, train, one.tokenizer, one.length, one.maps, mesh)
    return predict(*which, count=count)
