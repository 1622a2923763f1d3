"""FLOPs of a distillation step, against a count layer by layer."""

import dataclasses

from kd_jax.models.encoder_config import PRESETS, encoder_config
from kd_jax.models.flops import cached_flops, distill_flops


def test_flops_of_a_step():
    student = dataclasses.replace(encoder_config(PRESETS["tiny"], 100), num_layers=1)
    teacher = dataclasses.replace(student, hidden_size=64, num_layers=3)
    rows, length, logits = 5, 16, 3

    def forward(hidden, layers, last):
        """`last` counts the columns whose state after the last layer is wanted."""
        total = logits * (hidden * hidden + hidden * 100)
        for layer in range(layers):
            columns = last if layer == layers - 1 else length
            keys_and_values, query_and_output = length * 2 * hidden * hidden, columns * 2 * hidden * hidden
            total += keys_and_values + query_and_output + columns * (2 * length * hidden + 3 * hidden * 64)
        return 2 * total

    whole = rows * (3 * forward(32, 1, length) + forward(64, 3, length))
    assert distill_flops(student, teacher, rows, length, logits) == whole
    narrow = rows * (3 * forward(32, 1, logits) + forward(64, 3, logits))
    assert distill_flops(student, teacher, rows, length, logits, narrow=True) == narrow < whole
    cached = rows * (3 * forward(32, 1, logits) + 2 * logits * 64 * 100)
    assert cached_flops(student, teacher, rows, length, logits) == cached
