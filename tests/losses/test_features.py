"""Distances of hidden states and divergence of relations against float64 NumPy, packed and padded, and at the edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.losses.features import check_relation_heads, hidden_distance, relation_divergence, text_means
from kd_jax.types import UserError

SEGMENTS = np.array([[1, 1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]], np.int32)


def states(seed, *shape, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


def expected_distances(student, teacher, kind):
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    if kind == "mse":
        return ((student - teacher) ** 2).mean(-1)
    lengths = np.linalg.norm(student, axis=-1) * np.linalg.norm(teacher, axis=-1)
    return 1 - (student * teacher).sum(-1) / lengths


def expected_distance_gradients(student, teacher, kind):
    student, teacher = student.astype(np.float64), teacher.astype(np.float64)
    if kind == "mse":
        return 2 * (student - teacher) / student.shape[-1]
    size = np.linalg.norm(student, axis=-1, keepdims=True)
    direction, wanted = student / size, teacher / np.linalg.norm(teacher, axis=-1, keepdims=True)
    return (direction * (direction * wanted).sum(-1, keepdims=True) - wanted) / size


@pytest.mark.parametrize("kind", ["cosine", "mse"])
@pytest.mark.parametrize("apart", [1.0, 1e-3])
def test_hidden_distance_matches_float64(kind, apart):
    teacher = states(0, 3, 7, 10, scale=2.0)
    student = (teacher + apart * states(1, 3, 7, 10)) * np.float32(1.3 if kind == "cosine" else 1.0)
    weights = (SEGMENTS > 0).astype(np.float32)
    total, count = jax.jit(lambda s, t: hidden_distance(s, t, weights, kind))(student, teacher)
    expected = (expected_distances(student, teacher, kind) * weights).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert total.dtype == jnp.float32 and count == weights.sum()
    gradient = jax.jit(jax.grad(lambda s: 3.0 * hidden_distance(s, teacher, weights, kind)[0]))(jnp.asarray(student))
    expected = 3.0 * expected_distance_gradients(student, teacher, kind) * weights[..., None]
    np.testing.assert_allclose(gradient, expected, atol=2e-5 * np.abs(expected).max())


def expected_relation(vectors, heads):
    """Relations of one text, float64 [heads, tokens, tokens]: whole vectors, split anew, a softmax for each token."""
    tokens = len(vectors)
    split = np.asarray(vectors, np.float64).reshape(tokens, -1)
    size = split.shape[1] // heads
    relations = np.zeros((heads, tokens, tokens))
    for head in range(heads):
        part = split[:, head * size : (head + 1) * size]
        scores = np.exp(part @ part.T / np.sqrt(size))
        relations[head] = scores / scores.sum(1, keepdims=True)
    return relations


def expected_divergence(student, teacher, segments, heads):
    total = 0.0
    for row in range(len(segments)):
        for segment in range(1, segments[row].max() + 1):
            here = segments[row] == segment
            p, q = expected_relation(teacher[row, here], heads), expected_relation(student[row, here], heads)
            total += (p * np.log(p / q)).sum() / heads
    return total


@pytest.mark.parametrize("heads", [1, 3, 6])
def test_relation_divergence_matches_float64_where_widths_and_heads_differ(heads):
    student, teacher = states(0, 3, 7, 2, 6), states(1, 3, 7, 3, 10)
    total, count = jax.jit(lambda s, t: relation_divergence(s, t, SEGMENTS, heads))(student, teacher)
    np.testing.assert_allclose(total, expected_divergence(student, teacher, SEGMENTS, heads), rtol=1e-5)
    assert total.dtype == jnp.float32 and count == (SEGMENTS > 0).sum()

    def loss(s):
        return 3.0 * relation_divergence(s, teacher, SEGMENTS, heads)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(jnp.asarray(student))
    np.testing.assert_allclose(value, 3.0 * total, rtol=1e-6)
    assert gradient.shape == student.shape
    for seed in range(3):
        # The reference's own slope along a direction, by central differences in float64.
        direction = np.random.default_rng(seed).normal(size=student.shape)
        up, down = (
            expected_divergence(student.astype(np.float64) + step * direction, teacher, SEGMENTS, heads)
            for step in (1e-5, -1e-5)
        )
        np.testing.assert_allclose((gradient * direction).sum(), 3.0 * (up - down) / 2e-5, rtol=1e-4)


def terms(student, teacher, segments):
    """Every loss of this module, of states shaped [R, L, N, D]."""
    flat_student, flat_teacher = (x.reshape(*x.shape[:2], -1) for x in (student, teacher))
    weights = (segments > 0).astype(np.float32)
    yield relation_divergence(student, teacher, segments, 3)
    for kind in ("cosine", "mse"):
        yield hidden_distance(flat_student, flat_teacher, weights, kind)


def test_a_packed_row_gives_the_sum_of_its_texts_alone_and_padding_adds_nothing():
    student, teacher = states(0, 3, 7, 2, 6), states(1, 3, 7, 2, 6)
    # Each text in a row of its own, filled up with large states that must not matter.
    texts = [(row, SEGMENTS[row] == segment) for row in range(3) for segment in range(1, SEGMENTS[row].max() + 1)]
    alone = [np.full((len(texts), 9, 2, 6), 50.0, np.float32) for _ in range(2)]
    segments = np.zeros((len(texts), 9), np.int32)
    for index, (row, here) in enumerate(texts):
        for side, values in zip(alone, (student, teacher), strict=True):
            side[index, : here.sum()] = values[row, here]
        segments[index, : here.sum()] = 1
    alone[0][segments == 0] *= -3.0
    packed = list(terms(student, teacher, SEGMENTS))
    for (total, count), (other, other_count) in zip(packed, terms(alone[0], alone[1], segments), strict=True):
        np.testing.assert_allclose(total, other, rtol=1e-5)
        assert count == other_count == 13


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_identical_states_give_exactly_zero_and_no_gradient(dtype, scale):
    x = jnp.asarray(states(0, 4, 64, 6, 16, scale=scale), dtype)
    segments = np.repeat(np.arange(64)[None] // 20, 4, 0).astype(np.int32)

    def loss(student, teacher):
        values = [total for total, _ in terms(student, teacher, segments)]
        return sum(values), values

    gradient, values = jax.jit(jax.grad(loss, has_aux=True))(x, x + 0)
    assert [float(value) for value in values] == [0.0, 0.0, 0.0]
    assert gradient.dtype == dtype and not np.any(gradient)
    # Also where one is made from the other, so that the compiler sees that they are the same.
    assert not np.any(jax.jit(jax.grad(lambda s: loss(s, jax.lax.stop_gradient(s))[0]))(x))


def test_the_teacher_gets_no_gradient():
    student, teacher = states(0, 3, 7, 2, 6), jnp.asarray(states(1, 3, 7, 2, 6))
    gradient = jax.grad(lambda t: sum(total for total, _ in terms(student, t, SEGMENTS)))(teacher)
    assert not np.any(gradient)


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_rows_without_tokens_and_extreme_states_are_safe(value):
    teacher = states(1, 3, 7, 2, 6)

    def loss(student, segments):
        return sum(total for total, _ in terms(student, teacher, segments))

    student = jnp.full((3, 7, 2, 6), value)
    none = np.zeros_like(SEGMENTS)
    assert loss(student, none) == 0.0
    assert not np.any(jax.grad(loss)(student, none))
    assert [float(count) for _, count in terms(student, teacher, none)] == [0.0, 0.0, 0.0]
    assert np.isfinite(loss(student, SEGMENTS))
    gradient = jax.grad(loss)(student, SEGMENTS)
    assert np.all(np.isfinite(gradient)) and not np.any(gradient[SEGMENTS == 0])


def test_bfloat16_states_are_reduced_in_float32():
    student, teacher = (jnp.asarray(states(seed, 3, 7, 2, 6), jnp.bfloat16) for seed in range(2))
    wide = terms(np.asarray(student, np.float32), np.asarray(teacher, np.float32), SEGMENTS)
    for (total, _), (expected, _) in zip(terms(student, teacher, SEGMENTS), wide, strict=True):
        assert total.dtype == jnp.float32
        np.testing.assert_allclose(total, expected, rtol=1e-4)


def test_memory_is_that_of_one_relation_head():
    def temporary_bytes(heads):
        x = jax.ShapeDtypeStruct((2, 64, 1, 96), jnp.float32)
        run = jax.jit(jax.grad(lambda s, t: relation_divergence(s, t, np.ones((2, 64), np.int32), heads)[0]))
        return run.lower(x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(24) < temporary_bytes(1) + 3 * 4 * 2 * 64 * 96


def test_what_cannot_be_computed_is_refused():
    student, teacher = states(0, 1, 4, 2, 6), states(1, 1, 4, 2, 10)
    with pytest.raises(ValueError, match="5 relation heads do not divide"):
        relation_divergence(student, teacher, SEGMENTS[:1, :4], 5)
    with pytest.raises(ValueError, match="'euclid' is not one of"):
        hidden_distance(student, student, np.ones((1, 4)), "euclid")  # pyright: ignore
    check_relation_heads(4, 12, 20, "distill.relations.heads")
    for heads, whose in ((5, "student"), (3, "teacher"), (0, "student")):
        with pytest.raises(UserError, match=rf"config\.distill\.relations\.heads: .* the {whose}'s hidden_size"):
            check_relation_heads(heads, 12, 20, "distill.relations.heads")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_of_a_text_goes_over_its_own_tokens(dtype):
    values = jnp.asarray(states(0, 3, 7, 5), dtype)
    found = text_means(values, SEGMENTS, 4)
    assert found.shape == (3, 4, 5) and found.dtype == dtype
    whole = np.asarray(values, np.float64)
    for row in range(3):
        for slot in range(4):
            mine = SEGMENTS[row] == slot + 1
            expected = whole[row, mine].mean(axis=0) if mine.any() else np.zeros(5)
            tolerance = 1e-6 if dtype == jnp.float32 else 1e-2
            np.testing.assert_allclose(np.asarray(found[row, slot], np.float64), expected, atol=tolerance)
