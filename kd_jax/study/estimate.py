"""The cost of a study's stages, from its config and its labeled data: tokens, FLOPs, and memory on one device.

Sizes are those of the prepared text, or counted in the user's files; assumptions are listed. `compile_check` gives the
exact memory, for a given machine and mesh, from the compiled step.
"""

import math
import pathlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kd_jax.config.commands import Baseline, Evaluate
from kd_jax.config.data import Cache, Masking, Nlu, Rows, States, TokenizerSettings
from kd_jax.config.settings import read
from kd_jax.config.training import Distill, Finetune, Pretrain, Training
from kd_jax.data.embedded.teacher import EMBEDDED_MODEL
from kd_jax.data.masking import num_slots
from kd_jax.data.rows import read_manifest
from kd_jax.data.text.files import fill_path
from kd_jax.data.text.sources import load_utterances
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.losses.blocked import block_for
from kd_jax.models.encoder_config import EncoderConfig, encoder_config
from kd_jax.models.functional import Functional, flops_per_row, parameter_count
from kd_jax.models.layer_map import layer_map, read_layers
from kd_jax.study.plan import REPORT, STAGE, Stage
from kd_jax.study.run import Study
from kd_jax.types import UserError

FLOAT = 4  # bytes: parameters, moments, gradients and logits are float32

# Utterances per locale in train and test: those of MASSIVE 1.1 (arXiv 2204.08582, table 2), and about those of the
# embedded data, whose languages differ a little.
MASSIVE = (11_514, 2_974)
EMBEDDED = (2_000, 500)
LOCAL = ("massive", "massive_parquet")  # formats whose files are on this machine
WORD_TOKENS = 1.6  # tokens per word in MASSIVE; plus two special tokens per utterance
UTTERANCE_TOKENS = 13.0  # of MASSIVE in the tokenizers tried, special tokens included
VOCABULARY = 250_000  # of most multilingual models


@dataclass(frozen=True)
class Sizes:
    """The sizes of the data; `notes` are sentences on where they come from, and which of them are assumed."""

    vocabulary: int
    train: int  # utterances of all locales
    test: int
    tokens: float  # per utterance, special tokens included
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """The cost of one stage: positions of rows, padding included; FLOPs of matrix products; bytes on one device."""

    tokens: float = 0.0
    flops: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)  # by purpose

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    def describe(self) -> dict[str, Any]:
        """As JSON values, for plan.json."""
        memory = {name: round(value) for name, value in self.memory.items()}
        cost = {"tokens": round(self.tokens), "flops": float(f"{self.flops:.4g}")}
        return {**cost, "memory_bytes": round(self.bytes), "memory": memory}


def sizes_of(study: Study) -> Sizes:
    """From the study's prepared folder if it is finished, else counted in the user's files, else assumed."""
    values, prepared = study.values, study.folder(study.planner.prepare())
    manifest = read_manifest(prepared) if prepared.is_dir() else None
    if manifest is not None:
        counts = {"train": 0, "test": 0, "dev": 0}
        for name, count in manifest["utterances"].items():
            counts[name.rsplit(" ", 1)[-1]] += count  # "de-DE train"
        task = [one for one in manifest["stores"] if one["kind"] == "task"]
        texts = sum(one["texts"] for one in task)
        tokens = sum(one["tokens"] for one in task) / texts if texts else UTTERANCE_TOKENS
        note = (
            f"Counted in the prepared text: {counts['train']:,} utterances to train on, {counts['test']:,} to test on."
        )
        return Sizes(manifest["vocab_size"], counts["train"], counts["test"], tokens, (note,))
    vocabulary, notes = _vocabulary(values)
    nlu = read(Nlu, values["nlu"], "nlu")
    problem = "the data are not prepared"
    if nlu.format in LOCAL:
        try:
            return _counted(nlu, vocabulary, notes)
        except UserError as error:  # `prepare` refuses the same
            problem = str(error)
    train, test = EMBEDDED if nlu.format == "embedded" else MASSIVE
    train = min(train, nlu.max_train or train)
    count = len(nlu.locales)
    assumed = (
        f"Assumed, since {problem}: {train:,} utterances to train on and {test:,} to test on in each of {count} "
        f"locales, {UTTERANCE_TOKENS:g} tokens each."
    )
    return Sizes(vocabulary, train * count, test * count, UTTERANCE_TOKENS, (assumed, *notes))


def _counted(nlu: Nlu, vocabulary: int, notes: tuple[str, ...]) -> Sizes:
    """The user's labeled utterances, without lines that `prepare` would refuse. Raises UserError if there are none."""
    utterances = load_utterances(nlu, lambda _: None)
    if not utterances:
        raise UserError(f"config.nlu.path: {nlu.path} holds no utterance of {', '.join(nlu.locales)}")
    train, test = (sum(one.partition == name for one in utterances) for name in ("train", "test"))
    words = sum(len(one.words) for one in utterances) / len(utterances)
    tokens = round(2 + WORD_TOKENS * words, 1)
    note = (
        f"Counted in {nlu.path}: {train:,} utterances to train on, {test:,} to test on, of {words:.1f} words; assumed: "
        f"{tokens:g} tokens each."
    )
    return Sizes(vocabulary, train, test, tokens, (note, *notes))


def _vocabulary(values: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    settings = read(TokenizerSettings, values["tokenizer"], "tokenizer")
    if settings.kind == "train":
        return settings.vocab_size, ()
    if known := values["teacher"]["vocab_size"]:
        return known, ()
    try:
        folder = fill_path(settings.path, key="config.tokenizer.path")
        if folder == EMBEDDED_MODEL or pathlib.Path(folder).is_dir():
            return Tokenizer.load(folder).vocab_size, ()
    except UserError:  # reported when the tokenizer is needed
        pass
    return VOCABULARY, (f"Assumed: a vocabulary of {VOCABULARY:,}, since the tokenizer {settings.path} was not found.",)


def estimates(planned: Iterable[Stage], values: Mapping[str, Any], sizes: Sizes) -> dict[str, Estimate]:
    """The estimate of each stage of a study's plan by its folder; values: the study's config."""
    stages = {stage.folder: stage for stage in planned if stage.command != REPORT}
    model = _Estimator(values, stages, sizes)
    return {folder: model.of(stage) for folder, stage in stages.items()}


class _Estimator:
    """The shapes of the study, and the estimate of each of its stages."""

    def __init__(self, values: Mapping[str, Any], stages: Mapping[str, Stage], sizes: Sizes):
        self.values, self.stages, self.sizes = values, stages, sizes
        self.length = read(Rows, values["rows"], "rows").length
        self.slots = num_slots(self.length, read(Masking, values["masking"], "masking").rate)
        # "auto" depends on the machine, and another one than this may train: the larger width is counted.
        self.width = 2 if values["compute_dtype"] == "bfloat16" else FLOAT
        self._parameters: dict[EncoderConfig, int] = {}

    def shape(self, name: str) -> EncoderConfig:
        """The encoder of config.<name> with the vocabulary filled in."""
        encoder = self.values[name]
        return encoder_config({**encoder, "vocab_size": encoder["vocab_size"] or self.sizes.vocabulary}, 1)

    def parameters(self, shape: EncoderConfig) -> int:
        """Of the masked-LM model; a classifier's head is about as large as the masked-LM head, or smaller."""
        if shape not in self._parameters:
            self._parameters[shape] = parameter_count(Functional("mlm", shape).abstract())["total"]
        return self._parameters[shape]

    def flops(self, shape: EncoderConfig, *, training: bool) -> float:
        """Per row of a masked-LM step with logits at the masked positions."""
        return flops_per_row(shape, self.length, self.slots, shape.vocab_size, training, self.slots)

    def of(self, stage: Stage) -> Estimate:
        job = stage.job
        if isinstance(job, Pretrain):
            return self._pretrain(job, stage.config["train_body"])
        if isinstance(job, Distill):
            return self._distill(job, stage.config)
        if isinstance(job, Finetune):
            return self._finetune(job, self._of_teacher(stage))
        if stage.command == "cache_teacher":
            return self._cache(read(Cache, stage.config["cache"], "cache"))
        if stage.command == "cache_states":
            return self._states(read(States, stage.config["states"], "states"))
        if stage.command == "evaluate":
            return self._evaluate(read(Evaluate, stage.config["evaluate"], "evaluate"), self._of_teacher(stage))
        if stage.command == "baseline":
            return self._baseline(read(Baseline, stage.config["baseline"], "baseline"))
        if stage.command == "prepare":
            return Estimate()
        # What remains takes seconds, whatever the study's size; `latency` has all its models in memory.
        models = stage.config["latency"]["models"] if stage.command == "latency" else ("teacher",)
        return Estimate(memory={"parameters": FLOAT * sum(self.parameters(self.shape(name)) for name in models)})

    def _job(self, job: Training, flops_per_row: float, memory: dict[str, float]) -> Estimate:
        rows = job.steps * job.batch_size
        return Estimate(rows * self.length, rows * flops_per_row, memory)

    def _pretrain(self, job: Pretrain, train_body: bool) -> Estimate:
        shape = self.shape(job.model)
        rows = job.batch_size // job.accumulation
        memory = self._training_memory(shape, rows) | self._logits(shape.vocab_size, rows, copies=2)
        if train_body:
            return self._job(job, self.flops(shape, training=True), memory)
        forward = self.flops(shape, training=False)
        head = forward - flops_per_row(shape, self.length, 0, 0, training=False, last_layer_at=self.slots)
        memory["activations"] /= shape.num_layers  # the frozen encoder keeps nothing for a gradient
        return self._job(job, forward + 2 * head, memory)

    def _distill(self, job: Distill, config: Mapping[str, Any]) -> Estimate:
        # An intermediate is the student of its own stage.
        student = self.shape("student" if config["student"] == self.values["student"] else "intermediate")
        commands = [self.stages[one.removeprefix(STAGE)].command for one in config["teacher_checkpoint"].split(",")]
        teachers = [self.shape("intermediate" if command == "distill" else "teacher") for command in commands]
        if job.teacher_steps:  # one after the other; both have the same shape
            teachers = teachers[:1]
        ends = [begin for begin, _ in job.parts[1:]] + [1.0]
        flops, memory = 0.0, dict[str, float]()
        for (begin, part), end in zip(job.parts, ends):
            cost, needed = self._distill_row(part, student, teachers, bool(config["teacher_cache"]))
            flops += (end - begin) * cost
            memory |= {name: max(size, memory.get(name, 0.0)) for name, size in needed.items()}
        return self._job(job, flops, memory)

    def _distill_row(
        self, job: Distill, student: EncoderConfig, teachers: list[EncoderConfig], cached: bool
    ) -> tuple[float, dict[str, float]]:
        """FLOPs of a row, and memory, of one part of the loss."""
        rows, vocabulary = job.batch_size // job.accumulation, student.vocab_size
        memory = self._training_memory(student, rows)
        # The terms on inner states read all columns of the last layer, and logits at all positions do too.
        everywhere = job.features or job.kd_positions == "all"
        at, logits = None if everywhere else self.slots, self.length if job.kd_positions == "all" else self.slots
        logits = logits if job.trains_head else 0
        flops = flops_per_row(student, self.length, logits, vocabulary, training=True, last_layer_at=at)
        flops += sum(self._inner_terms(job, student, teacher, cached) for teacher in teachers)
        if logits:
            copies = 4 if cached else 3 + len(teachers)
            widest = max(vocabulary, 0 if cached else teachers[0].vocab_size)
            memory |= self._logits(widest, rows, copies, job.block_positions, logits)
        if cached:
            if job.kl.used and self.values["cache"]["format"] == "hidden":  # the teacher's decoder is still applied
                table = teachers[0].vocab_size * teachers[0].hidden_size
                memory["teacher"] = FLOAT * table
                flops += 2.0 * self.slots * table
            return flops, memory
        taught = logits if job.kl.used else 0
        for teacher in teachers:
            flops += flops_per_row(teacher, self.length, taught, teacher.vocab_size, training=False, last_layer_at=at)
        memory["teacher"] = FLOAT * sum(self.parameters(teacher) for teacher in teachers)
        memory["activations"] += max(self._forward_activations(teacher, rows) for teacher in teachers)
        return flops, memory

    def _inner_terms(self, job: Distill, student: EncoderConfig, teacher: EncoderConfig, cached: bool) -> float:
        """FLOPs per row of the matrix products of the terms on inner states: projections and relations, the student's
        with their gradients."""
        ours, theirs, flops = student.hidden_size, teacher.hidden_size, 0.0
        if cached and self.values["states"]["components"]:
            theirs = min(theirs, self.values["states"]["components"])

        def projected(setting: str, vectors: float) -> float:
            mapped = setting == "always" or (setting == "auto" and ours != theirs)
            return mapped * 3 * 2.0 * vectors * ours * theirs

        def pairs(layers: str, term: str) -> int:
            key = f"distill.{term}.layers"
            return len(layer_map(read_layers(layers, key), student.num_layers, teacher.num_layers, key))

        if job.hidden.used:
            flops += pairs(job.hidden.layers, "hidden") * projected(job.hidden.projection, self.length)
        if job.embeddings.used:
            flops += projected(job.embeddings.projection, self.length)
        if job.sentence.used:
            flops += projected(job.sentence.projection, self.length / self.sizes.tokens)
        if job.relations.used:
            matrices = pairs(job.relations.layers, "relations") * len(job.relations.parts)
            flops += matrices * 2.0 * self.length**2 * (3 * ours + theirs)
        return flops

    def _cache(self, cache: Cache) -> Estimate:
        """An upper bound: rows that several runs visit with the same masks are predicted once."""
        teacher = self.shape("teacher")
        rows = max(len(cache.task_shares), 1) * max(len(cache.seeds), 1) * cache.steps * cache.batch_size
        memory: dict[str, float] = {"teacher": FLOAT * self.parameters(teacher)}
        memory["activations"] = self._forward_activations(teacher, cache.batch_rows)
        if cache.format == "hidden":
            flops = flops_per_row(teacher, self.length, 0, 0, training=False, last_layer_at=self.slots)
            flops += 2.0 * self.slots * teacher.hidden_size**2  # the head's dense layer
        else:
            flops = self.flops(teacher, training=False)
            memory |= self._logits(teacher.vocab_size, cache.batch_rows, copies=2)
        return Estimate(rows * self.length, rows * flops, memory)

    def _states(self, states: States) -> Estimate:
        """The cost for the task's utterances alone; the size of generic text is unknown until it is prepared."""
        teacher = self.shape("teacher")
        memory: dict[str, float] = {"teacher": FLOAT * self.parameters(teacher)}
        memory["activations"] = self._forward_activations(teacher, states.batch_rows)
        rows = self.sizes.train * self.sizes.tokens / self.length
        return Estimate(rows * self.length, rows * flops_per_row(teacher, self.length, 0, 0, training=False), memory)

    def _of_teacher(self, stage: Stage) -> bool:
        """Whether a stage finetunes the teacher, or evaluates the finetuned one."""
        if stage.command == "evaluate":
            return self._of_teacher(self.stages[stage.config["evaluate"]["checkpoint"].removeprefix(STAGE)])
        start = self.stages.get(stage.config["finetune"]["init_from"].removeprefix(STAGE))
        return start is not None and (
            start.command == "import_model"
            or (start.command == "pretrain" and start.config["pretrain"]["model"] == "teacher")
        )

    def _labeled(self, max_train: int) -> int:
        """The train utterances of all locales whose labels are given."""
        return min(self.sizes.train, max_train * len(self.values["nlu"]["locales"]) or self.sizes.train)

    def _baseline(self, settings: Baseline) -> Estimate:
        """The teacher's forward pass; what runs on the CPU after it is not counted."""
        if settings.features != "teacher":
            return Estimate()
        teacher = self.shape("teacher")
        utterances = self._labeled(settings.max_train) + 2 * self.sizes.test  # dev is at most about as large as test
        rows = math.ceil(utterances * self.sizes.tokens / self.length)
        memory = {"teacher": FLOAT * self.parameters(teacher), "activations": self._forward_activations(teacher, 32)}
        flops = flops_per_row(teacher, self.length, 0, 0, training=False)
        return Estimate(rows * self.length, rows * flops, memory)

    def _finetune(self, job: Finetune, of_teacher: bool) -> Estimate:
        student = self.shape("teacher" if of_teacher else "student")
        train = self.sizes.train if job.labels else self._labeled(job.max_train)
        steps = math.ceil(job.epochs * train / job.batch_size) if job.epochs else job.steps
        rows = math.ceil(1.1 * job.batch_size * self.sizes.tokens / self.length)  # as FinetuneBatches makes them
        flops = steps * rows * flops_per_row(student, self.length, 0, 0, training=True)
        memory = self._training_memory(student, math.ceil(rows / job.accumulation))
        return Estimate(steps * rows * self.length, flops, memory)

    def _evaluate(self, settings: Evaluate, of_teacher: bool) -> Estimate:
        student = self.shape("teacher" if of_teacher else "student")
        utterances = self.sizes.test
        if settings.partition == "unlabeled":
            utterances = self.sizes.train - self._labeled(self.values["finetune"]["max_train"])
        rows = math.ceil(utterances * self.sizes.tokens / self.length)
        activations = self._forward_activations(student, settings.batch_rows)
        memory = {"parameters": FLOAT * self.parameters(student), "activations": activations}
        flops = rows * flops_per_row(student, self.length, 0, 0, training=False)
        return Estimate(rows * self.length, flops, memory)

    def _training_memory(self, shape: EncoderConfig, rows: int) -> dict[str, float]:
        count, layer = self.parameters(shape), self._layer(shape)
        # Rematerialization keeps each layer's input and has one layer's activations at a time.
        kept = shape.num_layers * shape.hidden_size + layer if shape.remat else shape.num_layers * layer
        return {
            "parameters": FLOAT * count,
            "moments": 2 * FLOAT * count,
            "gradients": FLOAT * count,
            "activations": rows * self.length * self.width * kept,
        }

    def _layer(self, shape: EncoderConfig) -> float:
        """Numbers per token that one layer keeps for its gradient: the inputs of its products, norms and activations,
        the attention probabilities over the row, and the dropout masks. The counts are fitted to compiled steps.
        """
        states = (12 + 3 * (shape.dropout > 0)) * shape.hidden_size
        inner = (4 if shape.gated else 3) * shape.intermediate_size
        return states + inner + (3 + (shape.attention_dropout > 0)) * shape.num_heads * self.length

    def _forward_activations(self, shape: EncoderConfig, rows: int) -> float:
        """Without a gradient one layer's activations exist at a time."""
        return rows * self.length * self.width * self._layer(shape)

    def _logits(
        self, vocabulary: int, rows: int, copies: int, block: int = 0, positions: int | None = None
    ) -> dict[str, float]:
        """A block of logits in several copies: the student's, their gradient, the teachers', their probabilities."""
        everything = rows * (self.slots if positions is None else positions)
        return {"logits": FLOAT * copies * vocabulary * min(block or block_for(vocabulary), everything)}


def product_rate() -> float:
    """FLOPs per second of float32 matrix products on this machine's CPU, measured for one second.

    With NumPy, because a dry run must not touch accelerators that others may be using.
    """
    size, count = 1024, 0
    matrix = np.full((size, size), 1 / size, np.float32)
    began = time.monotonic()
    while (took := time.monotonic() - began) < 1:
        np.matmul(matrix, matrix)
        count += 1
    return 2.0 * count * size**3 / took


def remarks(study: Study) -> list[str]:
    """What a reader of the estimates must know, one sentence per line."""
    trained, trimmed = study.values["tokenizer"]["kind"] == "train", study.values["vocabulary"]["trim"]
    cached, auto = study.planner.caches, study.values["compute_dtype"] == "auto"
    states = cached and study.planner.distill.clean
    lines = (
        (trained, "A trained tokenizer can get fewer tokens than config.tokenizer.vocab_size."),
        (trimmed, "Students are counted with the full vocabulary; config.vocabulary.trim makes it smaller."),
        (
            cached and not states,
            "Cached predictions are counted for every row of every run; repeated ones are made once.",
        ),
        (states, "Cached states are counted for the task's utterances; those of generic text are not included."),
        (study.values["finetune"]["patience"] > 0, "Finetuning that stops early is counted to its last epoch."),
        (True, "Tokens are positions of rows, padding included."),
        (True, "FLOPs are those of matrix products in all terms of the loss, without held-out evaluation."),
        (auto, "Activations are counted in float32; where the machine computes in bfloat16 they take half."),
        (True, "Memory is that of one device that holds everything; compile_check gives the exact value for a mesh."),
        (True, "A mesh divides parameters and moments by fsdp x tensor, and activations and logits by data x fsdp."),
    )
    return [line for applies, line in lines if applies]
