"""What every training command does between its batches and its checkpoints: compile, resume or start, fit, mark as done."""

import functools
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from kd_jax.config import identity, require, to_dict
from kd_jax.data.prepared import Prepared
from kd_jax.models.functional import Functional
from kd_jax.steps.objective import Objective
from kd_jax.steps.train_step import make_train_step
from kd_jax.trainer.checkpoint import Checkpoints
from kd_jax.trainer.loop import fit
from kd_jax.trainer.metrics import MetricsWriter
from kd_jax.trainer.optimizer import make_optimizer, make_schedule
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.trainer.state import create_state, state_shardings
from kd_jax.types import Batch, Params

# The keys of a job's block that the compiled step depends on.
STEP_KEYS = (
    *("steps", "accumulation", "learning_rate", "warmup_steps", "schedule", "final_learning_rate"),
    *("weight_decay", "clip_norm", "beta1", "beta2", "epsilon"),
)


@dataclass(frozen=True)
class Job:
    """One training run, told apart from the trainer by functions."""

    command: str
    block: str  # the config's block with steps, batch size and optimizer
    keys: tuple[str, ...]  # config keys that decide what the run computes
    model: Functional
    objective: Callable[..., Objective]  # called with `arguments`, which are hashable: equal jobs share one compilation
    arguments: tuple
    frozen: dict[str, Any]  # what the step reads and never changes: a teacher, class masks
    batch_at: Callable[[int], Batch]  # this process's rows of a step
    data_fingerprint: str
    evaluate: Callable[[Params, int], dict[str, float]]
    init: Callable[[Params], Params] | None = None  # replaces some or all of the parameters drawn from the seed
    notes: dict[str, Any] = field(default_factory=dict)  # more for run.json


@functools.cache
def compiled_train_step(objective, arguments: tuple, model: Functional, settings: FrozenConfigDict, mesh):
    """The jitted step, the jitted initial state, and the state's shardings."""
    job = ConfigDict(settings)
    optimizer, schedule = make_optimizer(job), make_schedule(job)
    step = make_train_step(objective(*arguments), optimizer, schedule, steps=job.steps, accumulation=job.accumulation)
    layout = state_shardings(mesh, model.logical_axes(), model.abstract(), optimizer)

    def init(seed):
        return create_state(model.init(jax.random.key(seed)), optimizer)

    return jax.jit(step, donate_argnums=0, out_shardings=(layout, None)), jax.jit(init, out_shardings=layout), layout


def train(config: ConfigDict, workdir: pathlib.Path, job: Job, prepared: Prepared, mesh) -> None:
    """Runs one job to its end, or resumes it; a finished one is left as it is."""
    block = config[job.block]
    require(
        block.batch_size % block.accumulation == 0,
        f"{job.block}.accumulation",
        f"{block.accumulation} does not divide batch_size {block.batch_size}",
        "choose a divisor",
    )
    values = to_dict(config)
    resolved = {key: values[key] for key in job.keys}
    directory = RunDirectory(workdir, job.command, resolved)
    if directory.done:
        return
    settings = FrozenConfigDict({key: block[key] for key in STEP_KEYS})
    train_step, init, layout = compiled_train_step(job.objective, job.arguments, job.model, settings, mesh)

    def initial_state():
        state = init(np.int32(config.seed))
        if job.init is not None:
            state["params"] = jax.device_put(job.init(state["params"]), layout["params"])
        return state
