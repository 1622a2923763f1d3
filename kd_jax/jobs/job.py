"""What every training command does with its batches: compile, resume or start, fit, mark as done."""

import contextlib
import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from kd_jax.config import EXECUTION_KEYS, identity, to_dict
from kd_jax.config.settings import read
from kd_jax.config.training import Training
from kd_jax.data.prepared import Prepared
from kd_jax.jobs.frozen import Frozen, model_layout
from kd_jax.models.functional import Functional, parameter_count
from kd_jax.models.projection import WithProjections
from kd_jax.runtime.watchdog import Watchdog
from kd_jax.steps.objective import Objective
from kd_jax.steps.train_step import make_train_step
from kd_jax.trainer.checkpoint import FOLDER, Checkpoints
from kd_jax.trainer.goodput import Goodput
from kd_jax.trainer.loop import Phase, fit
from kd_jax.trainer.mesh import DEFAULT, Rules, batch_sharding, describe_shardings, rules_of
from kd_jax.trainer.metrics import MetricsWriter
from kd_jax.trainer.optimizer import after_skipped, make_optimizer, make_schedule
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.trainer.state import State, abstract_state, new_state, params_fingerprint, state_shardings
from kd_jax.trainer.weights_and_biases import tracker
from kd_jax.types import Batch, Params

# The keys of a job's block that the compiled step depends on.
STEP_KEYS = (
    *("steps", "accumulation", "learning_rate", "warmup_steps", "schedule", "final_learning_rate"),
    *("weight_decay", "clip_norm", "beta1", "beta2", "epsilon", "skip_non_finite"),
)


class JobPhase(NamedTuple):
    """What is minimized from step `start` on."""

    start: int
    objective: Callable[..., Objective]  # called with `arguments`, which are hashable: equal jobs share one compilation
    arguments: tuple
    frozen: Callable[[], dict[str, Any]]  # what the step reads and never changes: a teacher, class masks
    reads: Frozen = Frozen()  # which entries `frozen` gives, the seed apart


@dataclass(frozen=True)
class Job:
    """One training run, told apart from the trainer by functions."""

    command: str
    block: str  # the config's block with steps, batch size and optimizer
    keys: tuple[str, ...]  # config keys that decide what the run computes
    model: Functional | WithProjections
    phases: tuple["JobPhase", ...]
    batch_at: Callable[[int], Batch]  # this process's rows of a step
    data_fingerprint: str
    evaluate: Callable[[Params, int], dict[str, float]]
    init: Callable[[Params], Params] | None = None  # replaces some or all of the parameters drawn from the seed
    table: str = "student"  # config.sharding.<table> says where what is trained lies
    notes: dict[str, Any] = field(default_factory=dict)  # more for run.json


class Programs(NamedTuple):
    """The compiled functions of a job, and where its state lies."""

    step: Callable  # (state, frozen, batch) -> (state, metrics)
    from_seed: Callable  # seed -> state at step 0
    draw: Callable  # seed -> parameters
    from_params: Callable  # parameters -> state at step 0 with a fresh optimizer
    layout: State
    abstract: State


@functools.cache
def programs(
    objective,
    arguments: tuple,
    model: Functional | WithProjections,
    settings: FrozenConfigDict,
    mesh,
    rules: Rules = DEFAULT,
    frozen: tuple[Frozen, Rules] | None = None,
) -> Programs:
    """Equal arguments give the same functions: a study asks for the same few again and again and compiles them once.

    rules: where the model lies. frozen: the entries of the step's `frozen` and the rules of the teachers in it; None
    takes them as they lie.
    """
    job = ConfigDict(settings)
    optimizer, schedule = make_optimizer(job), make_schedule(job)
    step = make_train_step(
        objective(*arguments),
        optimizer,
        schedule,
        steps=job.steps,
        accumulation=job.accumulation,
        skipped=after_skipped if job.skip_non_finite else None,
    )
    shapes = model.abstract()
    layout = state_shardings(shapes, optimizer, model_layout(model, mesh, rules))
    inputs = (layout, None if frozen is None else frozen[0].layout(mesh, frozen[1]), batch_sharding(mesh))

    def on_mesh(state, frozen, batch):
        # The losses ask for the mesh, to keep what they sum over rows on its devices until the end.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(state, frozen, batch)

    def draw(seed):
        return model.init(jax.random.key(seed))

    return Programs(
        step=jax.jit(on_mesh, donate_argnums=0, in_shardings=inputs, out_shardings=(layout, None)),
        from_seed=jax.jit(lambda seed: new_state(draw(seed), optimizer), out_shardings=layout),
        draw=jax.jit(draw, out_shardings=layout["params"]),
        from_params=jax.jit(lambda params: new_state(params, optimizer), out_shardings=layout),
        layout=layout,
        abstract=abstract_state(shapes, optimizer, layout),
    )


def train(config: ConfigDict, workdir: pathlib.Path, job: Job, prepared: Prepared, mesh) -> None:
    """Runs one job to its end, or resumes it; a finished one is left as it is."""
    block = config[job.block]
    read(Training, block, job.block)
    values = to_dict(config)
    resolved = {key: values[key] for key in (*job.keys, *EXECUTION_KEYS)}
    dog = Watchdog(config.watchdog_seconds, workdir, exits=config.watchdog_exit)
    writer = MetricsWriter(workdir, config.tensorboard, tracker(config.wandb, workdir, resolved))
    directory = RunDirectory(workdir, job.command, resolved)
    if directory.done:
        return
    goodput = Goodput(workdir)
    settings = FrozenConfigDict({key: block[key] for key in STEP_KEYS})
    rules = rules_of(config.sharding[job.table], f"sharding.{job.table}")
    teacher_rules = rules_of(config.sharding.teacher, "sharding.teacher")
    each = [
        programs(phase.objective, phase.arguments, job.model, settings, mesh, rules, (phase.reads, teacher_rules))
        for phase in job.phases
    ]
    compiled = each[0]  # they differ in their steps alone
    seed = np.int32(config.seed)

    def phase_of(phase: JobPhase, program: Programs) -> Phase:
        return Phase(phase.start, program.step, lambda: {**phase.frozen(), "seed": seed})

    def initial_state() -> State:
        return compiled.from_seed(seed) if job.init is None else compiled.from_params(job.init(compiled.draw(seed)))

    directory.start(
        data_fingerprint=job.data_fingerprint,
        tokenizer_fingerprint=prepared.tokenizer.fingerprint,
        parameters=parameter_count(job.model.abstract()),
        **job.notes,
    )
    with Checkpoints(workdir / FOLDER, keep=block.keep_checkpoints) as checkpoints, contextlib.closing(writer), dog:
        state = fit(
            initial_state=initial_state,
            abstract=compiled.abstract,
            phases=[phase_of(phase, program) for phase, program in zip(job.phases, each, strict=True)],
            batch_at=job.batch_at,
            job=block,
            mesh=mesh,
            checkpoints=checkpoints,
            writer=writer,
            identity={"config": identity(resolved), "data": job.data_fingerprint},
            evaluate=job.evaluate,
            description=workdir.name,
            lines=sharding_lines(job, compiled, mesh, teacher_rules) if mesh.size > 1 else (),
            progress=config.progress,
            goodput=goodput,
        )
    directory.finish(parameters_fingerprint=params_fingerprint(state["params"]), **goodput.summary())


def sharding_lines(job: Job, compiled: Programs, mesh, teacher_rules: Rules) -> list[str]:
    """What is printed at the start of a run on several devices: where the trained model and its teachers lie."""
    lines = describe_shardings(job.model.abstract(), compiled.layout["params"], "trained:")
    for reads in dict.fromkeys(phase.reads for phase in job.phases):
        lines += reads.describe(mesh, teacher_rules)
    return lines
