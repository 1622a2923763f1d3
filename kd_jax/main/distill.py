"""Distillation of a student from a pretrained teacher over a mix of generic and task-specific text.

python -m kd_jax.main.distill --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.teacher_checkpoint=DIR [--config.teacher_cache=DIR]
"""

import pathlib

from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.data import Masking, Transfer, Vocabulary
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.config.training import Distill
from kd_jax.data.batches import PhasedBatches
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import cache, states, teachers
from kd_jax.jobs.job import Job, Phase, train
from kd_jax.jobs.masked_lm import encoder_model, heldout_evaluation, transfer_set_of
from kd_jax.losses.tiling import has_kernels
from kd_jax.main import command
from kd_jax.models.attention_kernels import find_kernel
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import make_distill_objective
from kd_jax.trainer.mesh import make_mesh


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command computes."""
    del config
    who = (teachers.KEY, "teacher_cache")
    return ("prepared", "seed", "transfer", "masking", "student", "vocabulary", *who, "distill", "compute_dtype")


def work(config: ConfigDict, workdir: pathlib.Path) -> command.Work:
    """Trains config.student against the teachers of config.teacher_checkpoint, or their cached predictions."""
    distill, execution = read(Distill, config.distill, "distill"), read_execution(config)
    masking, transfer = read(Masking, config.masking, "masking"), read(Transfer, config.transfer, "transfer")
    vocabulary = read(Vocabulary, config.vocabulary, "vocabulary")
    parts, folders = distill.parts, config.teacher_cache.split(",")
    several = folders == [""] or len(folders) == len(parts)
    problem = f"{len(folders)} caches for {len(parts)} kinds of text (unmasked, masked)"
    require(several, "teacher_cache", problem, "name one; with distill.masked_from that of the states, then the other")
    sources = list(zip(parts, folders * len(parts) if folders == [""] else folders, strict=True))
    for (_, part), folder in sources:
        teachers.check(part, execution, config.teacher_checkpoint, folder)

    prepared = seen_by_student(Prepared(config.prepared), vocabulary)
    mesh = make_mesh(execution.mesh)
    kernel = find_kernel(execution.attention, mesh)
    student = encoder_model(config.student, prepared, config.compute_dtype, "student", kernel)
    # The mean state of a text says nothing about its tokens, so their ids need not be the student's.
    sentences = distill.features == ("sentence",) and not distill.trains_head and distill.init != "teacher"
    rules = execution.sharding.teacher
    found = teachers.find_teachers(
        config.teacher_checkpoint,
        prepared,
        config.compute_dtype,
        rules,
        sentences and distill.clean and bool(config.teacher_cache),
        kernel,
    )
    if distill.kl.used:
        teachers.check_heads(found, "distill.kl.weight")

    def side_of(part: Distill, folder: str) -> teachers.TeacherSide:
        if folder and part.clean:
            return states.cached_states(folder, found[0], part, vocabulary, prepared, student.config)
        if folder:
            return cache.cached_side(folder, found[0], part, masking, vocabulary, prepared, mesh)
        return teachers.in_the_loop(found, part, masking, teachers.teacher_form(vocabulary, prepared), prepared, mesh)

    fused = has_kernels(execution.logits, mesh)
    transfer_set, phases, readers, tables = transfer_set_of(transfer, prepared, config.seed), [], [], []
    model = WithProjections(student)
    for (progress, part), folder in sources:
        side, first = side_of(part, folder), round(progress * distill.steps)
        once = execution.sharding.teacher_once and not side.form.cached
        settings, own = teachers.step_settings(part, student, side.shape, side.form, once, side.width, fused)
        if own.projections:  # only terms on inner states have them
            model = own
        for start, models, constants in side.phases:
            phases.append(Phase(first + start, make_distill_objective(model, models, settings), constants))
        readers.append((first, side.batches(transfer_set)))
        tables += side.tables
    init, remarks = None, []
    if distill.init == "teacher":
        init, remarks = teachers.initialization(distill, model, found[0], prepared, mesh)
    batches = PhasedBatches(readers) if len(readers) > 1 else readers[0][1]
    job = Job(
        settings=distill,
        seed=config.seed,
        model=model,
        phases=tuple(phases),
        batches=batches,
        # An untrained head would be measured at its random initialization.
        evaluate=heldout_evaluation(model, prepared, masking, mesh, distill, workdir, measures=distill.trains_head),
        init=init,
        rules=execution.sharding.student,
        tables=tables,
        notes={
            "tokenizer_fingerprint": prepared.tokenizer.fingerprint,
            "realized": batches.transfer_set.describe(distill.steps * distill.batch_size),
            "terms": {name: [term.weight, term.last] for name, term in distill.used.items()},
            "projections": [list(one) for one in model.projections],
            "remarks": remarks,
        },
    )
    return lambda directory: train(job, directory, mesh, execution)


COMMAND = command.Command("distill", "Distills a student from a teacher.", keys, work)
run = COMMAND.run

if __name__ == "__main__":
    COMMAND.main()
