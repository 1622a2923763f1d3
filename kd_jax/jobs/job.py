"""One training job: what it minimizes, which constants its step reads, where its batches come from; and running it."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import jax
import numpy as np

from kd_jax.config import identity
from kd_jax.config.execution import Execution, Rules
from kd_jax.config.training import Training
from kd_jax.models.functional import Functional, parameter_count
from kd_jax.models.projection import WithProjections
from kd_jax.steps.objective import Objective
from kd_jax.steps.train_step import make_train_step
from kd_jax.trainer.best import Best
from kd_jax.trainer.checkpoint import FOLDER, Checkpoints
from kd_jax.trainer.goodput import Goodput
from kd_jax.trainer.loop import fit
from kd_jax.trainer.mesh import DEFAULT, batch_sharding, describe_shardings, on_mesh, process_share, shardings
from kd_jax.trainer.metrics import MetricsWriter
from kd_jax.trainer.optimizer import after_skipped, make_optimizer, make_schedule
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.trainer.state import State, abstract_state, new_state, params_notes, state_shardings
from kd_jax.trainer.weights_and_biases import tracker
from kd_jax.types import Batch, Params

Model = Functional | WithProjections

BEST_STEP = "best_step"  # in DONE, if a run kept the parameters of its best evaluation: the step of that evaluation


@dataclass(frozen=True)
class Phase:
    """What is minimized from step `start` on, and what its step reads and never changes, such as a teacher.

    constants() is called when the phase begins, so a schedule of teachers never holds two of them at once.
    """

    start: int
    objective: Objective
    constants: Callable[[], Mapping[str, Any]] = dict


class Batches(Protocol):
    """Batch k as a pure function of (seed, k); the fingerprint changes with the data."""

    fingerprint: str

    def batch(self, step: int, process_index: int, process_count: int) -> Batch: ...


@dataclass(frozen=True)
class Job:
    """A training run, in the terms that all of them share.

    evaluate(params, step) -> metrics; it may also write files. best: how the best evaluation is chosen; None keeps only
    the last parameters. init replaces some or all of the parameters that are drawn from the seed. rules: how the
    trained model is sharded. tables: sharding tables of frozen models, printed at the start if there are several
    devices.
    notes: for run.json.
    """

    settings: Training
    seed: int
    model: Model
    phases: tuple[Phase, ...]
    batches: Batches
    evaluate: Callable[[Params, int], Mapping[str, float | None]]
    best: Best | None = None
    init: Callable[[Params], Params] | None = None
    rules: Rules = DEFAULT
    tables: Sequence[str] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)


def train(job: Job, directory: RunDirectory, mesh: jax.sharding.Mesh, execution: Execution) -> dict[str, Any]:
    """Runs a job to its end, or resumes it, in its directory; returns what DONE is to say."""
    settings = job.settings
    writer = MetricsWriter(
        directory.path, execution.tensorboard, tracker(execution.wandb, directory.path, directory.config)
    )
    goodput = Goodput(directory.path)
    draw, begin, abstract = state_functions(job.model, settings.of_step, mesh, job.rules)
    steps = [compiled_step(phase.objective, job.model, settings.of_step, mesh, job.rules) for phase in job.phases]
    seed = np.int32(job.seed)

    def initial_state() -> State:
        drawn = draw(seed)
        return begin(drawn if job.init is None else job.init(drawn))

    fingerprint, count = job.batches.fingerprint, parameter_count(job.model.abstract())
    directory.start(data_fingerprint=fingerprint, parameters=count, **job.notes)
    saved = Checkpoints(directory.path / FOLDER, keep=settings.keep_checkpoints)
    with saved as checkpoints, contextlib.closing(writer):
        state = fit(
            initial_state=initial_state,
            abstract=abstract,
            phases=[
                (phase.start, step, lambda phase=phase: {**phase.constants(), "seed": seed})
                for phase, step in zip(job.phases, steps, strict=True)
            ],
            batch_at=lambda step: job.batches.batch(step, *process_share(mesh)),
            job=settings,
            mesh=mesh,
            checkpoints=checkpoints,
            writer=writer,
            identity={"config": identity(directory.config), "data": fingerprint},
            evaluate=job.evaluate,
            best=job.best,
            description=directory.path.name,
            lines=[*sharding_lines(abstract["params"], "trained:"), *job.tables] if mesh.size > 1 else (),
            progress=execution.progress,
            goodput=goodput,
        )
    params, kept = state["params"], {}
    if job.best is not None and job.best.params is not None:
        params, kept = job.best.params, {BEST_STEP: job.best.step, "stopped_at": int(state["step"])}
    return {**params_notes(params), **kept, **goodput.summary()}


@functools.cache
def compiled_step(objective: Objective, model: Model, settings: Training, mesh: jax.sharding.Mesh, rules: Rules):
    """The jitted (state, constants, batch) -> (state, metrics).

    Equal arguments give the same function: a study asks for the same few again and again, and compiles each once.
    """
    layout = state_layout(model, settings, mesh, rules)
    step = make_train_step(
        objective,
        make_optimizer(settings),
        make_schedule(settings),
        steps=settings.steps,
        accumulation=settings.accumulation,
        skipped=after_skipped if settings.skip_non_finite else None,
        own_tables=layout["params"]["encoder"]["embeddings"]["tokens"].is_fully_replicated,
    )

    inputs = (layout, None, batch_sharding(mesh))  # the constants keep the sharding that they come with
    return jax.jit(on_mesh(step, mesh), donate_argnums=0, in_shardings=inputs, out_shardings=(layout, None))


@functools.cache
def state_functions(model: Model, settings: Training, mesh: jax.sharding.Mesh, rules: Rules):
    """(seed -> parameters, parameters -> state at step 0, the state as shapes with shardings); the functions are jitted
    with output shardings, so no device ever holds more than its shards."""
    optimizer, layout = make_optimizer(settings), state_layout(model, settings, mesh, rules)
    draw = jax.jit(lambda seed: model.init(jax.random.key(seed)), out_shardings=layout["params"])
    begin = jax.jit(lambda params: new_state(params, optimizer), out_shardings=layout)
    return draw, begin, abstract_state(model.abstract(), optimizer, layout)


def state_layout(model: Model, settings: Training, mesh: jax.sharding.Mesh, rules: Rules) -> State:
    """The sharding of every leaf of the training state."""
    return state_shardings(model.abstract(), make_optimizer(settings), model_layout(model, mesh, rules))


def sharding_lines(placed: Any, title: str) -> list[str]:
    """The sharding table of arrays, or of shapes with shardings."""
    return describe_shardings(placed, jax.tree.map(lambda leaf: leaf.sharding, placed), title)


def model_layout(model: Model, mesh: jax.sharding.Mesh, rules: Rules) -> Any:
    """The sharding of every parameter of a model."""
    return shardings(mesh, model.logical_axes(), model.abstract(), rules)
