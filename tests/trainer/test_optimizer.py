import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.config.settings import block, read
from kd_jax.config.training import Distill, Finetune, Training
from kd_jax.trainer.optimizer import after_skipped, decay_mask, make_optimizer, make_schedule
from kd_jax.types import UserError

PARAMS = {
    "embeddings": {"token": jnp.full((3, 2), 0.5)},
    "layers": {
        "attention_norm": {"scale": jnp.full((4, 2), 2.0)},
        "mlp": {"kernel": jnp.ones((4, 2, 2)), "bias": jnp.ones((4, 2))},
    },
    "final_norm": {"scale": jnp.ones(2)},
}


def test_matrices_are_decayed_and_stacked_norms_and_biases_are_not():
    assert decay_mask(PARAMS) == {
        "embeddings": {"token": True},
        "layers": {"attention_norm": {"scale": False}, "mlp": {"kernel": True, "bias": False}},
        "final_norm": {"scale": False},
    }


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedule_against_its_formula(schedule):
    job = Training(steps=20, warmup_steps=5, learning_rate=2e-3, final_learning_rate=5e-4, schedule=schedule)
    rate = make_schedule(job)
    for count in range(21):
        share = (count - 5) / 15
        expected = {
            "linear": 2e-3 + (5e-4 - 2e-3) * share,
            "cosine": 5e-4 + (2e-3 - 5e-4) * 0.5 * (1 + np.cos(np.pi * share)),
            "constant": 2e-3,
        }[schedule]
        assert float(rate(count)) == pytest.approx(2e-3 * count / 5 if count < 5 else expected, rel=1e-5)


def test_without_warmup_the_first_update_is_at_the_peak():
    assert float(make_schedule(Training(warmup_steps=0, learning_rate=0.5))(0)) == 0.5


@pytest.mark.parametrize("clip_norm", [0.0, 0.7])
def test_updates_against_adamw_in_float64(clip_norm):
    job = Training(
        steps=10,
        warmup_steps=2,
        learning_rate=0.1,
        weight_decay=0.3,
        clip_norm=clip_norm,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-3,
    )
    optimizer, rate = make_optimizer(job), make_schedule(job)
    params, state = PARAMS, optimizer.init(PARAMS)
    leaves, structure = jax.tree.flatten(PARAMS)
    decayed = jax.tree.leaves(decay_mask(PARAMS))
    expected = [np.asarray(leaf, np.float64) for leaf in leaves]
    first, second = [0.0 * leaf for leaf in expected], [0.0 * leaf for leaf in expected]
    draw = np.random.default_rng(0)
    for count in range(1, 6):
        gradients = [draw.normal(size=leaf.shape) for leaf in expected]
        updates, state = optimizer.update(
            jax.tree.unflatten(structure, [jnp.float32(g) for g in gradients]), state, params
        )
        params = jax.tree.map(jnp.add, params, updates)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
        for index, gradient in enumerate(gradients):
            first[index] = 0.8 * first[index] + 0.2 * factor * gradient
            second[index] = 0.95 * second[index] + 0.05 * (factor * gradient) ** 2
            step = first[index] / (1 - 0.8**count) / (np.sqrt(second[index] / (1 - 0.95**count)) + 1e-3)
            decay = 0.3 * expected[index] if decayed[index] else 0.0
            expected[index] = expected[index] - float(rate(count - 1)) * (step + decay)
    for actual, wanted in zip(jax.tree.leaves(params), expected):
        np.testing.assert_allclose(np.asarray(actual), wanted, rtol=2e-5, atol=2e-6)
    assert list(state) == ["clip", "adam", "decay", "learning_rate"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("accumulation", 0),
        ("accumulation", 7),
        ("learning_rate", 0.0),
        ("warmup_steps", 1001),
        ("warmup_steps", -1),
        ("schedule", "step"),
        ("final_learning_rate", 1.0),
        ("weight_decay", -0.1),
        ("clip_norm", -1.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", 0.0),
        ("log_every", 0),
        ("evaluate_every", -1),
        ("checkpoint_every", 0),
        ("keep_checkpoints", 0),
        ("skip_non_finite", -1),
    ],
)
def test_a_key_out_of_range_is_named(key, value):
    with pytest.raises(UserError, match=rf"^config\.distill\.{key}: "):
        read(Training, block(Training, **{key: value}), "distill")


def test_the_defaults_are_in_range():
    assert read(Training, block(Training), "pretrain") == Training()


TABLE = "encoder/embeddings/tokens"


def test_the_encoder_moves_by_its_share_and_the_heads_as_before():
    params = {"encoder": PARAMS, "head": {"kernel": jnp.ones((2, 3))}}
    gradients = jax.tree.map(lambda leaf: jnp.sin(jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape), params)

    def updates(**changes):
        optimizer = make_optimizer(Finetune(steps=10, warmup_steps=0, **changes).of_step)
        state = optimizer.init(params)
        for _ in range(2):
            found, state = optimizer.update(gradients, state, params)
        return found, state

    (whole, state), (slowed, other) = updates(), updates(encoder_rate=0.25)
    for path, leaf in jax.tree_util.tree_leaves_with_path(whole):
        factor = 0.25 if path[0].key == "encoder" else 1.0
        node = slowed
        for key in path:
            node = node[key.key]
        np.testing.assert_array_equal(node, factor * leaf)  # a power of two, so nothing is rounded
        assert np.any(leaf)
    assert list(state) == ["clip", "adam", "decay", "learning_rate"] and list(other)[-1] == "rates"


def test_an_encoder_at_the_full_rate_is_the_same_program():
    assert Finetune(encoder_rate=1.0, max_train=7, pooling="mean", patience=3).of_step == Training(batch_size=1)
    assert Finetune(encoder_rate=0.5, max_train=7).of_step == Finetune(encoder_rate=0.5, patience=3).of_step
    assert Finetune(encoder_rate=0.5).of_step.rates == {"encoder": 0.5}
    assert Finetune(encoder_rate=0.5, table_rate=0.5).of_step.rates == {"encoder": 0.5, TABLE: 0.5}
    params = {"encoder": {"embeddings": {"tokens": jnp.ones((3, 2))}}}
    found = []
    for changes in ({}, {"encoder_rate": 0.5, "table_rate": 0.5}):
        optimizer = make_optimizer(Finetune(warmup_steps=0, **changes).of_step)
        found.append(optimizer.update(params, optimizer.init(params), params)[0]["encoder"]["embeddings"]["tokens"])
    np.testing.assert_array_equal(found[1], 0.25 * found[0])


def test_after_a_skipped_step_only_the_schedule_went_on():
    job = Training(steps=10, warmup_steps=2)
    optimizer = make_optimizer(job)
    params = {"kernel": jnp.ones((2, 2))}
    before = optimizer.init(params)
    _, after = optimizer.update(params, before, params)
    skipped = after_skipped(before, after)
    assert int(skipped["learning_rate"].count) == 1
    assert int(skipped["adam"].count) == 0 and not skipped["adam"].mu["kernel"].any()
    assert jax.tree.structure(skipped) == jax.tree.structure(after)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_the_token_table_has_its_own_rate(rate):
    params = {
        "encoder": {"embeddings": {"tokens": jnp.full((3, 2), 0.5), "norm": jnp.ones(2)}},
        "projections": jnp.ones(2),
    }
    gradients = jax.tree.map(jnp.ones_like, params)

    def update(**changes):
        optimizer = make_optimizer(Distill(warmup_steps=0, **changes).of_step)
        state = optimizer.init(params)
        return optimizer.update(gradients, state, params)[0], state

    plain, before = update()
    slowed, _ = update(table_rate=rate)
    assert before.keys() == {"clip", "adam", "decay", "learning_rate"}  # as in older checkpoints
    tables = [one["encoder"]["embeddings"].pop("tokens") for one in (plain, slowed)]
    np.testing.assert_array_equal(tables[1], rate * tables[0])
    jax.tree.map(np.testing.assert_array_equal, plain, slowed)
    with pytest.raises(UserError, match=r"config\.distill\.table_rate: -1\.0 is negative"):
        read(Distill, block(Distill, table_rate=-1.0), "distill")
