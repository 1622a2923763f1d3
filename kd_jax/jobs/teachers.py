"""The teachers that config.teacher_checkpoint names, and the settings of distilling from them."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import FEATURE_TERMS, require
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import TrimmedPrepared, kept_ids
from kd_jax.jobs import masked_lm, trained
from kd_jax.losses.features import check_relation_heads
from kd_jax.models.encoder_config import EncoderConfig, encoder_config
from kd_jax.models.functional import Functional
from kd_jax.models.initialization import check_shapes
from kd_jax.models.layer_map import initial_layers, layer_map, read_layers
from kd_jax.models.projection import WithProjections, needs_projection
from kd_jax.steps.distill import DistillSettings, Weight
from kd_jax.steps.teacher_logits import TeacherForm
from kd_jax.trainer.mesh import Rules, rules_of

TERMS = ("kl", "mlm", *FEATURE_TERMS)
KEY = "teacher_checkpoint"


@dataclass(frozen=True)
class Teacher:
    """One teacher: the directory of its run, its model, whether its vocabulary is the student's own, and the rules by
    which it lies on a mesh."""

    workdir: str
    model: Functional
    same_vocabulary: bool
    rules: Rules

    def params(self, mesh) -> Any:
        return trained.trained_params(self.workdir, self.model, mesh, rules=self.rules)


def find_teachers(config: ConfigDict, prepared: Prepared) -> list[Teacher]:
    """The teachers of config.teacher_checkpoint, whose tokenizers are compared with the student's."""
    workdirs = [name.strip() for name in config.teacher_checkpoint.split(",") if name.strip()]
    require(bool(workdirs), KEY, "it is empty", "give the workdir of a pretrain run")
    full = prepared.full if isinstance(prepared, TrimmedPrepared) else prepared
    teachers = []
    for workdir in workdirs:
        block = trained.encoder_block(workdir, KEY)
        same = trained.tokenizer_fingerprint(workdir) == prepared.tokenizer.fingerprint
        if not same:
            trained.check_tokenizer(workdir, full, KEY)
        model = masked_lm.encoder_model(block, prepared if same else full, config.compute_dtype, "teacher")
        teachers.append(Teacher(workdir, model, same, rules_of(config.sharding.teacher, "sharding.teacher")))
    mixed = len({teacher.same_vocabulary for teacher in teachers}) > 1
    require(not mixed, KEY, "some teachers have the trimmed vocabulary and some the full one", "use one or the other")
    return teachers


def kept_of(prepared: Prepared, teacher: Teacher) -> np.ndarray | None:
    """int32 [student pieces]: the teacher's id of each, or None where the two vocabularies are one."""
    return None if teacher.same_vocabulary else kept_ids(prepared)


def weight(config: ConfigDict, name: str) -> Weight:
    """The schedule of a term's weight. Raises UserError for what makes no sense."""
    block, key = config.distill[name], f"distill.{name}"
    require(block.weight >= 0, f"{key}.weight", f"{block.weight} is negative", "give 0 or more")
    ordered = 0 <= block.begin <= block.end <= 1
    require(ordered, f"{key}.begin", f"{block.begin} to {block.end} is no span of progress", "0 <= begin <= end <= 1")
    end = block.final_weight if block.final_weight >= 0 else block.weight
    return Weight(float(block.weight), float(end), float(block.begin), float(block.end))


def check_settings(config: ConfigDict) -> None:
    """Refuses impossible distillation settings before anything is read."""
    block = config.distill
    weights = {name: weight(config, name) for name in TERMS}
    some = any(one.used for one in weights.values())
    require(some, "distill", "every term has weight 0", "give kl, mlm, hidden, embeddings or relations a weight")
    kl = block.kl
    require(kl.temperature > 0, "distill.kl.temperature", f"{kl.temperature} is not positive", "2.0 is usual")
    final = kl.final_temperature
    require(final >= 0, "distill.kl.final_temperature", f"{final} is negative", "0 keeps the temperature")
    known = block.kd_positions in ("masked", "all")
    require(known, "distill.kd_positions", f"{block.kd_positions!r} is unknown", "use masked or all")
    for name in ("hidden", "embeddings"):
        distance = block[name].distance
        known = distance in ("cosine", "mse")
        require(known, f"distill.{name}.distance", f"{distance!r} is unknown", "use cosine or mse")
    for part in block.relations.parts:
        known = part in ("query", "key", "value")
        require(known, "distill.relations.parts", f"{part!r} is unknown", "use query, key and value")
    require(bool(block.relations.parts), "distill.relations.parts", "it is empty", "use query, key and value")
    require(block.init in ("random", "teacher"), "distill.init", f"{block.init!r} is unknown", "use random or teacher")
    require(block.block_positions >= 0, "distill.block_positions", f"{block.block_positions} is negative", "0 chooses")
    features = [name for name in FEATURE_TERMS if weights[name].used]
    few = not config.sharding.teacher_once or (not features and block.kd_positions == "masked")
    problem = "states at all positions would have to be kept for the whole batch"
    require(few, "sharding.teacher_once", problem, "set it to False, or take the logits at masked positions alone")
    several = "," in config.teacher_checkpoint and not block.teacher_steps
    one = not (several and features)
    require(
        one, f"distill.{(features or ['hidden'])[0]}", "it needs one teacher, not an average", "set its weight to 0"
    )
    if config.teacher_cache:
        serves = not features
        require(
            serves, "teacher_cache", f"it has no {', '.join(features)}", "leave it empty, or set those weights to 0"
        )
        require(block.kd_positions == "masked", "teacher_cache", "it has masked positions only", "leave it empty")
        alone = "," not in config.teacher_checkpoint
        require(
            alone, "teacher_cache", "it holds one teacher's predictions", "name that teacher alone, or leave it empty"
        )
        require(block.init == "random", "distill.init", "from a cache no teacher is loaded", "use random")


def settings_for(
    config: ConfigDict, student: Functional, teacher: EncoderConfig | None, form: TeacherForm, *, cached: bool
) -> tuple[DistillSettings, WithProjections]:
    """What shapes the step, and the student with the projections that its terms need.

    teacher: the shape of the (first) teacher; None where no term but those on logits is used.
    """
    block = config.distill
    weights = {name: weight(config, name) for name in TERMS}
    shape = student.config
    hidden_layers, relation_layers, heads = (), (), 1
    projections: list[tuple[str, int, int]] = []
    if teacher is not None:
        widths = (shape.hidden_size, teacher.hidden_size)
        depths = (shape.num_layers, teacher.num_layers)

        def layers_of(name: str) -> tuple[tuple[int, int], ...]:
            key = f"distill.{name}.layers"
            return layer_map(read_layers(block[name].layers, key), *depths, key)

        if weights["hidden"].used:
            hidden_layers = layers_of("hidden")
            if needs_projection(block.hidden.projection, *widths, "distill.hidden.projection"):
                projections += [(f"hidden_{number}", *widths) for number in range(len(hidden_layers))]
        if weights["embeddings"].used and needs_projection(
            block.embeddings.projection, *widths, "distill.embeddings.projection"
        ):
            projections.append(("embeddings", *widths))
        if weights["relations"].used:
            relation_layers = layers_of("relations")
            heads = block.relations.heads or shape.num_heads
            check_relation_heads(heads, *widths, "distill.relations.heads")
    settings = DistillSettings(
        **weights,
        temperature=float(block.kl.temperature),
        final_temperature=float(block.kl.final_temperature or block.kl.temperature),
        kd_positions=block.kd_positions,
        hidden_distance=block.hidden.distance,
        hidden_layers=hidden_layers,
        embeddings_distance=block.embeddings.distance,
        relation_heads=heads,
        relation_layers=relation_layers,
        relation_parts=tuple(block.relations.parts),
        block=block.block_positions,
        once=bool(config.sharding.teacher_once) and not cached and weights["kl"].used,
        form=form,
    )
    moving = settings.temperature != settings.final_temperature
    fixed = not (cached and moving and form.kind != "hidden")
    problem = f"a {form.kind} cache is for one temperature"
    require(fixed, "distill.kl.final_temperature", problem, "set it to 0, or write the cache with cache.format=hidden")
    return settings, WithProjections(student, tuple(projections))


def check_shapes_of(config: ConfigDict) -> None:
    """Refuses, before a teacher is trained, what config.teacher, student and distill do not allow together."""
    student, teacher = (encoder_config(config[name].to_dict(), 1) for name in ("student", "teacher"))
    settings_for(config, Functional("mlm", student), teacher, TeacherForm(), cached=False)
    if config.distill.init == "teacher":
        key = "distill.init_layers"
        layers = read_layers(config.distill.init_layers, key)
        initial_layers(layers, student.num_layers, teacher.num_layers, key)
        trimmed = np.zeros(1, np.int32) if config.vocabulary.trim else None
        check_shapes(student, teacher, trimmed)


def phases_of(config: ConfigDict, count: int) -> list[tuple[int, tuple[int, ...]]]:
    """(start step, teachers by number) of each phase: all averaged, or one after the other."""
    steps = tuple(int(step) for step in config.distill.teacher_steps)
    if not steps:
        return [(0, tuple(range(count)))]
    key = "distill.teacher_steps"
    require(len(steps) == count, key, f"{len(steps)} steps for {count} teachers", "give one for each teacher")
    ascending = steps[0] == 0 and all(one < other for one, other in itertools.pairwise(steps))
    require(ascending, key, f"{steps} do not ascend from 0", "give the step from which each teacher is used")
    require(steps[-1] < config.distill.steps, key, f"step {steps[-1]} is never reached", "lower it or raise the steps")
    return [(step, (number,)) for number, step in enumerate(steps)]


def teacher_form(config: ConfigDict, prepared: Prepared, kind: str = "hidden", tail: Any = "bucket") -> TeacherForm:
    """How the teacher's side reaches the loss."""
    return TeacherForm(kind, tail, config.vocabulary.dropped, int(prepared.tokenizer.unk_id or 0))
