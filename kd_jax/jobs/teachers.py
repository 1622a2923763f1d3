"""The teachers of a distillation run, in the loop or as cached predictions, and the loss against them."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from kd_jax.config import require
from kd_jax.config.data import Masking, Vocabulary
from kd_jax.config.execution import Execution, Rules
from kd_jax.config.training import STATE_TERMS, Distill, Loss
from kd_jax.data.batches import CleanBatches, MaskedBatches, process_slice
from kd_jax.data.prepared import Prepared
from kd_jax.data.teacher_cache import CachedBatches
from kd_jax.data.teacher_states import StateBatches
from kd_jax.data.transfer_set import TransferSet
from kd_jax.data.vocabulary import TrimmedPrepared, kept_ids, train_counts
from kd_jax.jobs import trained
from kd_jax.jobs.job import model_layout, sharding_lines
from kd_jax.jobs.masked_lm import encoder_model
from kd_jax.losses.features import check_relation_heads
from kd_jax.models.attention_kernels import PLAIN, Kernel
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.initialization import check_shapes, check_table, from_teacher, principal_table, remarks
from kd_jax.models.layer_map import initial_layers, layer_map, read_layers
from kd_jax.models.projection import WithProjections, needs_projection
from kd_jax.runtime.files import read_json
from kd_jax.runtime.paths import as_path
from kd_jax.runtime.preemption import interruptible
from kd_jax.steps.distill import DistillSettings
from kd_jax.steps.teacher_logits import TeacherForm
from kd_jax.trainer.mesh import gathered, global_batch, placed, process_share, row_multiple
from kd_jax.trainer.state import with_shardings
from kd_jax.types import Batch, Params

KEY = "teacher_checkpoint"
TOKENS_AT_A_TIME = 1024  # batch size, when a teacher reads tokens alone for a student's token table


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

    def token_table(self, mesh: jax.sharding.Mesh) -> jax.Array:
        """Its token table [V, H]; the other parameters do not stay in memory."""
        found = trained.trained_params(self.workdir, self.model, mesh, "encoder", self.rules)
        return found["encoder"]["embeddings"]["tokens"]

    def token_states(self, mesh: jax.sharding.Mesh, prepared: Prepared) -> np.ndarray:
        """float32 [student tokens, H]: its mean state of each token, read alone between the special ones."""
        full = prepared.full if isinstance(prepared, TrimmedPrepared) and self.kept is not None else prepared
        ids = np.arange(self.model.config.vocab_size) if self.kept is None else self.kept
        params, means = self.params(mesh), jax.jit(functools.partial(_mean_states, self.model))
        rows = math.lcm(TOKENS_AT_A_TIME, row_multiple(mesh))
        mine = slice(*process_slice(rows, *process_share(mesh)))
        found = np.empty((len(ids), self.model.config.hidden_size), np.float32)
        for start in interruptible(range(0, len(ids), rows), "the teacher's states of its tokens"):
            some = ids[start : start + rows]
            tokens = np.full((rows, 3), full.tokenizer.cls_id, np.int32)
            tokens[: len(some), 1], tokens[:, 2] = some, full.tokenizer.sep_id
            batch = {
                "tokens": tokens,
                "segment_ids": np.ones_like(tokens),
                "positions": np.zeros_like(tokens) + np.arange(3),
            }
            local = {name: values[mine] for name, values in batch.items()}
            found[start : start + rows] = gathered(means(params, global_batch(mesh, local)))[: len(some)]
        return found

    def constants(self) -> dict[str, Any]:
        """What the step reads of any teacher, in the loop or cached."""
        return {} if self.kept is None else {"kept": self.kept}


def _mean_states(model: Functional, params: Params, batch: Batch) -> jax.Array:
    return jnp.mean(model.hidden(params, batch), axis=1, dtype=jnp.float32)


def find_teachers(
    names: str,
    prepared: Prepared,
    compute_dtype: str,
    rules: Rules,
    any_tokenizer: bool = False,
    attention: Kernel = PLAIN,
) -> list[Teacher]:
    """The teachers of config.teacher_checkpoint, joined by commas.

    Raises UserError if a tokenizer differs from the student's, unless only cached means of their states are used.
    """
    workdirs = [name.strip() for name in names.split(",") if name.strip()]
    require(bool(workdirs), KEY, "it is empty", "give the workdir of a pretrain run")
    full = prepared.full if isinstance(prepared, TrimmedPrepared) else prepared
    teachers = []
    for workdir in workdirs:
        block = trained.encoder_block(workdir, KEY)
        same = trained.tokenizer_fingerprint(workdir) == prepared.tokenizer.fingerprint
        seen = prepared if same else full
        if not same and any_tokenizer and trained.tokenizer_fingerprint(workdir) != full.tokenizer.fingerprint:
            same, seen = True, trained.own_prepared(workdir, KEY)
        trained.check_tokenizer(workdir, seen, KEY)
        model = encoder_model(block, seen, compute_dtype, "teacher", attention)
        teachers.append(Teacher(workdir, model, rules, None if same else kept_ids(prepared)))
    mixed = len({teacher.kept is None for teacher in teachers}) > 1
    require(not mixed, KEY, "some teachers have the trimmed vocabulary and some the full one", "use one or the other")
    return teachers


def check_heads(teachers: list[Teacher], key: str) -> None:
    """Raises UserError for a teacher that was imported without a masked-LM head; config.<key> needs its predictions."""
    for one in teachers:
        drawn = read_json(as_path(one.workdir) / "run.json").get("masked_lm_head") == "new"
        problem = f"{one.workdir} was imported without a masked-LM head, so it predicts nothing"
        remedy = "train one first (pretrain with config.pretrain.init_from and config.train_body=False), or distill "
        require(not drawn, key, problem, f"{remedy}inner states alone (config.distill.kl.weight=0)")


@dataclass(frozen=True)
class TeacherSide:
    """Where a student's targets come from.

    phases: from which step on, which teachers are in the loop, and the constants that the step then reads.
    batches(transfer_set): rows masked here, or rows from a cache with the teacher's predictions.
    form: how the predictions reach the loss. shape: the (first) teacher's; None if there are no inner states. tables:
    the sharding of frozen parameters, as lines. width: of its states if they are reduced; 0 means the shape's.
    """

    form: TeacherForm
    phases: tuple[tuple[int, tuple[Functional, ...], Callable[[], Mapping[str, Any]]], ...]
    batches: Callable[[TransferSet], MaskedBatches | CleanBatches | CachedBatches | StateBatches]
    shape: EncoderConfig | None
    tables: tuple[str, ...]
    width: int = 0


def in_the_loop(
    teachers: list[Teacher], distill: Distill, masking: Masking, form: TeacherForm, prepared: Prepared, mesh
) -> TeacherSide:
    """Teachers in memory that predict every batch: averaged, or one after the other. Raises UserError."""
    remedy = "name one in config.teacher_cache, or set it to False"
    require(not distill.center, "distill.center", "the mean is that of a cache of states", remedy)

    def phase(start: int, chosen: list[Teacher]):
        def constants() -> dict[str, Any]:
            return {"teachers": tuple(one.params(mesh) for one in chosen), **chosen[0].constants()}

        return start, tuple(one.model for one in chosen), constants

    def batches(transfer_set: TransferSet) -> MaskedBatches | CleanBatches:
        kept = teachers[0].kept
        if distill.clean:
            return CleanBatches(transfer_set, prepared.tokenizer, distill.batch_size, full=kept is not None)
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
        lacking = [name for name in features if not (distill.clean and name in STATE_TERMS)]
        remedy = "leave it empty, or set those weights to 0"
        if not distill.clean:
            remedy += ", or take states of unmasked text (config.distill.clean, cache_states)"
        require(not lacking, "teacher_cache", f"it has no {', '.join(lacking)}", remedy)
        require(masked or distill.clean, "teacher_cache", "it has masked positions only", "leave it empty")
        remedy = "name that teacher alone, or leave it empty"
        require(not several, "teacher_cache", "it holds one teacher's predictions", remedy)


def step_settings(
    distill: Distill,
    student: Functional,
    teacher: EncoderConfig | None,
    form: TeacherForm,
    once: bool = False,
    width: int = 0,
    fused: bool = False,
) -> tuple[DistillSettings, WithProjections]:
    """The loss as the step computes it, and the student with the projections that its terms need.

    teacher: the shape of the (first) teacher; None if only the terms on logits are used. width: of the teacher's states
    if a cache has reduced them; 0 means the shape's. fused: as in DistillSettings. Raises UserError for layer maps,
    relation heads and projections that the two shapes do not allow.
    """
    shape = student.config
    layers: dict[str, Any] = {}
    projections: list[tuple[str, int, int]] = []
    if teacher is not None:
        widths = (shape.hidden_size, width or teacher.hidden_size)
        hidden, embeddings, relations = distill.hidden, distill.embeddings, distill.relations
        if hidden.used:
            layers["hidden_layers"] = layers_of("hidden", hidden.layers, shape, teacher)
            if needs_projection(hidden.projection, *widths, "distill.hidden.projection"):
                projections += [(f"hidden_{number}", *widths) for number in range(len(layers["hidden_layers"]))]
        if embeddings.used and needs_projection(embeddings.projection, *widths, "distill.embeddings.projection"):
            projections.append(("embeddings", *widths))
        if relations.used:
            layers["relation_layers"] = layers_of("relations", relations.layers, shape, teacher)
            layers["relation_heads"] = relations.heads or shape.num_heads
            check_relation_heads(layers["relation_heads"], *widths, "distill.relations.heads")
        sentence = distill.sentence
        if sentence.used and needs_projection(sentence.projection, *widths, "distill.sentence.projection"):
            projections.append(("sentence", *widths))
    loss = {one.name: getattr(distill, one.name) for one in fields(Loss)}
    settings = DistillSettings(**loss, **layers, once=once and distill.kl.used, fused=fused, form=form)
    moving = distill.kl.temperature != distill.kl.last_temperature
    fixed = not (form.cached and moving and form.kind != "hidden")
    remedy = "set it to 0, or write the cache with cache.format=hidden"
    require(fixed, "distill.kl.final_temperature", f"a {form.kind} cache is for one temperature", remedy)
    return settings, WithProjections(student, tuple(projections))


def layers_of(term: str, written: str, student: EncoderConfig, teacher: EncoderConfig) -> tuple[tuple[int, int], ...]:
    """config.distill.<term>.layers as pairs (student's layer, teacher's layer). Raises UserError."""
    key = f"distill.{term}.layers"
    return layer_map(read_layers(written, key), student.num_layers, teacher.num_layers, key)


def initialization(
    distill: Distill, model: WithProjections, teacher: Teacher, prepared: Prepared, mesh: jax.sharding.Mesh
) -> tuple[Callable[[Params], Params], list[str]]:
    """distill.init=teacher: (drawn parameters -> parameters that start from the teacher, remarks about it)."""
    student, shape = model.student, teacher.model.config
    layers = layers_to_copy(distill, student.config, shape)
    if layers:
        check_shapes(student.config, shape, teacher.kept)
    else:
        check_table(student.config, shape, teacher.kept)

    def from_layers(params: Params) -> Params:
        start = (teacher.model, teacher.params(mesh), layers, teacher.kept)
        return {**params, **from_teacher(student, model.student_params(params), *start)}

    def from_table(params: Params) -> Params:
        if distill.table_from == "states":
            table = teacher.token_states(mesh, prepared)
        else:
            table = gathered(teacher.token_table(mesh))
            table = table if teacher.kept is None else table[teacher.kept]
        drawn = params["encoder"]["embeddings"]["tokens"]
        size = student.config.initializer_range * distill.table_scale
        values, kept = principal_table(table, train_counts(prepared), student.config.hidden_size, size)
        if student.config.hidden_size > shape.hidden_size:
            values = np.where(np.arange(values.shape[1]) < shape.hidden_size, values, gathered(drawn))
        if jax.process_index() == 0:
            print(f"The student's token table keeps {kept:.0%} of the variance of its teacher's {distill.table_from}.")
        # The same bits on every device, even if the hosts' libraries differ.
        values = np.asarray(multihost_utils.broadcast_one_to_all(values))
        encoder = params["encoder"]
        embeddings = {**encoder["embeddings"], "tokens": placed(values, drawn.sharding)}
        return {**params, "encoder": {**encoder, "embeddings": embeddings}}

    if layers:
        return from_layers, list(remarks(student.config, shape, layers))
    return from_table, ["only the token table comes from the teacher, reduced to its principal components"]


def layers_to_copy(distill: Distill, student: EncoderConfig, teacher: EncoderConfig) -> tuple[int, ...]:
    """The teacher's layer for each of the student's, by config.distill.init_layers; () means the token table alone, as
    at another width. Raises UserError."""
    key, written = "distill.init_layers", distill.init_layers
    if written == "none":
        return ()
    layers = initial_layers(read_layers(written, key), student.num_layers, teacher.num_layers, key)
    return layers if student.hidden_size == teacher.hidden_size else ()


def check_shapes_of(distill: Distill, student: EncoderConfig, teacher: EncoderConfig, trimmed: bool) -> None:
    """Refuses, before a teacher is trained, shapes of student and teacher that config.distill does not allow."""
    step_settings(distill, Functional("mlm", student), teacher, TeacherForm())
    if distill.init == "teacher" and layers_to_copy(distill, student, teacher):
        check_shapes(student, teacher, np.zeros(1, np.int32) if trimmed else None)
