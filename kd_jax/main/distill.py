"""Distillation of a student from a pretrained teacher over a mix of generic and task-specific text.

python -m kd_jax.main.distill --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.teacher_checkpoint=DIR [--config.teacher_cache=DIR]
"""

import pathlib
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.data.prepared import Prepared
from kd_jax.data.teacher_cache import CachedBatches, TeacherCache
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import cache as cache_job
from kd_jax.jobs import masked_lm
from kd_jax.jobs.frozen import Frozen, placed
from kd_jax.jobs.job import JobPhase
from kd_jax.jobs.teachers import (
    KEY,
    Teacher,
    check_settings,
    find_teachers,
    kept_of,
    phases_of,
    settings_for,
    teacher_form,
)
from kd_jax.main import command
from kd_jax.models.functional import Functional
from kd_jax.models.initialization import check_shapes, from_teacher, remarks
from kd_jax.models.layer_map import initial_layers, read_layers
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import DistillSettings, make_cached_objective, make_distill_objective
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import Params


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    del config
    who = (KEY, "teacher_cache")
    return ("prepared", "seed", "transfer", "masking", "student", "vocabulary", *who, "distill", "compute_dtype")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Trains config.student against the teachers of config.teacher_checkpoint, or their cached predictions."""
    check_settings(config)
    prepared = seen_by_student(Prepared(config.prepared), config.vocabulary)
    mesh = make_mesh(config.mesh)
    student = masked_lm.encoder_model(config.student, prepared, config.compute_dtype, "student")
    if config.teacher_cache:
        from_cache(config, workdir, prepared, mesh, student)
        return
    teachers = find_teachers(config, prepared)
    settings, model = settings_for(
        config, student, teachers[0].model.config, teacher_form(config, prepared), cached=False
    )
    phases = tuple(
        JobPhase(
            start,
            make_distill_objective,
            (model, tuple(teachers[number].model for number in numbers), settings),
            lambda numbers=numbers: frozen_teachers([teachers[number] for number in numbers], prepared, mesh),
            Frozen(teachers=tuple(teachers[number].model for number in numbers), whole=kept_entry(prepared, teachers)),
        )
        for start, numbers in phases_of(config, len(teachers))
    )
    more: dict[str, Any] = {}
    if config.distill.init == "teacher":
        first, depth = teachers[0], student.config.num_layers
        key = "distill.init_layers"
        spec = read_layers(config.distill.init_layers, key)
        layers = initial_layers(spec, depth, first.model.config.num_layers, key)
        check_shapes(student.config, first.model.config, kept_of(prepared, first))

        def init(params: Params) -> Params:
            start = (first.model, first.params(mesh), layers, kept_of(prepared, first))
            return {**params, **from_teacher(student, model.student_params(params), *start)}

        more = {"init": init, "remarks": remarks(student.config, first.model.config, layers)}
    train(config, workdir, prepared, mesh, model, settings, phases, **more)


def kept_entry(prepared: Prepared, teachers: list[Teacher]) -> tuple[str, ...]:
    """The name of the entry that says which pieces a trimmed vocabulary has, if it is one."""
    return () if kept_of(prepared, teachers[0]) is None else ("kept",)


def frozen_teachers(teachers: list[Teacher], prepared: Prepared, mesh) -> dict[str, Any]:
    """What the step reads of the teachers of one phase, placed on the mesh."""
    kept = kept_of(prepared, teachers[0])
    return {
        "teachers": tuple(teacher.params(mesh) for teacher in teachers),
        **({} if kept is None else {"kept": kept}),
    }


def from_cache(config: ConfigDict, workdir: pathlib.Path, prepared: Prepared, mesh, student: Functional) -> None:
    """Trains from the predictions that cache_teacher wrote; no teacher is in memory."""
    cache = TeacherCache(config.teacher_cache)
    teacher = find_teachers(config, prepared)[0]
    cache.check(cache_job.identity(config, prepared, teacher, cache.identity["form"]))
    form = cache.identity["form"]
    shape = teacher_form(config, prepared, form["format"], form["tail"])
    settings, model = settings_for(config, student, None, shape, cached=True)
    if form["format"] != "hidden":
        same = settings.temperature == form["temperature"]
        problem = f"{config.teacher_cache} was written at temperature {form['temperature']}, not {settings.temperature}"
        require(same, "distill.kl.temperature", problem, "go back to it, or write another cache")

    hidden = form["format"] == "hidden"
    reads = Frozen(decoder=teacher.model if hidden else None, whole=kept_entry(prepared, [teacher]))

    def frozen() -> dict[str, Any]:
        kept = kept_of(prepared, teacher)
        found: dict[str, Any] = {} if kept is None else {"kept": kept}
        if reads.decoder is not None:
            layout = reads.layout(mesh, teacher.rules)["decoder"]
            parts = (cache.attached(name) for name in cache_job.DECODER)
            found["decoder"] = tuple(
                None if values is None else placed(values, where) for values, where in zip(parts, layout, strict=True)
            )
        return found

    def batches(transfer_set, block):
        return CachedBatches(cache, transfer_set, config.masking, block.batch_size, block.steps)

    phases = (JobPhase(0, make_cached_objective, (model, settings), frozen, reads),)
    train(config, workdir, prepared, mesh, model, settings, phases, batches=batches)


def train(
    config: ConfigDict,
    workdir: pathlib.Path,
    prepared: Prepared,
    mesh,
    model: WithProjections,
    settings: DistillSettings,
    phases: tuple[JobPhase, ...],
    remarks: tuple[str, ...] = (),
    **more: Any,
) -> None:
    """Runs the job and says in run.json which terms it had."""
    used = {name: [weight.start, weight.end] for name, weight in settings.used().items()}
    masked_lm.train(
        config,
        workdir,
        prepared,
        mesh,
        command="distill",
        keys=keys(config),
        model=model,
        phases=phases,
        notes={"terms": used, "projections": [list(one) for one in model.projections], "remarks": remarks},
        **more,
    )


if __name__ == "__main__":
    command.main(run, description="Distills a student from a teacher.")
