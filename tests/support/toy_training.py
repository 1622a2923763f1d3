"""A linear regression with the shape of a training job, for the tests of the trainer.

Run as a program it trains in the directory given as first argument, and kills itself at the step given as second.
"""

import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd_jax.config.execution import Mesh
from kd_jax.config.training import Training
from kd_jax.runtime.paths import as_path
from kd_jax.trainer.checkpoint import Checkpoints
from kd_jax.trainer.loop import fit
from kd_jax.trainer.mesh import make_mesh, shardings
from kd_jax.trainer.metrics import MetricsWriter
from kd_jax.trainer.optimizer import make_optimizer
from kd_jax.trainer.state import abstract_state, new_state, state_shardings

ROWS, INPUTS, OUTPUTS = 16, 8, 4
AXES = {"layer": {"kernel": ("embed", "mlp"), "bias": ("mlp",)}}
ABSTRACT = {
    "layer": {
        "kernel": jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.float32),
        "bias": jax.ShapeDtypeStruct((OUTPUTS,), jnp.float32),
    }
}


def toy_job(**changes):
    values = {
        "steps": 12,
        "learning_rate": 0.05,
        "warmup_steps": 3,
        "log_every": 4,
        "checkpoint_every": 5,
        "beta2": 0.9,
    }
    return Training(**(values | changes))


def batch_at(step: int) -> dict[str, np.ndarray]:
    """The rows of a step, by the step alone; segment_ids counts real tokens, and weights leaves some rows out."""
    draw = np.random.default_rng([7, step])
    inputs = draw.normal(size=(ROWS, INPUTS)).astype(np.float32)
    truth = np.linspace(-1, 1, INPUTS * OUTPUTS, dtype=np.float32).reshape(INPUTS, OUTPUTS)
    return {
        "inputs": inputs,
        "targets": inputs @ truth,
        "weights": (draw.random(ROWS) < 0.7).astype(np.float32),
        "segment_ids": (draw.random((ROWS, 8)) < 0.9).astype(np.int32),
    }


def make_step(optimizer, skips=False):
    def loss_of(params, batch):
        errors = batch["inputs"] @ params["layer"]["kernel"] + params["layer"]["bias"][None] - batch["targets"]
        total = jnp.sum(jnp.sum(errors**2, axis=-1) * batch["weights"])
        return total / jnp.sum(batch["weights"]), total

    def step(state, frozen, batch):
        (_, total), gradients = jax.value_and_grad(loss_of, has_aux=True)(state["params"], batch)
        gradients = jax.tree.map(lambda leaf: leaf * frozen["scale"], gradients)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        metrics = {"loss": (total, jnp.sum(batch["weights"])), "grad_norm": (optax.tree.norm(gradients), 1.0)}
        params = optax.apply_updates(state["params"], updates)
        if skips:
            finite = jnp.isfinite(total)
            new, old = (params, opt_state), (state["params"], state["opt_state"])
            params, opt_state = jax.tree.map(lambda one, other: jnp.where(finite, one, other), new, old)
            metrics["skipped_steps"] = (1.0 - finite, 1.0)
        return {"step": state["step"] + 1, "params": params, "opt_state": opt_state}, metrics

    return step


def init_params():
    draw = jax.random.normal(jax.random.key(0), (INPUTS, OUTPUTS))
    return {"layer": {"kernel": draw, "bias": jnp.zeros(OUTPUTS)}}


def create_state(optimizer, layout):
    """A state from scratch, made sharded."""
    return jax.jit(lambda: new_state(init_params(), optimizer), out_shardings=layout)()


def train(workdir, job=None, *, mesh=None, batches=batch_at, identity=None, tensorboard=False, **changes):
    """A run of the toy in `workdir`; the keywords of `fit` may be replaced."""
    job = job or toy_job()
    mesh = mesh or make_mesh(Mesh(-1, 1, 1))
    optimizer = make_optimizer(job)
    layout = state_shardings(ABSTRACT, optimizer, shardings(mesh, AXES, ABSTRACT))

    jitted = jax.jit(make_step(optimizer, job.skip_non_finite > 0), donate_argnums=0, out_shardings=(layout, None))
    writer = MetricsWriter(workdir, tensorboard=tensorboard)
    arguments = {
        "initial_state": lambda: create_state(optimizer, layout),
        "abstract": abstract_state(ABSTRACT, optimizer, layout),
        "phases": ((0, jitted, lambda: {"scale": np.float32(1.0)}),),
        "batch_at": batches,
        "job": job,
        "mesh": mesh,
        "writer": writer,
        "identity": identity or {"config": "toy"},
    }
    try:
        with Checkpoints(as_path(workdir) / "checkpoints", keep=2) as checkpoints:
            return fit(**(arguments | {"checkpoints": checkpoints} | changes))
    finally:
        writer.close()


if __name__ == "__main__":
    kill_at = int(sys.argv[2])

    def batches(step):
        if step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch_at(step)

    train(sys.argv[1], batches=batches)
