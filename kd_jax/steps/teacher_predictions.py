"""What of a teacher's prediction is kept for its students, computed at the masked positions."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.losses.sparse import sampled_targets, top_k_targets
from kd_jax.models.functional import Functional
from kd_jax.steps.teacher_logits import TeacherForm, teacher_logits
from kd_jax.types import Array, Batch, Params


def make_prediction_step(teacher: Functional, form: TeacherForm, settings: Mapping[str, Any]):
    """(params, frozen, batch) -> (fields [R, K, ...], mass float32 [R, K] of the distribution that they hold).

    settings: format, dtype, k, samples, power and temperature. frozen["kept"] as in steps.distill; batch["uniforms"]
    float32 [R, K, samples] decides on what is sampled. Logits are formed for one mask slot of all rows at a time.
    """
    kind, dtype = settings["format"], jnp.dtype(settings["dtype"])

    def of_slot(
        features_RxH: jax.Array, uniforms: jax.Array, constants: dict[str, Any]
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        (logits_RxV,) = teacher_logits((features_RxH,), constants, form)
        temperature = constants["temperature"]
        if kind == "top_k":
            ids, log_p, mass = top_k_targets(logits_RxV, settings["k"], temperature)
            return {"ids": ids, "log_p": log_p.astype(dtype)}, mass
        ids, weights, entropy = sampled_targets(
            uniforms, logits_RxV, settings["samples"], settings["power"], temperature
        )
        held = jnp.zeros_like(logits_RxV, jnp.float32).at[jnp.arange(len(ids))[:, None], ids].set(1.0)
        p = jax.nn.softmax(logits_RxV.astype(jnp.float32) / temperature, axis=-1)
        fields = {"ids": ids, "weights": weights.astype(dtype), "entropy": entropy}
        return fields, jnp.sum(held * p, axis=-1)

    def step(params: Params, frozen: Mapping[str, Array], batch: Batch) -> tuple[dict[str, Array], Array]:
        theirs = {**batch, "tokens": batch["teacher_tokens" if "kept" in frozen else "tokens"]}
        features = teacher.mlm_features(params, teacher.hidden_at(params, theirs, batch["masked_positions"]))
        if kind == "hidden":
            return {"features": features.astype(dtype)}, jnp.ones(features.shape[:2], jnp.float32)
        constants = {
            "decoders": (teacher.decoder(params),),
            "temperature": jnp.float32(settings["temperature"]),
            **({"kept": frozen["kept"]} if "kept" in frozen else {}),
        }
        uniforms = batch["uniforms"] if kind == "sampled" else jnp.zeros((*features.shape[:2], 0))
        by_slot = (jnp.moveaxis(features, 1, 0), jnp.moveaxis(uniforms, 1, 0))
        fields, mass = jax.lax.map(lambda slot: of_slot(slot[0], slot[1], constants), by_slot)
        return jax.tree.map(lambda values: jnp.moveaxis(values, 0, 1), fields), mass.T

    return step
