"""One optimizer step: gradients over micro-batches, one division by the global weight, one update."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.models.token_table import on_each_device, summed
from kd_jax.steps.objective import Objective
from kd_jax.types import Array, Batch, Params, Term

State = dict[str, Any]
TrainStep = Callable[[State, Any, Batch], tuple[State, Mapping[str, Term]]]


def split_micro_batches(batch: Batch, accumulation: int) -> dict[str, Array]:
    """[B, ...] -> [accumulation, B // accumulation, ...]; row r goes to micro-batch r % accumulation.

    Taking every accumulation-th row keeps each device's rows on that device when rows lie in contiguous blocks.
    """

    def split(values: Array) -> Array:
        rows = values.shape[0]
        return jnp.moveaxis(values.reshape(rows // accumulation, accumulation, *values.shape[1:]), 1, 0)

    return {name: split(values) for name, values in batch.items()}


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    steps: int,
    accumulation: int = 1,
    skipped: Callable[[Any, Any], Any] | None = None,
    own_tables: bool = False,
) -> TrainStep:
    """A pure function (state, frozen, batch) -> (state, metrics); metrics are (sum, weight) pairs.

    frozen["seed"] is an int32 scalar; the step's key is fold_in(key(seed), step), so dropout depends on nothing else.
    The rest of `frozen` (a teacher, label masks) is passed to the objective and never differentiated.

    skipped(opt_state before, after): if given, a step whose loss, terms or gradient norm are not finite changes no
    parameter, leaves its result as the optimizer's state, and counts 1 in metrics["skipped_steps"]. own_tables: each
    device adds up the token table's gradients before they are summed over devices (models.token_table).
    """

    def train_step(state: State, frozen: Any, batch: Batch) -> tuple[State, Mapping[str, Term]]:
        step = state["step"]
        key = jax.random.fold_in(jax.random.key(frozen["seed"]), step)
        progress = step / max(steps - 1, 1)
        coefficients = objective.coefficients(progress)
        # A batch without a single counted item has weight 0 and sum 0: the quotient is defined as 0.
        weights = {name: jnp.maximum(weight, 1.0) for name, weight in objective.weights(batch).items()}
        scales = {name: factor / weights[name] for name, factor in coefficients.items()}

        if objective.before is not None:
            batch = {**batch, **jax.lax.stop_gradient(objective.before(frozen, batch))}

        def loss_of(params: Params, micro: Batch, micro_key: jax.Array):
            return objective.loss(params, frozen, micro, micro_key, scales, progress)

        rows = jax.tree.leaves(batch)[0].shape[0] // accumulation
        given = on_each_device(state["params"], rows) if own_tables else state["params"]
        gradient_of = jax.value_and_grad(loss_of, has_aux=True)
        if accumulation == 1:
            (loss, terms), gradients = gradient_of(given, batch, key)
        else:

            def body(total: Any, indexed: tuple[Array, Batch]) -> tuple[Any, None]:
                index, micro = indexed
                value = gradient_of(given, micro, jax.random.fold_in(key, index))
                return jax.tree.map(jnp.add, total, value), None

            micro_batches = split_micro_batches(batch, accumulation)
            first = {name: values[0] for name, values in micro_batches.items()}
            shapes = jax.eval_shape(gradient_of, given, first, key)
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            indexed = (jnp.arange(accumulation), micro_batches)
            ((loss, terms), gradients), _ = jax.lax.scan(body, zeros, indexed)

        gradients = summed(gradients) if own_tables else gradients
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        one = jnp.float32(1.0)
        metrics = dict(terms)
        metrics["loss"] = (loss, one)
        metrics["grad_norm"] = (optax.tree.norm(gradients), one)
        metrics["learning_rate"] = (jnp.float32(schedule(step)), one)
        if skipped is not None:
            numbers = jnp.stack([jnp.float32(number) for pair in metrics.values() for number in pair])
            finite = jnp.all(jnp.isfinite(numbers))
            kept = (state["params"], skipped(state["opt_state"], opt_state))
            params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt_state), kept)
            metrics["skipped_steps"] = (1.0 - finite.astype(jnp.float32), one)
        return {"step": step + 1, "params": params, "opt_state": opt_state}, metrics

    return train_step
