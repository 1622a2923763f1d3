"""Trains a teacher on your own texts with the masked-LM step, then distills a student from it.

python -m docs.examples.distill_step
"""

import jax
import numpy as np

from kd_jax.config.data import Masking
from kd_jax.config.training import KL, Term, Training
from kd_jax.data.embedded.utterances import embedded_texts
from kd_jax.data.masking import mask_rows, num_slots, row_keys
from kd_jax.data.packing import pack_stream, positions
from kd_jax.data.text.tokenizer import train_tokenizer
from kd_jax.models.encoder_config import PRESETS, encoder_config
from kd_jax.models.functional import Functional
from kd_jax.models.projection import WithProjections
from kd_jax.steps.distill import DistillSettings, make_distill_objective
from kd_jax.steps.pretrain import make_pretrain_objective
from kd_jax.steps.train_step import make_train_step
from kd_jax.trainer.optimizer import make_optimizer, make_schedule
from kd_jax.trainer.state import new_state

LENGTH, ROWS, STEPS = 32, 16, 100


def batches(tokenizer, texts):
    """Endless masked-LM batches of packed rows; batch k is a function of k."""
    ends = (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id)
    packed = list(pack_stream([tokenizer.encode(texts)], LENGTH, *ends, open_rows=64))
    tokens, segment_ids = (np.concatenate(parts) for parts in zip(*packed))
    masking, slots = Masking(), num_slots(LENGTH, 0.15)
    ids = {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids}
    random_ids = np.arange(len(ends) + 2, tokenizer.vocab_size, dtype=np.int32)

    def batch(step):
        rows = np.random.default_rng(step).integers(0, len(tokens), ROWS)
        keys = row_keys(0, "example", rows, np.full(ROWS, step % masking.epochs))
        masked = mask_rows(
            tokens[rows], segment_ids[rows], keys=keys, slots=slots, masking=masking, random_ids=random_ids, **ids
        )
        names = ("tokens", "masked_positions", "masked_targets", "masked_weights")
        segments = segment_ids[rows]
        return dict(zip(names, masked)) | {"segment_ids": segments, "positions": positions(segments)}

    return batch


def train(objective, params, frozen, batch, name):
    """Parameters after STEPS steps of an objective; `frozen` is handed to it and never trained."""
    job = Training(steps=STEPS, learning_rate=5e-3, warmup_steps=10)
    optimizer = make_optimizer(job)
    step = jax.jit(make_train_step(objective, optimizer, make_schedule(job), steps=STEPS), donate_argnums=0)
    state = new_state(params, optimizer)
    for number in range(STEPS):
        state, metrics = step(state, {"seed": np.int32(0), **frozen}, batch(number))
        if number in (0, STEPS - 1):  # metrics are pairs of a sum and a weight
            terms = {key: float(total / weight) for key, (total, weight) in metrics.items() if key in ("mlm", "kl")}
            print(f"{name}, step {number:3}: ", "  ".join(f"{key} {value:.3f}" for key, value in terms.items()))
    return state["params"]


def main() -> None:
    texts = list(embedded_texts("en"))
    tokenizer = train_tokenizer(texts, 1000)
    batch = batches(tokenizer, texts)
    wider = PRESETS["tiny"] | {"hidden_size": 96, "num_heads": 3}
    teacher = Functional("mlm", encoder_config(wider, tokenizer.vocab_size))
    student = Functional("mlm", encoder_config(PRESETS["tiny"], tokenizer.vocab_size))
    theirs = train(make_pretrain_objective(teacher), teacher.init(jax.random.key(0)), {}, batch, "teacher")
    settings = DistillSettings(kl=KL(1.0, temperature=2.0), mlm=Term(1.0, final_weight=0.0))  # the hard loss fades out
    objective = make_distill_objective(WithProjections(student), (teacher,), settings)
    train(objective, student.init(jax.random.key(1)), {"teachers": (theirs,)}, batch, "student")


if __name__ == "__main__":
    main()
