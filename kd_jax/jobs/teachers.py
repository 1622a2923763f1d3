"""The teachers of a distillation run, in the loop or as cached predictions, and the loss against them."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import numpy as np

from kd_jax.config import require
from kd_jax.config.data import Masking, Vocabulary
from kd_jax.config.execution import Execution, Rules
from kd_jax.config.training import Distill, Loss
from kd_jax.data.batches import MaskedBatches
from kd_jax.data.prepared import Prepared
from kd_jax.data.teacher_cache import CachedBatches
from kd_jax.data.transfer_set import TransferSet
from kd_jax.data.vocabulary import TrimmedPrepared, kept_ids
from kd_jax.jobs import trained
from kd_jax.jobs.job import model_layout, sharding_lines
from kd_jax.jobs.masked_lm import encoder_model
from kd_jax.losses.features import check_relation_heads
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.initialization import check_shapes, from_teacher, remarks
from kd_jax.models.layer_map import initial_layers, layer_map, read_layers
from kd_jax.models.projection import WithProjections, needs_projection
from kd_jax.steps.distill import DistillSettings
from kd_jax.steps.teacher_logits import TeacherForm
from kd_jax.trainer.state import with_shardings
from kd_jax.types import Params

KEY = "teacher_checkpoint"


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher: the directory of its run, its model, how it is sharded, and, where the student's vocabulary is
    a trimmed one, `kept` int32 [student tokens], the teacher's id of each token."""

    workdir: str
    model: Functional
    rules: Rules
    kept: np.ndarray | None

    def params(self, mesh: jax.sharding.Mesh) -> Params:
        return trained.trained_params(self.workdir, self.model, mesh, rules=self.rules)

    def constants(self) -> dict[str, Any]:
        """What the step reads of any teacher, in the loop or cached."""
        return {} if self.kept is None else {"kept": self.kept}


def find_teachers(names: str, prepared: Prepared, compute_dtype: str, rules: Rules) -> list[Teacher]:
    """The teachers of config.teacher_checkpoint, joined by commas; their tokenizers are compared with the student's."""
    workdirs = [name.strip() for name in names.split(",") if name.strip()]
    require(bool(workdirs), KEY, "it is empty", "give the workdir of a pretrain run")
    full = prepared.full if isinstance(prepared, TrimmedPrepared) else prepared
    teachers = []
    for workdir in workdirs:
        block = trained.encoder_block(workdir, KEY)
        same = trained.tokenizer_fingerprint(workdir) == prepared.tokenizer.fingerprint
        if not same:
            trained.check_tokenizer(workdir, full, KEY)
        model = encoder_model(block, prepared if same else full, compute_dtype, "teacher")
        teachers.append(Teacher(workdir, model, rules, None if same else kept_ids(prepared)))
    mixed = len({teacher.kept is None for teacher in teachers}) > 1
    require(not mixed, KEY, "some teachers have the trimmed vocabulary and some the full one", "use one or the other")
    return teachers


@dataclass(frozen=True)
class TeacherSide:
    """Where a student's targets come from.

    phases: from which step on, which teachers are in the loop, and the constants that the step then reads.
    batches(transfer_set): rows masked here, or rows from a cache with the teacher's predictions.
    form: how the predictions reach the loss. shape: the (first) teacher's, None where no inner states are to be had.
    tables: the sharding of what is frozen, as lines.
    """

    form: TeacherForm
    phases: tuple[tuple[int, tuple[Functional, ...], Callable[[], Mapping[str, Any]]], ...]
    batches: Callable[[TransferSet], MaskedBatches | CachedBatches]
    shape: EncoderConfig | None
    tables: tuple[str, ...]


def in_the_loop(
    teachers: list[Teacher], distill: Distill, masking: Masking, form: TeacherForm, prepared: Prepared, mesh
) -> TeacherSide:
    """Teachers that predict every batch: all averaged, or one after the other."""

    def phase(start: int, chosen: list[Teacher]):
        def constants() -> dict[str, Any]:
            return {"teachers": tuple(one.params(mesh) for one in chosen), **chosen[0].constants()}

        return start, tuple(one.model for one in chosen), constants

    def batches(transfer_set: TransferSet) -> MaskedBatches:
        kept = teachers[0].kept
        return MaskedBatches(transfer_set.stores, transfer_set, masking, prepared.tokenizer, distill.batch_size, kept)

    phases = tuple(
        phase(start, [teachers[number] for number in numbers]) for start, numbers in schedule(distill, len(teachers))
    )
    return TeacherSide(form, phases, batches, teachers[0].model.config, tuple(teacher_tables(teachers, mesh)))


def placed_shapes(teacher: Teacher, mesh: jax.sharding.Mesh) -> Params:
    """A teacher's parameters as shapes with shardings."""
    return with_shardings(teacher.model.abstract(), model_layout(teacher.model, mesh, teacher.rules))


def teacher_tables(teachers: list[Teacher], mesh: jax.sharding.Mesh) -> list[str]:
    """The sharding table of the teachers' parameters."""
    return [line for one in teachers for line in sharding_lines(placed_shapes(one, mesh), "teacher, frozen:")]


def schedule(distill: Distill, count: int) -> list[tuple[int, tuple[int, ...]]]:
    """(start step, teachers by number) of each phase: all averaged, or one after the other."""
    steps = tuple(int(step) for step in distill.teacher_steps)
    if not steps:
        return [(0, tuple(range(count)))]
    key = "distill.teacher_steps"
    require(len(steps) == count, key, f"{len(steps)} steps for {count} teachers", "give one for each teacher")
    ascending = steps[0] == 0 and all(one < other for one, other in itertools.pairwise(steps))
    require(ascending, key, f"{steps} do not ascend from 0", "give the step from which each teacher is used")
    require(steps[-1] < distill.steps, key, f"step {steps[-1]} is never reached", "lower it or raise the steps")
    return [(step, (number,)) for number, step in enumerate(steps)]


def teacher_form(vocabulary: Vocabulary, prepared: Prepared, kind: str = "hidden", **more: Any) -> TeacherForm:
    """The form of the teacher's predictions for a student's vocabulary."""
    return TeacherForm(kind, dropped=vocabulary.dropped, unknown=int(prepared.tokenizer.unk_id or 0), **more)


def check(distill: Distill, execution: Execution, checkpoints: str, cache: str) -> None:
    """Refuses, before anything is read, settings of several blocks that exclude each other. Raises UserError."""
    features, masked = distill.features, distill.kd_positions == "masked"
    few = not execution.sharding.teacher_once or (not features and masked)
    problem = "states at all positions would have to be kept for the whole batch"
    require(few, "sharding.teacher_once", problem, "set it to False, or take the logits at masked positions alone")
    several = "," in checkpoints
    averaged = several and not distill.teacher_steps and features
    key = f"distill.{(features or ['hidden'])[0]}"
    require(not averaged, key, "it needs one teacher, not an average", "set its weight to 0")
    if cache:
        problem = f"it has no {', '.join(features)}"
        require(not features, "teacher_cache", problem, "leave it empty, or set those weights to 0")
        require(masked, "teacher_cache", "it has masked positions only", "leave it empty")
        remedy = "name that teacher alone, or leave it empty"
        require(not several, "teacher_cache", "it holds one teacher's predictions", remedy)
        require(distill.init == "random", "distill.init", "from a cache no teacher is loaded", "use random")


def step_settings(
    distill: Distill, student: Functional, teacher: EncoderConfig | None, form: TeacherForm, once: bool = False
) -> tuple[DistillSettings, WithProjections]:
    """The loss as the step computes it, and the student with the projections that its terms need.

    teacher: the shape of the (first) teacher; None where only the terms on logits are used. Raises UserError for layer
    maps, relation heads and projections that the two shapes do not allow.
    """
    shape = student.config
    layers: dict[str, Any] = {}
    projections: list[tuple[str, int, int]] = []
    if teacher is not None:
        widths = (shape.hidden_size, teacher.hidden_size)

        def layers_of(name: str, written: str) -> tuple[tuple[int, int], ...]:
            key = f"distill.{name}.layers"
            return layer_map(read_layers(written, key), shape.num_layers, teacher.num_layers, key)

        hidden, embeddings, relations = distill.hidden, distill.embeddings, distill.relations
        if hidden.used:
            layers["hidden_layers"] = layers_of("hidden", hidden.layers)
            if needs_projection(hidden.projection, *widths, "distill.hidden.projection"):
                projections += [(f"hidden_{number}", *widths) for number in range(len(layers["hidden_layers"]))]
        if embeddings.used and needs_projection(embeddings.projection, *widths, "distill.embeddings.projection"):
            projections.append(("embeddings", *widths))
        if relations.used:
            layers["relation_layers"] = layers_of("relations", relations.layers)
            layers["relation_heads"] = relations.heads or shape.num_heads
            check_relation_heads(layers["relation_heads"], *widths, "distill.relations.heads")
    loss = {one.name: getattr(distill, one.name) for one in fields(Loss)}
    settings = DistillSettings(**loss, **layers, once=once and distill.kl.used, form=form)
    moving = distill.kl.temperature != distill.kl.last_temperature
    fixed = not (form.cached and moving and form.kind != "hidden")
    remedy = "set it to 0, or write the cache with cache.format=hidden"
    require(fixed, "distill.kl.final_temperature", f"a {form.kind} cache is for one temperature", remedy)
    return settings, WithProjections(student, tuple(projections))


def initialization(
    distill: Distill, model: WithProjections, teacher: Teacher, mesh: jax.sharding.Mesh
) -> tuple[Callable[[Params], Params], list[str]]:
    """distill.init=teacher: (drawn parameters -> parameters that start from layers of the teacher, remarks on it)."""
    student, key = model.student, "distill.init_layers"
    layers = initial_layers(
        read_layers(distill.init_layers, key), student.config.num_layers, teacher.model.config.num_layers, key
    )
    check_shapes(student.config, teacher.model.config, teacher.kept)

    def init(params: Params) -> Params:
        start = (teacher.model, teacher.params(mesh), layers, teacher.kept)
        return {**params, **from_teacher(student, model.student_params(params), *start)}

    return init, list(remarks(student.config, teacher.model.config, layers))


def check_shapes_of(distill: Distill, student: EncoderConfig, teacher: EncoderConfig, trimmed: bool) -> None:
    """Refuses, before a teacher is trained, shapes of student and teacher that config.distill does not allow."""
    step_settings(distill, Functional("mlm", student), teacher, TeacherForm())
    if distill.init == "teacher":
        key = "distill.init_layers"
        initial_layers(read_layers(distill.init_layers, key), student.num_layers, teacher.num_layers, key)
        check_shapes(student, teacher, np.zeros(1, np.int32) if trimmed else None)
