"""The losses against float64 NumPy, and at the edges where naive forms give NaN or small nonzero values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses.logits import averaged_logits, distill_loss, kl_divergence, masked_cross_entropy, most_likely


def log_softmax64(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def random_case(seed=0, shape=(3, 5), classes=11, scale=3.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    student = rng.normal(0, scale, (*shape, classes)).astype(np.float32)
    teacher = rng.normal(0, scale, (*shape, classes)).astype(np.float32)
    targets = rng.integers(0, classes, shape).astype(np.int32)
    weights = (rng.random(shape) < 0.6).astype(np.float32)
    return student, teacher, targets, weights


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_matches_float64_and_autodiff(smoothing):
    logits, _, targets, weights = random_case()
    log_p = log_softmax64(logits)
    one_hot = np.eye(logits.shape[-1])[targets]
    expected = -(((1 - smoothing) * one_hot + smoothing / logits.shape[-1]) * log_p).sum(-1)
    total, count = jax.jit(lambda x: masked_cross_entropy(x, targets, weights, smoothing))(logits)
    np.testing.assert_allclose(total, (expected * weights).sum(), rtol=1e-6)
    assert count == weights.sum()

    def plain(x):
        target = (1 - smoothing) * one_hot + smoothing / x.shape[-1]
        return -jnp.sum(jnp.sum(target * jax.nn.log_softmax(x), -1) * weights)

    gradient = jax.grad(lambda x: 0.3 * masked_cross_entropy(x, targets, weights, smoothing)[0])(jnp.asarray(logits))
    np.testing.assert_allclose(gradient, 0.3 * jax.grad(plain)(jnp.asarray(logits)), atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_kl_matches_float64_with_temperature_squared(temperature):
    student, teacher, _, weights = random_case(1)
    log_p, log_q = log_softmax64(teacher, temperature), log_softmax64(student, temperature)
    expected = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)
    total, count = jax.jit(lambda s, t: kl_divergence(s, t, weights, temperature))(student, teacher)
    np.testing.assert_allclose(total, (expected * weights).sum(), rtol=1e-5)
    assert count == weights.sum()
    gradient = jax.grad(lambda s: kl_divergence(s, teacher, weights, temperature)[0])(jnp.asarray(student))
    expected_gradient = temperature * (np.exp(log_q) - np.exp(log_p)) * weights[..., None]
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)


def test_kl_gives_the_teacher_no_gradient():
    student, teacher, _, weights = random_case(2)
    gradient = jax.grad(lambda t: kl_divergence(student, t, weights, 2.0)[0])(jnp.asarray(teacher))
    assert not np.any(gradient)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0])
def test_kl_of_equal_logits_is_exactly_zero_at_a_large_vocabulary(temperature):
    logits = jax.random.normal(jax.random.key(0), (3, 250_000), jnp.bfloat16) * 4
    value, gradient = jax.jit(jax.value_and_grad(lambda s, t: kl_divergence(s, t, jnp.ones(3), temperature)[0]))(
        logits, jnp.array(logits)
    )
    assert value == 0.0
    assert gradient.dtype == jnp.bfloat16
    assert not np.any(np.asarray(gradient, np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_of_two_equal_models_is_exactly_zero(dtype):
    # Each side makes its own logits inside the jitted function, so that XLA may fuse them differently.
    x = jax.random.normal(jax.random.key(0), (24, 32), dtype)
    table = jax.random.normal(jax.random.key(1), (5_000, 32), dtype)

    def loss(table, frozen):
        return kl_divergence(x @ table.T, x @ frozen.T, jnp.ones(24), 2.0)[0] / 24

    value, gradient = jax.jit(jax.value_and_grad(loss))(table, jnp.array(table))
    assert value == 0.0
    assert not np.any(np.asarray(gradient, np.float32))


def test_reductions_are_float32_for_bfloat16_logits():
    # 200,000 equal logits: each probability is 5e-6, and a bfloat16 sum of exponentials stops growing at 256.
    logits = jnp.zeros((1, 200_000), jnp.bfloat16)
    total, _ = jax.jit(masked_cross_entropy)(logits, jnp.zeros(1, jnp.int32), jnp.ones(1))
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, np.log(200_000), rtol=1e-6)
    teacher = logits.at[0, 0].set(8.0)
    total, _ = jax.jit(lambda s, t: kl_divergence(s, t, jnp.ones(1), 1.0))(logits, teacher)
    log_p, log_q = log_softmax64(np.asarray(teacher, np.float32)), log_softmax64(np.asarray(logits, np.float32))
    np.testing.assert_allclose(total, (np.exp(log_p) * (log_p - log_q)).sum(), rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-3, 1e-2, 1.0, 30.0])
def test_kl_is_never_negative_and_small_values_are_accurate(scale):
    rng = np.random.default_rng(3)
    teacher = rng.normal(0, 2, (64, 1_000)).astype(np.float32)
    student = (teacher + rng.normal(0, scale, teacher.shape)).astype(np.float32)
    for row in range(0, 64, 16):
        one = np.zeros(64, np.float32)
        one[row] = 1
        assert kl_divergence(student, teacher, one, 2.0)[0] >= 0
    log_p, log_q = log_softmax64(teacher, 2.0), log_softmax64(student, 2.0)
    expected = 4 * (np.exp(log_p) * (log_p - log_q)).sum()
    np.testing.assert_allclose(kl_divergence(student, teacher, np.ones(64), 2.0)[0], expected, rtol=2e-3, atol=1e-6)


def test_kl_is_not_negative_where_it_is_all_rounding():
    rng = np.random.default_rng(4)
    teacher = rng.normal(0, 2, (100, 1_000)).astype(np.float32)
    student = (teacher + rng.normal(0, 1e-5, teacher.shape)).astype(np.float32)
    each = jax.jit(jax.vmap(lambda s, t: kl_divergence(s[None], t[None], jnp.ones(1), 2.0)[0]))(student, teacher)
    assert np.all(each >= 0) and np.all(each < 1e-6)


def test_no_valid_position_gives_zero_and_a_zero_gradient():
    student, teacher, targets, _ = random_case(4)
    student[0, 0] = np.nan  # whatever stands at a position without weight
    none = np.zeros(targets.shape, np.float32)
    for loss in (
        lambda x: masked_cross_entropy(x, targets, none, 0.1),
        lambda x: kl_divergence(x, teacher, none, 2.0),
    ):
        total, count = loss(student)
        assert total == 0.0 and count == 0.0
        assert not np.any(jax.grad(lambda x, loss=loss: loss(x)[0])(jnp.asarray(student)))


def test_positions_without_weight_change_nothing():
    student, teacher, targets, weights = random_case(5)
    other_student = np.where(weights[..., None] > 0, student, np.float32(1e30))
    other_teacher = np.where(weights[..., None] > 0, teacher, np.float32(np.nan))
    other_targets = np.where(weights > 0, targets, -1).astype(np.int32)

    def losses(s, t, y):
        return masked_cross_entropy(s, y, weights, 0.1)[0] + kl_divergence(s, t, weights, 2.0)[0]

    run = jax.jit(jax.value_and_grad(losses))
    value, gradient = run(student, teacher, targets)
    other_value, other_gradient = run(other_student, other_teacher, other_targets)
    assert value == other_value
    np.testing.assert_array_equal(gradient, other_gradient)
    assert not np.any(np.asarray(gradient)[weights == 0])


def test_minus_infinity_marks_classes_that_do_not_exist():
    student, teacher, targets, weights = random_case(6, classes=8)
    targets = targets % 5
    short_student, short_teacher = student[..., :5], teacher[..., :5]
    long_student, long_teacher = student.copy(), teacher.copy()
    long_student[..., 5:] = -np.inf
    long_teacher[..., 5:] = -np.inf
    for smoothing in (0.0, 0.2):
        run = jax.value_and_grad(lambda x, e=smoothing: masked_cross_entropy(x, targets, weights, e)[0])
        value, gradient = run(jnp.asarray(long_student))
        short_value, short_gradient = run(jnp.asarray(short_student))
        np.testing.assert_allclose(value, short_value, rtol=1e-6)
        np.testing.assert_allclose(gradient[..., :5], short_gradient, atol=1e-7)
        assert not np.any(gradient[..., 5:])
    value, gradient = jax.value_and_grad(lambda s: kl_divergence(s, long_teacher, weights, 2.0)[0])(
        jnp.asarray(long_student)
    )
    short_value = kl_divergence(short_student, short_teacher, weights, 2.0)[0]
    np.testing.assert_allclose(value, short_value, rtol=1e-5)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[..., 5:])


def test_minus_infinity_in_the_teacher_alone():
    student, teacher, _, weights = random_case(7)
    teacher[..., :4] = -np.inf
    log_p, log_q = log_softmax64(teacher[..., 4:], 2.0), log_softmax64(student, 2.0)
    expected = 4 * (np.exp(log_p) * (log_p - log_q[..., 4:])).sum(-1)
    value, gradient = jax.value_and_grad(lambda s: kl_divergence(s, teacher, weights, 2.0)[0])(jnp.asarray(student))
    np.testing.assert_allclose(value, (expected * weights).sum(), rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_a_traced_temperature_gives_what_a_number_gives():
    student, teacher, _, weights = random_case(8)
    run = jax.jit(jax.value_and_grad(lambda s, temperature: kl_divergence(s, teacher, weights, temperature)[0]))
    for temperature in (0.7, 3.0):  # one compilation
        value, gradient = run(student, temperature)
        log_p, log_q = log_softmax64(teacher, temperature), log_softmax64(student, temperature)
        expected = temperature**2 * ((np.exp(log_p) * (log_p - log_q)).sum(-1) * weights).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        expected_gradient = temperature * (np.exp(log_q) - np.exp(log_p)) * weights[..., None]
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    assert run._cache_size() == 1  # type: ignore[reportAttributeAccessIssue]  jax's protocol of a jitted function lacks it


def test_most_likely_counts_targets_with_the_largest_logit():
    logits = np.array(
        [[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [5.0, 5.0, 1.0], [np.nan, 0.0, 0.0], [9.0, 0.0, 0.0]], np.float32
    )
    weights = np.array([1, 1, 1, 1, 0], np.float32)
    hits, count = most_likely(logits, np.array([1, 2, 1, 0, 0]), weights)
    assert (hits, count) == (2, 4)  # ties count, NaN does not
    assert most_likely(logits[[4, 4]] * [[1], [-1]], np.array([-1, 3]), np.ones(2))[0] == 0  # no class at all
    gradient = jax.grad(lambda x: most_likely(x, np.array([1, 2, 1, 0, 0]), weights)[0])(jnp.asarray(logits))
    assert not np.any(gradient)


@pytest.mark.parametrize("teachers", [1, 3])
def test_distill_loss_has_every_term_and_its_gradient(teachers):
    temperature, scales = 1.6, {"kl": 0.3, "mlm": 0.05}
    student, first, targets, weights = (values.reshape(-1, *values.shape[2:]) for values in random_case(9))
    rng = np.random.default_rng(10)
    every = [first, *rng.normal(0, 3, (teachers - 1, *first.shape)).astype(np.float32)]

    def loss(logits, temperature, scales):
        return distill_loss(logits, every, targets, weights, temperature, scales)

    (total, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(student, temperature, scales)
    p = np.mean([np.exp(log_softmax64(logits, temperature)) for logits in every], axis=0)
    log_q, log_q1 = log_softmax64(student, temperature), log_softmax64(student)
    target = np.eye(student.shape[-1])[targets]
    kl = temperature**2 * ((p * (np.log(p) - log_q)).sum(-1) * weights).sum()
    mlm = -((target * log_q1).sum(-1) * weights).sum()
    np.testing.assert_allclose(sums["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(sums["mlm"], mlm, rtol=1e-5)
    np.testing.assert_allclose(total, scales["kl"] * kl + scales["mlm"] * mlm, rtol=1e-5)
    assert sums["accuracy"] == ((student.argmax(-1) == targets) * weights).sum()
    expected = temperature * scales["kl"] * (np.exp(log_q) - p) + scales["mlm"] * (np.exp(log_q1) - target)
    np.testing.assert_allclose(gradient, expected * weights[..., None], atol=1e-6)


def test_distill_loss_forms_only_the_terms_that_have_a_scale():
    student, teacher, targets, weights = (values.reshape(-1, *values.shape[2:]) for values in random_case(11))
    loss, sums = distill_loss(student, [], targets, weights, 2.0, {"mlm": 2.0})
    assert sums.keys() == {"mlm", "accuracy"}
    np.testing.assert_allclose(loss, 2 * masked_cross_entropy(student, targets, weights)[0])
    loss, sums = distill_loss(student, [teacher], targets, weights, 2.0, {"kl": 2.0})
    assert sums.keys() == {"kl", "accuracy"}
    np.testing.assert_allclose(loss, 2 * kl_divergence(student, teacher, weights, 2.0)[0])


def test_the_average_of_a_teacher_with_itself_changes_nothing():
    _, teacher, _, weights = random_case(12)
    teacher[..., 3] = -np.inf
    average = averaged_logits([teacher, teacher], weights, 2.0)
    counted = weights > 0
    np.testing.assert_allclose(
        np.exp(log_softmax64(average, 2.0))[counted], np.exp(log_softmax64(teacher, 2.0))[counted], rtol=1e-5, atol=1e-9
    )
    assert averaged_logits([teacher], weights, 2.0).shape == teacher.shape
