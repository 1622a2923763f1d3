"""AdamW with warm-up, decay and clipping, from the keys of one job."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from kd_jax.types import Array, Params, UserError

SCHEDULES = ("linear", "cosine", "constant")

# Substrings of a parameter's path that keep it out of weight decay.
_NOT_DECAYED = ("norm", "bias")


def check_job(job: ConfigDict, name: str) -> None:
    """Raises UserError, with the place `config.<name>.<key>`, for the first key of a job that is out of its range."""

    def require(condition: bool, key: str, wanted: str) -> None:
        if not condition:
            raise UserError(f"config.{name}.{key}: {job[key]!r} is out of range; give {wanted}")

    require(job.steps > 0, "steps", "a number of steps of at least 1")
    require(job.accumulation > 0, "accumulation", "a number of micro-batches of at least 1")
    require(job.batch_size > 0, "batch_size", "at least 1")
    require(job.batch_size % job.accumulation == 0, "accumulation", f"a divisor of batch_size = {job.batch_size}")
    require(job.learning_rate > 0, "learning_rate", "a rate above 0")
    require(0 <= job.warmup_steps <= job.steps, "warmup_steps", f"0 to steps = {job.steps}")
    require(job.schedule in SCHEDULES, "schedule", " or ".join(SCHEDULES))
    require(
        0 <= job.final_learning_rate <= job.learning_rate,
        "final_learning_rate",
        f"0 to learning_rate = {job.learning_rate}",
    )
    require(job.weight_decay >= 0, "weight_decay", "0 or more")
    require(job.clip_norm >= 0, "clip_norm", "a norm above 0, or 0 to turn clipping off")
    require(0 <= job.beta1 < 1, "beta1", "0 to below 1")
    require(0 <= job.beta2 < 1, "beta2", "0 to below 1")
    require(job.epsilon > 0, "epsilon", "a number above 0")
    require(job.log_every > 0, "log_every", "a number of steps of at least 1")
    require(job.evaluate_every >= 0, "evaluate_every", "a number of steps, or 0 to evaluate at the end only")
    require(job.checkpoint_every > 0, "checkpoint_every", "a number of steps of at least 1")
    require(job.keep_checkpoints > 0, "keep_checkpoints", "at least 1")
    require(job.skip_non_finite >= 0, "skip_non_finite", "a number of steps, or 0 to stop at the first")


def make_schedule(job: ConfigDict) -> optax.Schedule:
    """Learning rate of the update after `count` updates: count int -> float32.

    0 at count 0, linear to the peak at count `warmup_steps`, then to `final_learning_rate` at count `steps` (linear or
    half a cosine), or constant. Without warm-up the first update is at the peak.
    """
    warmup, peak, final = job.warmup_steps, job.learning_rate, job.final_learning_rate
    rest = max(job.steps - warmup, 1)
    if job.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    elif job.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=final / peak)
    else:
        after = optax.constant_schedule(peak)
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decay_mask(params: Params) -> Params:
    """True where weight decay applies: every matrix, token embeddings and heads included.

    Decided by name, since the norms and biases of stacked layers are [layers, size] and look like matrices.
    """

    def decayed(path, leaf: Array) -> bool:
        place = jax.tree_util.keystr(path, simple=True, separator="/").lower()
        return jnp.ndim(leaf) >= 2 and not any(word in place for word in _NOT_DECAYED)

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(job: ConfigDict) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (Loshchilov and Hutter 2019): the decay follows the schedule.

    The state is a dict with the keys "clip", "adam", "decay" and "learning_rate", so checkpoints have readable names.
    """
    clip = optax.clip_by_global_norm(job.clip_norm) if job.clip_norm > 0 else optax.identity()
    return optax.named_chain(
        ("clip", clip),
        ("adam", optax.scale_by_adam(b1=job.beta1, b2=job.beta2, eps=job.epsilon)),
        ("decay", optax.add_decayed_weights(job.weight_decay, mask=decay_mask)),
        ("learning_rate", optax.scale_by_learning_rate(make_schedule(job))),
    )


def after_skipped(before: Any, after: Any) -> Any:
    """The state of `make_optimizer`'s optimizer after a step whose update is left out: the moments and their count as
    they were; the schedule goes on, so that the learning rate stays a function of the step."""
    return type(after)({**before, "learning_rate": after["learning_rate"]})
