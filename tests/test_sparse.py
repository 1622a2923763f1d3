"""Top-k and sampled teachers against float64 NumPy: values, gradients, what is exact and what is unbiased."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses.logits import kl_divergence
from kd_jax.losses.sparse import TAILS, sampled_divergence, sampled_targets, top_k_divergence, top_k_targets

ROWS, V, K = 6, 40, 5
WEIGHTS = np.array([1, 1, 0, 1, 1, 1], np.float32)


def logits(seed, spread=2.0):
    return (np.random.default_rng(seed).normal(size=(ROWS, V)) * spread).astype(np.float32)


def softmax(values):
    values = np.asarray(values, np.float64)
    p = np.exp(values - values.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def reference(student, teacher, temperature, tail, k=K):
    """The value by its definition, in float64, over the rows of weight 1."""
    p, q = (
        softmax(np.asarray(teacher, np.float64) / temperature),
        softmax(np.asarray(student, np.float64) / temperature),
    )
    total = 0.0
    for row in np.flatnonzero(WEIGHTS):
        kept = np.argsort(-p[row])[:k]
        mass = p[row, kept].sum()
        if tail == "renormalize":
            total += (p[row, kept] / mass * np.log(p[row, kept] / mass / q[row, kept])).sum()
            continue
        total += (p[row, kept] * np.log(p[row, kept] / q[row, kept])).sum()
        if tail == "bucket":
            total += (1 - mass) * np.log((1 - mass) / (1 - q[row, kept].sum()))
    return temperature**2 * total


def numeric_gradient(function, values, epsilon=1e-6):
    values = np.asarray(values, np.float64)
    gradient = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        shifted = [values.copy(), values.copy()]
        shifted[0][place] += epsilon
        shifted[1][place] -= epsilon
        gradient[place] = (function(shifted[0]) - function(shifted[1])) / (2 * epsilon)
    return gradient


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_value_and_gradient_are_those_of_its_definition(tail, temperature):
    student, teacher = logits(0), logits(1)
    ids, log_p, mass = top_k_targets(teacher, K, temperature)
    np.testing.assert_allclose(mass, np.sort(softmax(teacher / temperature))[:, -K:].sum(-1), rtol=1e-5)

    def loss(values):
        return top_k_divergence(values, ids, log_p, WEIGHTS, temperature, tail)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(student)
    np.testing.assert_allclose(value, reference(student, teacher, temperature, tail), rtol=1e-5)
    expected = numeric_gradient(lambda values: reference(values, teacher, temperature, tail), student)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert float(top_k_divergence(student, ids, log_p, WEIGHTS, temperature, tail)[1]) == WEIGHTS.sum()


@pytest.mark.parametrize("tail", TAILS)
def test_all_pieces_kept_is_the_whole_divergence(tail):
    student, teacher = logits(0), logits(1)
    ids, log_p, mass = top_k_targets(teacher, V, 2.0)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-6)

    def sparse(values):
        return top_k_divergence(values, ids, log_p, WEIGHTS, 2.0, tail)[0]

    whole, expected = jax.value_and_grad(lambda values: kl_divergence(values, teacher, WEIGHTS, 2.0)[0])(student)
    value, gradient = jax.value_and_grad(sparse)(student)
    np.testing.assert_allclose(value, whole, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, atol=2e-6)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_a_student_that_agrees_has_no_gradient_on_the_kept_pieces(tail):
    teacher = logits(1)
    ids, log_p, _ = top_k_targets(teacher, K, 1.0)
    gradient = jax.grad(lambda values: top_k_divergence(values, ids, log_p, WEIGHTS, 1.0, tail)[0])(teacher)
    if tail == "bucket":
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    else:  # it is driven to be surer than its teacher
        assert float(jnp.abs(gradient).max()) > 1e-3


def test_an_unknown_tail_is_named():
    with pytest.raises(ValueError, match="'half' is not one of renormalize, bucket, zero"):
        top_k_divergence(logits(0), np.zeros((ROWS, 1), int), np.zeros((ROWS, 1)), WEIGHTS, 1.0, "half")


@pytest.mark.parametrize("power", [1.0, 0.6])
def test_samples_are_an_unbiased_picture_of_the_teacher(power):
    teacher, draws, n = logits(1), 3000, 8
    p = softmax(teacher / 2.0)
    uniforms = np.random.default_rng(2).random((draws, ROWS, n)).astype(np.float32)
    sample = jax.jit(jax.vmap(lambda u: sampled_targets(u, teacher, n, power, 2.0)))
    ids, weights, entropy = jax.device_get(sample(uniforms))
    np.testing.assert_allclose(entropy[0], -(p * np.log(p)).sum(-1), rtol=1e-5)
    estimates = np.zeros((draws, ROWS, V))
    for draw in range(draws):
        for row in range(ROWS):
            np.add.at(estimates[draw, row], ids[draw, row], weights[draw, row])
    error = estimates.std(0) / np.sqrt(draws) + 1e-6
    assert (np.abs(estimates.mean(0) - p) < 5 * error).all()
    if power == 1.0:
        np.testing.assert_allclose(weights, 1 / n, rtol=1e-4)


def test_sampled_loss_and_gradient_are_unbiased():
    student, teacher, draws, n = logits(0), logits(1), 3000, 8
    uniforms = np.random.default_rng(3).random((draws, ROWS, n)).astype(np.float32)

    @jax.jit
    @jax.vmap
    def one(u):
        ids, weights, entropy = sampled_targets(u, teacher, n, 0.8, 2.0)
        loss = lambda values: sampled_divergence(values, ids, weights, entropy, WEIGHTS, 2.0)[0]  # noqa: E731
        return jax.value_and_grad(loss)(student)

    values, gradients = jax.device_get(one(uniforms))
    whole, expected = jax.value_and_grad(lambda x: kl_divergence(x, teacher, WEIGHTS, 2.0)[0])(student)
    assert abs(values.mean() - float(whole)) < 5 * values.std() / np.sqrt(draws)
    error = gradients.std(0) / np.sqrt(draws) + 1e-6
    assert (np.abs(gradients.mean(0) - np.asarray(expected)) < 5 * error).all()


def test_sampled_loss_is_its_definition():
    student, ids = logits(0), np.array([[3, 3, 7]] * ROWS, np.int32)
    w, entropy = np.array([[0.2, 0.3, 0.4]] * ROWS, np.float32), np.full(ROWS, 0.5, np.float32)

    def expected(values):
        log_q = np.log(softmax(np.asarray(values, np.float64) / 2.0))
        losses = -(0.5 * log_q[:, 3] + 0.4 * log_q[:, 7]) - 0.5
        return 4 * losses[WEIGHTS > 0].sum()

    loss = lambda values: sampled_divergence(values, ids, w, entropy, WEIGHTS, 2.0)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    np.testing.assert_allclose(value, expected(student), rtol=1e-5)
    np.testing.assert_allclose(gradient, numeric_gradient(expected, student), atol=1e-5)


def test_a_draw_at_the_end_of_the_range_is_a_piece_that_exists():
    teacher = logits(1)
    teacher[:, -3:] = -np.inf
    uniforms = np.full((ROWS, 2), np.float32(1 - 2**-24))
    uniforms[:, 0] = 0.0
    ids, weights, entropy = sampled_targets(uniforms, teacher, 2, 1.0, 1.0)
    assert (np.asarray(ids) < V - 3).all()
    assert np.isfinite(weights).all() and np.isfinite(entropy).all()


@pytest.mark.parametrize("weights", [np.zeros(ROWS, np.float32), WEIGHTS])
@pytest.mark.parametrize("kind", [*TAILS, "sampled"])
def test_nothing_valid_and_classes_that_do_not_exist_give_finite_values(kind, weights):
    student, teacher = logits(0), logits(1)
    student[:, -4:], teacher[:, -4:] = -np.inf, -np.inf
    student[WEIGHTS == 0] = np.nan  # whatever stands where the weight is 0
    if kind == "sampled":
        ids, w, entropy = sampled_targets(np.random.default_rng(0).random((ROWS, 6)), teacher, 6, 1.0, 2.0)
        loss = lambda values: sampled_divergence(values, ids, w, entropy, weights, 2.0)[0]  # noqa: E731
    else:
        ids, log_p, _ = top_k_targets(teacher, V - 4, 2.0)
        loss = lambda values: top_k_divergence(values, ids, log_p, weights, 2.0, kind)[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[weights == 0] == 0).all()
    if not weights.any():
        assert float(value) == 0.0


def test_half_precision_logits_are_reduced_in_float32():
    student, teacher = logits(0).astype(jnp.bfloat16), logits(1)
    ids, log_p, _ = top_k_targets(teacher, K, 1.0)
    loss = lambda values: top_k_divergence(values, ids, log_p.astype(jnp.float16), WEIGHTS, 1.0, "bucket")[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(student)
    assert value.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(value, reference(student.astype(np.float32), teacher, 1.0, "bucket"), rtol=2e-3)
