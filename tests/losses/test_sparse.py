"""Divergences from a teacher of which only some classes are kept, against the formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses.blocked import blocked_losses
from kd_jax.losses.logits import kl_divergence, masked_cross_entropy
from kd_jax.losses.sparse import sampled_divergence, sampled_targets, top_k_divergence, top_k_targets

TAILS = ("renormalize", "bucket", "zero")
sample = jax.jit(sampled_targets, static_argnums=2)


def random_case(seed=0, positions=6, classes=30, scale=2.0):
    """Student's and teacher's logits and 0/1 weights."""
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, scale, (2, positions, classes)).astype(np.float32)
    weights = (rng.random(positions) < 0.7).astype(np.float32)
    weights[:2] = 1, 0
    return student, teacher, weights


def softmax64(logits, temperature=1.0):
    shifted = np.asarray(logits, np.float64) / temperature
    exponentials = np.exp(shifted - shifted.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def top_k64(teacher, k, temperature):
    """ids [B, k] and their probabilities, by sorting."""
    p = softmax64(teacher, temperature)
    ids = np.argsort(-p, axis=-1)[:, :k]
    return ids, np.take_along_axis(p, ids, -1)


def divergence64(student, ids, kept, temperature, tail):
    """T**2 * divergence of each position [B], from the definition of the policy."""
    q = softmax64(student, temperature)
    kept_q = np.take_along_axis(q, ids, -1)
    if tail == "renormalize":
        kept = kept / kept.sum(-1, keepdims=True)
    result = (kept * np.log(kept / kept_q)).sum(-1)
    if tail == "bucket" and ids.shape[-1] < student.shape[-1]:
        outside = np.ones_like(q)
        np.put_along_axis(outside, ids, 0.0, -1)
        rest_p, rest_q = 1 - kept.sum(-1), (q * outside).sum(-1)
        result += rest_p * np.log(rest_p / rest_q)
    return temperature**2 * result


def numerical_gradient(function, logits, step=1e-5):
    """Central differences of a float64 function of the logits."""
    gradient = np.zeros(logits.shape)
    for index in np.ndindex(*logits.shape):
        moved = np.array(logits, np.float64)
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_top_k_targets_are_the_most_likely_classes_under_the_whole_softmax(temperature):
    _, teacher, _ = random_case(1)
    ids, log_p, mass = jax.jit(top_k_targets, static_argnums=1)(teacher, 5, temperature)
    expected_ids, expected = top_k64(teacher, 5, temperature)
    assert ids.dtype == jnp.int32 and log_p.dtype == mass.dtype == jnp.float32
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(np.exp(log_p), expected, rtol=1e-5)
    np.testing.assert_allclose(mass, expected.sum(-1), rtol=1e-5)


@pytest.mark.parametrize("k", [0, 31])
def test_k_beyond_the_classes_is_an_error(k):
    with pytest.raises(ValueError, match="k: "):
        top_k_targets(random_case()[1], k, 1.0)


def test_an_unknown_policy_is_an_error():
    student, teacher, weights = random_case()
    with pytest.raises(ValueError, match="'renormalise' is unknown; use one of renormalize, bucket, zero"):
        top_k_divergence(student, *top_k_targets(teacher, 3, 1.0)[:2], weights, 1.0, "renormalise")


@pytest.mark.parametrize("tail", TAILS)
def test_divergence_and_gradient_are_those_of_the_definition(tail):
    temperature = 1.7
    student, teacher, weights = random_case(2, classes=11)
    ids, kept = top_k64(teacher, 4, temperature)

    def total(logits):
        return (divergence64(logits, ids, kept, temperature, tail) * weights).sum()

    def loss(logits, temperature):
        return top_k_divergence(logits, ids, np.log(kept), weights, temperature, tail)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(student, temperature)
    np.testing.assert_allclose(value, total(student), rtol=1e-5)
    np.testing.assert_allclose(gradient, numerical_gradient(total, student), atol=2e-6)
    assert not np.any(gradient[weights == 0])


@pytest.mark.parametrize("tail", TAILS)
def test_all_classes_give_the_full_divergence(tail):
    student, teacher, weights = random_case(3)
    ids, log_p, mass = top_k_targets(teacher, teacher.shape[-1], 2.0)
    np.testing.assert_allclose(mass, 1.0, rtol=1e-6)

    def full(logits):
        return kl_divergence(logits, teacher, weights, 2.0)[0]

    def kept(logits):
        return top_k_divergence(logits, ids, log_p, weights, 2.0, tail)[0]

    (value, gradient), (expected, expected_gradient) = (
        jax.value_and_grad(f)(jnp.asarray(student)) for f in (kept, full)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-6)


def test_how_the_policies_are_biased():
    _, teacher, _ = random_case(4)
    ones = np.ones(len(teacher), np.float32)
    ids, log_p, mass = top_k_targets(teacher, 3, 1.0)

    def value_and_gradient(logits, tail):
        return jax.jit(jax.value_and_grad(lambda x: top_k_divergence(x, ids, log_p, ones, 1.0, tail)[0]))(logits)

    # A student that equals its teacher is left alone by "bucket" only.
    np.testing.assert_allclose(value_and_gradient(teacher, "bucket")[1], 0, atol=1e-6)
    outside = np.ones(teacher.shape, bool)
    np.put_along_axis(outside, np.asarray(ids), False, -1)
    for tail in ("renormalize", "zero"):
        assert np.all(value_and_gradient(teacher, tail)[1][outside] > 1e-6)  # the others lose
    # The minimum of "renormalize" and "zero": the kept classes alone. "zero" is T**2 * m log m there.
    alone = np.where(outside, -40.0, teacher).astype(np.float32)
    for tail, minimum in (("renormalize", 0.0), ("zero", float(jnp.sum(mass * jnp.log(mass))))):
        value, gradient = value_and_gradient(alone, tail)
        np.testing.assert_allclose(value, minimum, atol=1e-5)
        np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_bucket_of_a_student_that_leaves_next_to_nothing_outside():
    # The rest has 1e-12 of the student's mass, which 1 - (mass on S) in float32 would make 0 or negative.
    student = np.full((1, 8), -28.0, np.float32)
    student[0, :2] = 0.5, 0.0
    ids, kept = np.array([[0, 1]]), np.array([[0.5, 0.2]])

    def total(logits):
        return divergence64(logits, ids, kept, 1.0, "bucket").sum()

    def loss(logits):
        return top_k_divergence(logits, ids, np.log(kept), np.ones(1), 1.0, "bucket")[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(student)
    np.testing.assert_allclose(value, total(student), rtol=1e-5)
    np.testing.assert_allclose(gradient, numerical_gradient(total, student), atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_classes_that_do_not_exist(tail):
    student, teacher, weights = random_case(5)
    long_student, long_teacher = (np.pad(x, ((0, 0), (0, 6)), constant_values=-np.inf) for x in (student, teacher))
    for k in (4, student.shape[-1] + 2):  # the second keeps classes of probability 0 and leaves no others
        ids, log_p, _ = top_k_targets(long_teacher, k, 2.0)

        def loss(logits, ids=ids, log_p=log_p):
            return top_k_divergence(logits, ids, log_p, weights, 2.0, tail)[0]

        value, gradient = jax.jit(jax.value_and_grad(loss))(long_student)
        short_ids, kept = top_k64(teacher, min(k, student.shape[-1]), 2.0)
        expected = (divergence64(student, short_ids, kept, 2.0, tail) * weights).sum()
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        assert np.all(np.isfinite(gradient)) and not np.any(gradient[:, student.shape[-1] :])


@pytest.mark.parametrize("tail", [*TAILS, "sampled"])
def test_positions_without_weight_change_nothing(tail):
    student, teacher, weights = random_case(6)
    ids, log_p, _ = top_k_targets(teacher, 4, 2.0)

    def loss(logits, ids, values, entropy):
        if tail == "sampled":
            return sampled_divergence(logits, ids, values, entropy, weights, 2.0)[0]
        return top_k_divergence(logits, ids, values, weights, 2.0, tail)[0]

    def spoil(values, with_what):
        silent = (weights == 0).reshape(-1, *[1] * (np.ndim(values) - 1))
        return np.where(silent, with_what, values).astype(values.dtype)

    run = jax.jit(jax.value_and_grad(loss))
    entropy = np.ones(len(weights), np.float32)
    value, gradient = run(student, ids, log_p, entropy)
    other = run(spoil(student, np.nan), spoil(np.asarray(ids), 10**6), spoil(np.asarray(log_p), np.nan), entropy)
    assert value == other[0]
    np.testing.assert_array_equal(gradient, other[1])
    assert not np.any(other[1][weights == 0])
    weights = 0 * weights
    nothing = jax.jit(jax.value_and_grad(loss))(student, ids, log_p, entropy)
    assert nothing[0] == 0.0 and not np.any(nothing[1])


def test_values_that_were_cached_in_16_bits():
    student, teacher, weights = random_case(7, classes=200)
    ids, log_p, _ = top_k_targets(teacher, 20, 2.0)
    for tail in TAILS:
        exact = top_k_divergence(student, ids, log_p, weights, 2.0, tail)[0]
        rounded = top_k_divergence(student, ids.astype(jnp.uint16), log_p.astype(jnp.float16), weights, 2.0, tail)[0]
        np.testing.assert_allclose(rounded, exact, rtol=5e-3)


def draws(teacher, samples, power, temperature, seed=0, stratified=False):
    """Sampled targets of every position of the teacher."""
    uniforms = np.random.default_rng(seed).random((len(teacher), samples)).astype(np.float32)
    if stratified:
        uniforms = ((np.arange(samples) + uniforms) / samples).astype(np.float32)
    return sample(uniforms, teacher, samples, power, temperature)


def as_distribution(ids, weights, classes):
    """The weighted sum of one-hot vectors, float64 [B, V]."""
    result = np.zeros((len(ids), classes))
    np.add.at(result, (np.arange(len(ids))[:, None], np.asarray(ids)), np.asarray(weights, np.float64))
    return result


@pytest.mark.parametrize("power, stratified", [(1.0, False), (0.5, False), (1.3, False), (0.7, True)])
def test_samples_are_unbiased(power, stratified):
    positions, classes, samples, temperature = 20_000, 7, 4, 1.5
    one = np.random.default_rng(1).normal(0, 1.5, classes).astype(np.float32)
    teacher = np.tile(one, (positions, 1))
    ids, weights, entropy = draws(teacher, samples, power, temperature, stratified=stratified)
    p = softmax64(one, temperature)
    estimates = as_distribution(ids, weights, classes)
    error = estimates.std(0) / np.sqrt(positions)
    assert np.all(np.abs(estimates.mean(0) - p) < 4.5 * error + 1e-6)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), rtol=1e-5)
    if power == 1:
        np.testing.assert_allclose(weights, 1 / samples, rtol=1e-6)
    # The proposal is p ** power: how often each class is drawn.
    proposal = p**power / (p**power).sum()
    share = np.bincount(np.asarray(ids).reshape(-1), minlength=classes) / ids.size
    assert np.all(np.abs(share - proposal) < 4.5 * np.sqrt(proposal / ids.size))


@pytest.mark.parametrize("power", [1.0, 0.6])
def test_sampled_divergence_and_gradient_are_unbiased(power):
    positions, classes, temperature = 20_000, 6, 2.0
    rng = np.random.default_rng(2)
    student, teacher = rng.normal(0, 1.5, (2, classes)).astype(np.float32)
    ids, sample_weights, entropy = draws(np.tile(teacher, (positions, 1)), 3, power, temperature)
    weights = np.ones(positions, np.float32)

    def each(logits):
        parts = (ids[:, None], sample_weights[:, None], entropy[:, None], weights[:, None])
        return jax.vmap(lambda x, i, s, e, w: sampled_divergence(x[None], i, s, e, w, temperature)[0])(logits, *parts)

    values, pull = jax.vjp(each, jnp.tile(student, (positions, 1)))
    gradients = np.asarray(pull(jnp.ones(positions))[0], np.float64)
    p, q = softmax64(teacher, temperature), softmax64(student, temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum()
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - expected) < 4.5 * values.std() / np.sqrt(positions)
    error = 4.5 * gradients.std(0) / np.sqrt(positions)
    assert np.all(np.abs(gradients.mean(0) - temperature * (q - p)) < error)


def test_sampled_divergence_and_gradient_are_those_of_the_definition():
    temperature = 1.3
    student, teacher, weights = random_case(8, classes=9)
    ids, sample_weights, entropy = draws(teacher, 5, 0.8, temperature)

    def total(logits):
        log_q = np.log(softmax64(logits, temperature))
        cross = (np.asarray(sample_weights, np.float64) * np.take_along_axis(log_q, np.asarray(ids), -1)).sum(-1)
        return (temperature**2 * (-np.asarray(entropy, np.float64) - cross) * weights).sum()

    def loss(logits, temperature):
        return sampled_divergence(logits, ids, sample_weights, entropy, weights, temperature)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(student, temperature)
    np.testing.assert_allclose(value, total(student), rtol=1e-5)
    np.testing.assert_allclose(gradient, numerical_gradient(total, student), atol=2e-6)


def test_what_is_drawn_depends_on_the_position_alone():
    _, teacher, _ = random_case(9, positions=12, classes=300)
    uniforms = np.random.default_rng(3).random((12, 8)).astype(np.float32)
    whole = sample(uniforms, teacher, 8, 0.8, 2.0)
    parts = [sample(uniforms[rows], teacher[rows], 8, 0.8, 2.0) for rows in (slice(0, 6), slice(6, 12))]
    np.testing.assert_array_equal(whole[0], np.concatenate([part[0] for part in parts]))
    for index in (1, 2):
        np.testing.assert_allclose(whole[index], np.concatenate([part[index] for part in parts]), rtol=1e-6)


def test_a_class_is_the_first_whose_cumulated_mass_is_above_the_uniform():
    # Masses that are powers of two, so that sums are exact; 0.25 lies on an edge.
    teacher = np.log(np.array([[0.25, 0.5, 0.125, 0.125]])).astype(np.float32)
    uniforms = np.array([[0.0, 0.2, 0.26, 0.7, 0.8, 0.9, 0.9999999]], np.float32)
    ids, _, _ = sample(uniforms, teacher, 7, 1.0, 1.0)
    np.testing.assert_array_equal(ids, [[0, 0, 1, 1, 2, 3, 3]])


def test_classes_of_probability_zero_are_never_drawn():
    rng = np.random.default_rng(4)
    teacher = rng.normal(0, 3, (50, 333)).astype(np.float32)
    gone = rng.random(teacher.shape) < 0.5
    gone[:, -100:] = True
    gone[:, 3] = False
    teacher[gone] = -np.inf
    uniforms = rng.random((50, 64)).astype(np.float32)
    uniforms[:, 0], uniforms[:, 1] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    ids, weights, entropy = sample(uniforms, teacher, 64, 0.5, 1.0)
    assert not np.any(np.take_along_axis(gone, np.asarray(ids), -1))
    assert np.all(np.isfinite(weights)) and np.all(np.isfinite(entropy)) and np.all(weights > 0)


def test_draws_invert_the_cumulated_proposal():
    rng = np.random.default_rng(10)
    teacher = rng.normal(0, 2, (20, 1000)).astype(np.float32)
    uniforms = rng.random((20, 128)).astype(np.float32)
    ids, _, _ = sample(uniforms, teacher, 128, 0.7, 1.0)
    proposal = softmax64(teacher) ** 0.7
    cumulated = np.cumsum(proposal, -1) / proposal.sum(-1, keepdims=True)
    expected = np.stack([np.searchsorted(row, wanted, "right") for row, wanted in zip(cumulated, uniforms)])
    assert np.mean(ids == expected) > 0.995  # float32 sums decide otherwise next to an edge
    assert np.max(np.abs(ids - expected)) <= 1


def test_rounding_at_the_edge_of_a_group_draws_no_class_of_probability_zero():
    rng = np.random.default_rng(11)
    teacher = rng.normal(0, 2, (200, 192)).astype(np.float32)
    teacher[:, 64:128] = -np.inf  # classes are cumulated in groups of 64
    p = softmax64(teacher)
    edge = p[:, :64].sum(-1).astype(np.float32)
    uniforms = (edge[:, None] + np.arange(-8, 8) * np.spacing(edge)[:, None]).astype(np.float32)
    ids, weights, _ = sample(uniforms, teacher, 16, 1.0, 1.0)
    assert not np.any((ids >= 64) & (ids < 128))
    np.testing.assert_allclose(weights, 1 / 16, rtol=1e-5)


def test_uniforms_of_another_shape_are_an_error():
    with pytest.raises(ValueError, match="uniforms"):
        sampled_targets(np.zeros((6, 3), np.float32), random_case()[1], 4, 1.0, 1.0)


@pytest.mark.parametrize("kind", ["bucket", "sampled"])
def test_beside_a_hard_loss_in_blocks(kind):
    rng = np.random.default_rng(5)
    rows, slots, hidden, classes, temperature = 4, 3, 5, 40, 2.0
    features = jnp.asarray(rng.normal(size=(rows, slots, hidden)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(classes, hidden)), jnp.float32)
    teacher = rng.normal(0, 2, (rows * slots, classes)).astype(np.float32)
    weights = (rng.random((rows, slots)) < 0.8).astype(np.float32)
    targets = rng.integers(0, classes, (rows, slots)).astype(np.int32)
    if kind == "bucket":
        kept = top_k_targets(teacher, 6, temperature)[:2]
    else:
        kept = draws(teacher, 6, 0.9, temperature)
    per_position = {
        "kept": tuple(values.reshape(rows, slots, *values.shape[1:]) for values in kept),
        "weights": weights,
        "targets": targets,
    }

    def loss(logits, per_position, constants):
        weights = per_position["weights"]
        if kind == "bucket":
            ids, log_p = per_position["kept"]
            soft = top_k_divergence(logits, ids, log_p, weights, constants, "bucket")[0]
        else:
            ids, sample_weights, entropy = per_position["kept"]
            soft = sampled_divergence(logits, ids, sample_weights, entropy, weights, constants)[0]
        hard = masked_cross_entropy(logits, per_position["targets"], weights)[0]
        return 0.3 * soft + 0.7 * hard, {"kl": soft, "mlm": hard}

    def in_blocks(features, table):
        return blocked_losses(loss, features, table, None, per_position, jnp.float32(temperature), block=5)

    def at_once(features, table):
        flat = jax.tree.map(lambda values: values.reshape(-1, *values.shape[2:]), per_position)
        return loss(features.reshape(-1, hidden) @ table.T, flat, jnp.float32(temperature))

    results = [jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(features, table) for f in (in_blocks, at_once)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *results)
