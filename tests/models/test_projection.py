"""A student with its projections: trees, the student inside, the linear map, and settings that widths contradict."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.functional import Functional
from kd_jax.models.projection import WithProjections, needs_projection
from kd_jax.types import UserError
from tests.support.small_models import small_config

STUDENT = Functional("mlm", small_config("modernbert", num_layers=1))
MODEL = WithProjections(STUDENT, (("embeddings", 16, 40), ("hidden_0", 16, 24)))


def test_trees_agree_and_hold_the_student():
    params, abstract, axes = jax.eval_shape(MODEL.init, jax.random.key(0)), MODEL.abstract(), MODEL.logical_axes()
    assert jax.tree.structure(params) == jax.tree.structure(abstract)
    assert jax.tree.structure(abstract) == jax.tree.structure(axes, is_leaf=lambda value: isinstance(value, tuple))
    for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype) == (leaf.shape, jnp.float32)
    assert params["projections"]["embeddings"]["kernel"].shape == (16, 40)
    assert axes["projections"]["hidden_0"]["kernel"] == ("embed", None)
    assert MODEL.student_params(abstract) == STUDENT.abstract()
    assert MODEL.has("hidden_0") and not MODEL.has("hidden_1")
    assert hash(MODEL) == hash(WithProjections(STUDENT, MODEL.projections))


def test_the_student_starts_the_same_with_and_without_projections():
    key = jax.random.key(3)
    params, plain = jax.jit(lambda: (MODEL.init(key), STUDENT.init(key)))()
    jax.tree.map(np.testing.assert_array_equal, MODEL.student_params(params), plain)
    without = WithProjections(STUDENT)
    assert without.abstract() == STUDENT.abstract() and without.logical_axes() == STUDENT.logical_axes()
    assert not without.has("embeddings")
    kernels = [kernel["kernel"] for kernel in params["projections"].values()]
    # Each is drawn for itself, not from the random numbers of another parameter.
    drawn = [np.ravel(leaf)[:50] for leaf in (*kernels, params["encoder"]["embeddings"]["tokens"])]
    correlations = np.corrcoef(drawn)[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 0.5


def test_a_projection_is_a_linear_map_that_keeps_the_size():
    wide = WithProjections(STUDENT, (("hidden_0", 256, 384),))
    kernel = jax.jit(wide.init)(jax.random.key(0))["projections"]["hidden_0"]["kernel"]
    x = np.random.default_rng(0).normal(size=(2, 5, 256)).astype(np.float32)
    y = wide.project({"projections": {"hidden_0": {"kernel": kernel}}}, "hidden_0", jnp.asarray(x))
    expected = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    # Mean squares agree, up to the cut of the normal distribution (0.88 of its standard deviation).
    assert np.sqrt(np.mean(expected**2) / np.mean(x**2)) == pytest.approx(0.88, rel=0.1)
    narrow = wide.project({"projections": {"hidden_0": {"kernel": kernel}}}, "hidden_0", jnp.asarray(x, jnp.bfloat16))
    assert narrow.dtype == jnp.bfloat16


def test_needs_projection():
    assert needs_projection("auto", 16, 24, "distill.hidden.projection")
    assert needs_projection("always", 16, 24, "distill.hidden.projection")
    assert not needs_projection("auto", 16, 16, "distill.hidden.projection")
    assert not needs_projection("never", 16, 16, "distill.hidden.projection")


@pytest.mark.parametrize(
    "setting, widths, message",
    [
        ("always", (16, 16), "no projection is needed"),
        ("never", (16, 24), "a projection is missing, as the student is 16 wide and the teacher 24"),
        ("sometimes", (16, 24), "'sometimes' is unknown"),
    ],
)
def test_settings_that_contradict_the_widths(setting, widths: tuple[int, int], message):
    with pytest.raises(UserError, match=rf"config\.distill\.hidden\.projection: {message}"):
        needs_projection(setting, *widths, "distill.hidden.projection")
