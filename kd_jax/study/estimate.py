"""What the stages of a study take, from its config alone: tokens, operations, and memory on one device.

Sizes that depend on data not yet read are assumed, and it is said which. `compile_check` tells memory exactly, for a
given machine and mesh, from the compiled step.
"""

import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from kd_jax.data.manifest import read_manifest
from kd_jax.data.masking import num_slots
from kd_jax.data.text.files import fill_path
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.losses.blocked import block_for
from kd_jax.models.encoder_config import EncoderConfig, encoder_config
from kd_jax.models.flops import cached_flops
from kd_jax.models.functional import Functional, flops_per_row, parameter_count
from kd_jax.study.plan import STAGE, Stage, may_cache
from kd_jax.types import UserError

FLOAT = 4  # bytes: parameters, moments, gradients and logits are float32

# Utterances a locale in train and test: those of MASSIVE 1.1 (arXiv 2204.08582, table 2), and about those of the
# embedded data, whose languages differ a little.
MASSIVE = (11_514, 2_974)
EMBEDDED = (2_000, 500)
UTTERANCE_TOKENS = 13.0  # of MASSIVE in the tokenizers tried, special tokens included
VOCABULARY = 250_000  # of most multilingual models


@dataclass(frozen=True)
class Sizes:
    """What an estimate needs to know of the data; `notes` say what of it is assumed."""

    vocabulary: int
    train: int  # utterances of all locales
    test: int
    tokens: float  # of an utterance, special ones included
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Estimate:
    """Of one stage: positions of rows, padding included; FLOPs of matrix products; bytes on one device, by what for."""

    tokens: float = 0.0
    flops: float = 0.0
    memory: Mapping[str, float] = field(default_factory=dict)

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    def describe(self) -> dict[str, Any]:
        """As JSON values, for plan.json."""
        memory = {name: round(value) for name, value in self.memory.items()}
        return {
            "tokens": round(self.tokens),
            "flops": float(f"{self.flops:.4g}"),
            "memory_bytes": round(self.bytes),
            "memory": memory,
        }


def sizes_of(config: ConfigDict, prepared: pathlib.Path) -> Sizes:
    """From the study's prepared folder where it is finished, else from the config and assumptions."""
    manifest = read_manifest(prepared) if prepared.is_dir() else None
    if manifest is not None:
        counts = {"train": 0, "test": 0}
        for name, count in manifest["utterances"].items():
            partition = name.rsplit(" ", 1)[-1]
            if partition in counts:
                counts[partition] += count
        task = [one for one in manifest["stores"] if one["kind"] == "task"]
        texts = sum(one["texts"] for one in task)
        tokens = sum(one["tokens"] for one in task) / texts if texts else UTTERANCE_TOKENS
        return Sizes(manifest["vocab_size"], counts["train"], counts["test"], tokens)
    vocabulary, said = _vocabulary(config)
    nlu = config.nlu
    train, test = EMBEDDED if nlu.format == "embedded" else MASSIVE
    if nlu.max_train:
        train = min(train, nlu.max_train)
    said += (
        f"utterances: {train:,} to train on and {test:,} to test on in each of {len(nlu.locales)} locales, "
        f"{UTTERANCE_TOKENS:g} tokens each",
    )
    return Sizes(vocabulary, train * len(nlu.locales), test * len(nlu.locales), UTTERANCE_TOKENS, said)


def _vocabulary(config: ConfigDict) -> tuple[int, tuple[str, ...]]:
    block = config.tokenizer
    if block.kind == "train":
        return block.vocab_size, ()
    if config.teacher.vocab_size:
        return config.teacher.vocab_size, ()
    try:
        folder = fill_path(block.path, key="config.tokenizer.path")
        if pathlib.Path(folder).is_dir():
            return Tokenizer.load(folder).vocab_size, ()
    except UserError:  # it will be told when it is needed
        pass
    return VOCABULARY, (f"vocabulary: {VOCABULARY:,} pieces, the tokenizer {block.path} is not here",)


def estimates(config: ConfigDict, stages: Mapping[str, Stage], sizes: Sizes) -> dict[str, Estimate]:
    """One estimate a stage; `stages` are all of the study's by folder."""
    model = _Estimator(config, stages, sizes)
    return {folder: model.of(stage) for folder, stage in stages.items()}


class _Estimator:
    """The shapes of the study, and the estimate of each of its stages."""

    def __init__(self, config: ConfigDict, stages: Mapping[str, Stage], sizes: Sizes):
        self.config, self.stages, self.sizes = config, stages, sizes
        self.length = config.rows.length
        self.slots = num_slots(self.length, config.masking.rate)
        # "auto" depends on the machine, and this may be another one than will train: the larger is counted.
        self.width = 2 if config.compute_dtype == "bfloat16" else FLOAT
        self._parameters: dict[EncoderConfig, int] = {}

    def shape(self, name: str) -> EncoderConfig:
        """The encoder of config.<name> with the vocabulary filled in."""
        values = self.config[name].to_dict()
        values["vocab_size"] = values["vocab_size"] or self.sizes.vocabulary
        return encoder_config(values, 1)

    def parameters(self, shape: EncoderConfig) -> int:
        """Of the masked-LM model; a classifier's head is smaller than a masked-LM head or about as large."""
        if shape not in self._parameters:
            self._parameters[shape] = parameter_count(Functional("mlm", shape).abstract())["total"]
        return self._parameters[shape]

    def of(self, stage: Stage) -> Estimate:
        command = stage.command.removesuffix("_dc").removesuffix("_icner")
        return {
            "prepare": lambda _: Estimate(),
            "import_model": self._import,
            "pretrain": self._pretrain,
            "cache_teacher": self._cache,
            "distill": self._distill,
            "finetune": self._finetune,
            "evaluate": self._evaluate,
            "latency": self._latency,
        }[command](stage)

    def _job(self, stage: Stage, block: ConfigDict, flops_a_row: float, memory: dict[str, float]) -> Estimate:
        rows = block.steps * block.batch_size
        return Estimate(rows * self.length, rows * flops_a_row, memory)

    def _latency(self, stage: Stage) -> Estimate:
        """Seconds, whatever the study's size; all models are in memory together."""
        parameters = sum(self.parameters(self.shape(name)) for name in stage.config.latency.models)
        return Estimate(memory={"parameters": FLOAT * parameters})

    def _import(self, stage: Stage) -> Estimate:
        return Estimate(memory={"parameters": FLOAT * self.parameters(self.shape("teacher"))})

    def _pretrain(self, stage: Stage) -> Estimate:
        block = stage.config.pretrain
        shape = self.shape(block.model)
        rows = block.batch_size // block.accumulation
        memory = self._training_memory(shape, rows) | self._logits(shape.vocab_size, rows, copies=2)
        one = (self.length, self.slots, shape.vocab_size)
        if stage.config.train_body:
            return self._job(stage, block, flops_per_row(shape, *one, training=True, last_layer_at=self.slots), memory)
        forward = flops_per_row(shape, *one, training=False, last_layer_at=self.slots)
        head = forward - flops_per_row(shape, self.length, 0, 0, training=False, last_layer_at=self.slots)
        memory["activations"] /= shape.num_layers  # nothing is kept for the body's gradient
        return self._job(stage, block, forward + 2 * head, memory)

    def _teachers(self, stage: Stage) -> list[EncoderConfig]:
        """The shapes of the teachers that are in memory at a time."""
        names = stage.config.teacher_checkpoint.split(",")
        commands = [self.stages[name.removeprefix(STAGE)].command for name in names]
        shapes = [self.shape("intermediate" if command == "distill" else "teacher") for command in commands]
        return shapes[:1] if stage.config.distill.teacher_steps else shapes

    def _student(self, stage: Stage) -> EncoderConfig:
        """The encoder that a distillation trains: an intermediate is a student in its own stage."""
        is_student = stage.config.student == self.config.student
        return self.shape("student" if is_student else "intermediate")

    def _distill(self, stage: Stage) -> Estimate:
        block = stage.config.distill
        student, teachers = self._student(stage), self._teachers(stage)
        rows = block.batch_size // block.accumulation
        memory = self._training_memory(student, rows)
        vocabulary = student.vocab_size
        if stage.config.teacher_cache:
            (teacher,) = teachers
            memory |= self._logits(vocabulary, rows, copies=4, block=block.block_positions)
            if self.config.cache.format != "hidden":
                flops = flops_per_row(student, self.length, self.slots, vocabulary, True, self.slots)
                return self._job(stage, block, flops, memory)
            memory["teacher"] = FLOAT * teacher.vocab_size * teacher.hidden_size
            return self._job(stage, block, cached_flops(student, teacher, 1, self.length, self.slots), memory)
        everywhere = block.kd_positions == "all"
        at = None if everywhere else self.slots
        logits = self.length if everywhere else self.slots
        flops = flops_per_row(student, self.length, logits, vocabulary, training=True, last_layer_at=at)
        for teacher in teachers:
            flops += flops_per_row(teacher, self.length, logits, teacher.vocab_size, training=False, last_layer_at=at)
        memory["teacher"] = FLOAT * sum(self.parameters(teacher) for teacher in teachers)
        memory["activations"] += max(self._forward_activations(teacher, rows) for teacher in teachers)
        copies = 3 + len(teachers)
        memory |= self._logits(max(vocabulary, teachers[0].vocab_size), rows, copies, block.block_positions, logits)
        return self._job(stage, block, flops, memory)

    def _cache(self, stage: Stage) -> Estimate:
        """At most: rows that several runs visit with the same masks are predicted once."""
        block = stage.config.cache
        teacher = self.shape("teacher")
        runs = max(len(block.task_shares), 1) * max(len(block.seeds), 1)
        rows = runs * block.steps * block.batch_size
        slots = 0 if block.format == "hidden" else self.slots
        flops = flops_per_row(teacher, self.length, slots, teacher.vocab_size, training=False, last_layer_at=self.slots)
        if not slots:
            flops += 2.0 * self.slots * teacher.hidden_size**2  # the head's dense layer
        memory: dict[str, float] = {
            "teacher": FLOAT * self.parameters(teacher),
            "activations": self._forward_activations(teacher, block.batch_rows),
        }
        if slots:
            memory |= self._logits(teacher.vocab_size, block.batch_rows, copies=2)
        return Estimate(rows * self.length, rows * flops, memory)

    def _finetune(self, stage: Stage) -> Estimate:
        block = stage.config.finetune
        student = self.shape("student")
        train = self.sizes.train
        if block.max_train:
            train = min(train, block.max_train * len(self.config.nlu.locales))
        steps = math.ceil(block.epochs * train / block.batch_size) if block.epochs else block.steps
        rows = math.ceil(1.1 * block.batch_size * self.sizes.tokens / self.length)  # as FinetuneBatches makes them
        flops = steps * rows * flops_per_row(student, self.length, 0, 0, training=True)
        memory = self._training_memory(student, math.ceil(rows / block.accumulation))
        return Estimate(steps * rows * self.length, flops, memory)

    def _evaluate(self, stage: Stage) -> Estimate:
        student = self.shape("student")
        rows = math.ceil(self.sizes.test * self.sizes.tokens / self.length)
        flops = rows * flops_per_row(student, self.length, 0, 0, training=False)
        memory = {
            "parameters": FLOAT * self.parameters(student),
            "activations": self._forward_activations(student, stage.config.evaluate.batch_rows),
        }
        return Estimate(rows * self.length, flops, memory)

    def _training_memory(self, shape: EncoderConfig, rows: int) -> dict[str, float]:
        count = self.parameters(shape)
        kept = shape.num_layers * (1 if shape.remat else self._layer(shape) / shape.hidden_size)
        again = self._layer(shape) if shape.remat else 0  # one layer's activations come back at a time
        tokens = rows * self.length
        return {
            "parameters": FLOAT * count,
            "moments": 2 * FLOAT * count,
            "gradients": FLOAT * count,
            "activations": tokens * self.width * (kept * shape.hidden_size + again),
        }

    def _layer(self, shape: EncoderConfig) -> float:
        """Numbers a token that one layer keeps for its gradient: the inputs of its products, norms and activations,
        the attention's shares of the whole row, and what dropout took; the counts are fitted to compiled steps.
        """
        states = (12 + 3 * (shape.dropout > 0)) * shape.hidden_size
        inner = (4 if shape.gated else 3) * shape.intermediate_size
        return states + inner + (3 + (shape.attention_dropout > 0)) * shape.num_heads * self.length

    def _forward_activations(self, shape: EncoderConfig, rows: int) -> float:
        """Without a gradient one layer's are there at a time."""
        return rows * self.length * self.width * self._layer(shape)

    def _logits(
        self, vocabulary: int, rows: int, copies: int, block: int = 0, positions: int | None = None
    ) -> dict[str, float]:
        """A block of logits in so many copies: the student's, their gradient, the teachers', their probabilities."""
        everything = rows * (self.slots if positions is None else positions)
        return {"logits": FLOAT * copies * vocabulary * min(block or block_for(vocabulary), everything)}


def assumptions(sizes: Sizes) -> list[str]:
    """What of the sizes is not known before `prepare`, a sentence a line."""
    return [f"Assumed, as the data are not prepared: {note}." for note in sizes.notes]


def remarks(config: ConfigDict, sizes: Sizes) -> list[str]:
    """What the reader of the estimates must know, a sentence a line."""
    lines = []
    if config.tokenizer.kind == "train":
        lines.append("A trained tokenizer may get fewer pieces than config.tokenizer.vocab_size.")
    if config.vocabulary.trim:
        lines.append("Students are counted with the whole vocabulary; config.vocabulary.trim makes it smaller.")
    if config.study.cache and may_cache(config):
        lines.append("Cached predictions are counted for every row of every run; those that repeat are made once.")
    lines.append(
        "Tokens are positions of rows, padding included. FLOPs are those of matrix products; held-out evaluation and "
        "the terms on inner states are left out."
    )
    if config.compute_dtype == "auto":
        lines.append("Activations are counted in float32; where the machine computes in bfloat16 they are half.")
    lines.append(
        "Memory is that of one device which has everything: the mesh divides parameters and moments by fsdp x tensor, "
        "and activations and logits by data x fsdp. compile_check tells it exactly."
    )
    return lines
