"""FLOPs of distillation steps from shapes alone; padding is computed too, so it counts."""

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import flops_per_row


def distill_flops(
    student: EncoderConfig, teacher: EncoderConfig, rows: int, length: int, logits: int, *, narrow: bool = False
) -> float:
    """FLOPs of a step over `rows` rows with logits at `logits` positions of each: the student's forward and backward
    pass, and the teacher's forward pass. narrow: the last layers are computed at those positions alone.
    """
    at = logits if narrow else None
    trained = flops_per_row(student, length, logits, student.vocab_size, training=True, last_layer_at=at)
    frozen = flops_per_row(teacher, length, logits, teacher.vocab_size, training=False, last_layer_at=at)
    return rows * (trained + frozen)


def cached_flops(student: EncoderConfig, teacher: EncoderConfig, rows: int, length: int, logits: int) -> float:
    """FLOPs of a step with cached teacher features: only the teacher's decoder is computed."""
    trained = flops_per_row(student, length, logits, student.vocab_size, training=True, last_layer_at=logits)
    return rows * (trained + 2.0 * logits * teacher.hidden_size * teacher.vocab_size)
