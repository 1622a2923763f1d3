"""Analytic counts of what the variants compute, from the shapes that they use, padding included."""

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import flops_per_row


def distill_flops(
    student: EncoderConfig, teacher: EncoderConfig, rows: int, length: int, logits: int, *, narrow: bool = False
) -> float:
    """Of a distillation step over `rows` rows with logits at `logits` positions of each: the student's forward and
    backward pass, the teacher's forward pass. narrow: the last layers are computed at those positions alone.
    """
    at = logits if narrow else None
    trained = flops_per_row(student, length, logits, student.vocab_size, training=True, last_layer_at=at)
    seen = flops_per_row(teacher, length, logits, teacher.vocab_size, training=False, last_layer_at=at)
    return rows * (trained + seen)


def cached_flops(student: EncoderConfig, teacher: EncoderConfig, rows: int, length: int, logits: int) -> float:
    """Of a step whose teacher was cached as features: of the teacher only its decoder is left."""
    trained = flops_per_row(student, length, logits, student.vocab_size, training=True, last_layer_at=logits)
    return rows * (trained + 2.0 * logits * teacher.hidden_size * teacher.vocab_size)
