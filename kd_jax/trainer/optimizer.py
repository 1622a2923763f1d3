"""AdamW with warm-up, decay and clipping, from the keys of one job."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.config.training import Training
from kd_jax.types import Array, Params

# Substrings of a parameter's path that keep it out of weight decay.
_NOT_DECAYED = ("norm", "bias")


def make_schedule(job: Training) -> optax.Schedule:
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


def make_optimizer(job: Training) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW (Loshchilov and Hutter 2019): the decay follows the schedule.

    The state is a dict with the keys "clip", "adam", "decay" and "learning_rate", so checkpoints have readable names.
    With `job.rates` the update of those subtrees, decay included, is multiplied last.
    """
    clip = optax.clip_by_global_norm(job.clip_norm) if job.clip_norm > 0 else optax.identity()
    rates = dict(job.rates)

    def slowed(updates: Params, params: Params | None = None) -> Params:
        del params

        def scaled(path, leaf: Array) -> Array:
            place = jax.tree_util.keystr(path, simple=True, separator="/")
            found = [rate for name, rate in rates.items() if f"{place}/".startswith(f"{name}/")]
            return math.prod(found) * leaf if found else leaf

        return jax.tree_util.tree_map_with_path(scaled, updates)

    return optax.named_chain(
        ("clip", clip),
        ("adam", optax.scale_by_adam(b1=job.beta1, b2=job.beta2, eps=job.epsilon)),
        ("decay", optax.add_decayed_weights(job.weight_decay, mask=decay_mask)),
        ("learning_rate", optax.scale_by_learning_rate(make_schedule(job))),
        *([("rates", optax.stateless(slowed))] if rates else []),
    )


def after_skipped(before: Any, after: Any) -> Any:
    """The state of `make_optimizer`'s optimizer after a step whose update is left out: the moments and their count as
    they were; the schedule goes on, so that the learning rate stays a function of the step."""
    return type(after)({**before, "learning_rate": after["learning_rate"]})
