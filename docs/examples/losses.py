"""KL to a teacher over a large vocabulary in your own training loop, without logits for all positions at once.

python -m docs.examples.losses

Both "models" are given features and a table of output embeddings; only the student's table is trained.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd_jax.losses.blocked import blocked_losses
from kd_jax.losses.logits import kl_divergence, masked_cross_entropy

ROWS, SLOTS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 16, 24, 64, 96, 20_000
BLOCK, TEMPERATURE, STEPS = 64, 2.0, 60


def loss_of_logits(student_BxV, per_position, constants) -> Any:
    """(loss, sums) of one block of positions: the KL and the hard loss, both as sums over the positions that count."""
    weights_B = per_position["weights"]
    teacher_BxV = per_position["features"] @ constants["teacher_table"].T
    kl, _ = kl_divergence(student_BxV, teacher_BxV, weights_B, TEMPERATURE)
    hard, _ = masked_cross_entropy(student_BxV, per_position["targets"], weights_B)
    return kl + 0.1 * hard, {"kl": kl, "hard": hard}


def make_loss(batch, constants):
    """The loss as a function of the student's table alone, divided once by the number of positions that count."""

    def loss(table_VxH):
        per_position = {"features": batch["teacher"], "targets": batch["targets"], "weights": batch["weights"]}
        total, sums = blocked_losses(
            loss_of_logits, batch["student"], table_VxH, None, per_position, constants, block=BLOCK
        )
        count = jnp.sum(batch["weights"])
        return total / count, {name: value / count for name, value in sums.items()}

    return loss


def main() -> None:
    keys = jax.random.split(jax.random.key(0), 5)
    batch = {
        "teacher": jax.random.normal(keys[0], (ROWS, SLOTS, TEACHER_HIDDEN)),
        "weights": (jax.random.uniform(keys[2], (ROWS, SLOTS)) < 0.8).astype(jnp.float32),  # 0 where nothing is masked
    }
    narrow = jax.random.normal(keys[1], (TEACHER_HIDDEN, HIDDEN)) / TEACHER_HIDDEN**0.5
    batch["student"] = batch["teacher"] @ narrow  # the teacher's states, projected to fewer dimensions
    constants = {"teacher_table": 0.3 * jax.random.normal(keys[3], (VOCABULARY, TEACHER_HIDDEN))}
    batch["targets"] = jnp.argmax(batch["teacher"] @ constants["teacher_table"].T, axis=-1)
    table = 0.1 * jax.random.normal(keys[4], (VOCABULARY, HIDDEN))

    loss, optimizer = make_loss(batch, constants), optax.adam(0.03)
    state = optimizer.init(table)

    @jax.jit
    def step(table, state):
        (_, terms), gradient = jax.value_and_grad(loss, has_aux=True)(table)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(table, updates), state, terms

    for number in range(STEPS):
        table, state, terms = step(table, state)
        if number % 20 == 0 or number == STEPS - 1:
            print(f"step {number:2}  KL {terms['kl']:.3f}  hard loss {terms['hard']:.3f} nats per position")
    mib = 4 * VOCABULARY / 2**20
    print(f"logits at a time: {BLOCK * mib:.0f} MiB instead of {ROWS * SLOTS * mib:.0f} MiB, per model")


if __name__ == "__main__":
    main()
