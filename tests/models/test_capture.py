"""Captured states: each is the right one, scanned layers give those of unrolled ones, and `hidden` stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.functional import Functional
from tests.support.small_models import FAMILIES, packed_batch, parameters, small_config, with_alone

ROWS = [[7, 12, 3], [20], [5, 5]]
LENGTH = 24
WANTED = {"layers": (2, 0), "projections": (1,), "embeddings": True}


def model_and_params(family, **changes):
    """Loops do not touch the parameters, so models that differ in them share theirs."""
    return Functional("mlm", small_config(family, **changes)), parameters(Functional("mlm", small_config(family)))


def assert_trees_close(first, second, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), first, second)


@pytest.mark.parametrize("scan", ["scan", "unroll"])
def test_hidden_compiles_to_the_same_when_nothing_is_captured(scan):
    model, _ = model_and_params("modernbert", scan=scan)
    batch = packed_batch(ROWS, LENGTH)

    def text(run):
        return jax.jit(lambda params, batch: run(params, batch)).lower(model.abstract(), batch).as_text()

    assert text(model.hidden) == text(lambda params, batch: model.capture(params, batch).hidden)
    shapes = jax.eval_shape(model.capture, model.abstract(), batch)
    assert (shapes.embeddings, shapes.layers, shapes.projections) == (None, {}, {})


@pytest.mark.parametrize("family", FAMILIES)
def test_scan_unroll_remat_and_hidden_agree(family):
    batch = packed_batch(ROWS, LENGTH)
    results = []
    for scan, remat in (("scan", False), ("unroll", True)):
        model, params = model_and_params(family, scan=scan, remat=remat)
        run = jax.jit(lambda params, model=model: (model.capture(params, batch, **WANTED), model.hidden(params, batch)))
        captured, hidden = run(params)
        np.testing.assert_allclose(captured.hidden, hidden, atol=1e-6)
        results.append(captured)
    first = results[0]
    assert set(first.layers) == {0, 2} and set(first.projections) == {1}
    assert first.embeddings.shape == first.layers[0].shape == (3, LENGTH, 16)
    assert [part.shape for part in first.projections[1]] == [(3, LENGTH, 2, 8)] * 3
    for other in results[1:]:
        assert_trees_close(first._asdict(), other._asdict(), atol=1e-5)


@pytest.mark.parametrize("family, scan", [("bert", "scan"), ("xlmr_xl", "unroll"), ("modernbert", "scan")])
def test_states_are_those_of_a_model_cut_there(family, scan):
    # The state after layer 1 is what a model of two layers gives without a final norm.
    model, params = model_and_params(family, scan=scan)
    batch = packed_batch(ROWS, LENGTH)
    encoder = params["encoder"]
    cut = {name: tree for name, tree in encoder.items() if name != "final_norm"}
    cut["layers"] = jax.tree.map(lambda leaf: leaf[:2], encoder["layers"])
    silent = {**encoder, "layers": jax.tree.map(jnp.zeros_like, encoder["layers"])}
    smaller = Functional("mlm", dataclasses.replace(model.config, num_layers=2, final_norm=False))
    run = jax.jit(lambda params: model.capture(params, batch, layers=(1, 2), embeddings=True))
    captured = run(params)
    expected = jax.jit(smaller.hidden)({**params, "encoder": cut}, batch)
    np.testing.assert_allclose(captured.layers[1], expected, atol=1e-5)
    if model.config.norm_placement == "pre":
        # Layers that add nothing leave the embeddings as they are.
        np.testing.assert_array_equal(run({**params, "encoder": silent}).layers[2], captured.embeddings)
    else:
        np.testing.assert_array_equal(captured.layers[2], captured.hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_linear_maps_of_what_attention_reads(family):
    # In float64 NumPy: neither turned by rotary positions nor scaled, and of the normed states in pre-norm layers.
    model, params = model_and_params(family)
    batch = packed_batch(ROWS, LENGTH)
    captured = jax.jit(lambda params: model.capture(params, batch, layers=(0,), projections=(0, 1), embeddings=True))(
        params
    )
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["encoder"]["layers"])
    for layer, read in ((0, captured.embeddings), (1, captured.layers[0])):
        x = np.asarray(read, np.float64)
        if model.config.norm_placement == "pre" and not (model.config.skip_first_attention_norm and layer == 0):
            norm = layers["attention_norm"]
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + model.config.norm_epsilon)
            x = x * norm["scale"][layer] + (norm["bias"][layer] if "bias" in norm else 0.0)
        linear = layers["attention"]["query_key_value"]
        expected = np.einsum("rlh,hpnd->prlnd", x, linear["kernel"][layer])
        if "bias" in linear:
            expected += linear["bias"][layer][:, None, None]
        for part in range(3):
            np.testing.assert_allclose(captured.projections[layer][part], expected[part], atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_packed_states_equal_those_of_texts_alone(family):
    model, params = model_and_params(family)
    batch, places = with_alone(packed_batch(ROWS, LENGTH))
    captured = jax.jit(lambda params, batch: model.capture(params, batch, **WANTED))(params, batch)
    for state in jax.tree.leaves(captured._asdict()):
        assert np.all(np.isfinite(state))
        packed, apart = state[: len(ROWS)], state[len(ROWS) :]
        for index, (row, columns) in enumerate(places):
            alone = apart[index, : columns.stop - columns.start]
            np.testing.assert_allclose(packed[row, columns], alone, atol=1e-4)


def test_gradients_through_captured_states_agree_between_scan_and_unroll():
    batch = packed_batch(ROWS, LENGTH)
    results = []
    for scan, remat in (("scan", True), ("unroll", False)):
        model, params = model_and_params("modernbert", scan=scan, remat=remat, dropout=0.3)

        def loss(params, model=model):
            captured = model.capture(params, batch, jax.random.key(0), layers=(0, 1), projections=(1,), embeddings=True)
            weights = 1.0 + jnp.arange(LENGTH)[None, :, None] / LENGTH
            states = [captured.embeddings, *captured.layers.values()]
            states += [part.reshape(*part.shape[:2], -1) for part in captured.projections[1]]
            return sum(jnp.sum(jnp.sin(state) * weights) for state in (captured.hidden, *states))

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    (value, gradient), (other_value, other_gradient) = results
    np.testing.assert_allclose(value, other_value, rtol=1e-5)
    scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert_trees_close(gradient, other_gradient, atol=1e-5 * scale, rtol=1e-5)


def test_scan_keeps_the_wanted_states_alone():
    # With remat a gradient needs one state of each layer, the one that the layer starts from; capturing adds none.
    batch = packed_batch([[20]] * 64, LENGTH)
    state = 64 * LENGTH * 16 * 4

    def temporary_bytes(num_layers):
        model = Functional("mlm", small_config("bert", num_layers=num_layers, remat=True))

        def loss(params):
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(model.capture(params, batch, **WANTED)))

        return jax.jit(jax.grad(loss)).lower(model.abstract()).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(24) - temporary_bytes(6) < 1.2 * (24 - 6) * state


def test_bfloat16_states_come_in_the_compute_dtype():
    model = dataclasses.replace(model_and_params("modernbert")[0], compute_dtype="bfloat16")
    shapes = jax.eval_shape(
        lambda params: model.capture(params, packed_batch(ROWS, LENGTH), **WANTED), model.abstract()
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("wanted", [{"layers": (3,)}, {"layers": (-1,)}, {"projections": (0, 7)}])
def test_layers_that_are_not_there_are_refused(wanted):
    model, params = model_and_params("bert")
    with pytest.raises(ValueError, match="is not one of the 3 layers"):
        model.capture(params, packed_batch(ROWS, LENGTH), **wanted)
