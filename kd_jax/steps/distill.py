"""Distillation at the masked-LM stage: KL to the teacher with temperature, mixed with the hard loss."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from kd_jax.losses.logits import kl_divergence, masked_cross_entropy
from kd_jax.models.functional import Functional
from kd_jax.models.heads import gather_positions
from kd_jax.steps.objective import Objective, linear, scaled_sum
from kd_jax.steps.pretrain import masked_accuracy, masked_logits


def make_distill_objective(student: Functional, teacher: Functional, settings: Mapping) -> Objective:
    """KL(teacher || student) * T**2 (Hinton et al. 2015) plus the hard masked-LM loss, each with its schedule.

    frozen["teacher"] holds the teacher's parameters. settings are keys of config.distill. With positions "masked" the
    logits of both are formed at the masked positions only; "all" takes the KL at every real token.
    """
    everywhere = settings["positions"] == "all"
    temperature = settings["temperature"]

    def kl_everywhere(params, frozen, batch, hidden_RxLxH):
        teacher_hidden = teacher.hidden(frozen["teacher"], batch)
        teacher_logits = jax.lax.stop_gradient(teacher.mlm_logits(frozen["teacher"], teacher_hidden))
        student_logits = student.mlm_logits(params, hidden_RxLxH)
        return kl_divergence(student_logits, teacher_logits, real_tokens(batch), temperature)

    def loss(params, frozen, batch, key, scales, progress):
        del progress
        hidden_RxLxH = student.hidden(params, batch, key)
        logits = student.mlm_logits(params, gather_positions(hidden_RxLxH, jnp.asarray(batch["masked_positions"])))
        if everywhere:
            kl = kl_everywhere(params, frozen, batch, hidden_RxLxH)
        else:
            teacher_logits = jax.lax.stop_gradient(masked_logits(teacher, frozen["teacher"], batch))
            kl = kl_divergence(logits, teacher_logits, batch["masked_weights"], temperature)
        mlm = masked_cross_entropy(logits, batch["masked_targets"], batch["masked_weights"])
        return scaled_sum({"kl": kl, "mlm": mlm, "accuracy": masked_accuracy(logits, batch)}, scales)

    def weights(batch):
        masked = jnp.sum(batch["masked_weights"])
        return {"mlm": masked, "kl": jnp.sum(real_tokens(batch)) if everywhere else masked}

    def coefficients(progress):
        return {
            "kl": linear(settings["kl_weight"], settings["kl_final_weight"], progress),
            "mlm": linear(settings["mlm_weight"], settings["mlm_final_weight"], progress),
        }

    return Objective(weights, coefficients, loss)


def real_tokens(batch):
    """float32 [R, L]: 1 where there is text, 0 on padding."""
    return (batch["segment_ids"] > 0).astype(jnp.float32)
