"""Packing, local attention, loops over layers, dtypes and dropout of the encoder, for each family."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.compile_check.hlo import Program
from kd_jax.config.execution import Mesh
from kd_jax.models.attention import rotary_tables, rotate
from kd_jax.models.encoder import by_rows
from kd_jax.models.encoder_config import PRESETS, encoder_config
from kd_jax.models.functional import Functional
from kd_jax.trainer.mesh import batch_sharding, make_mesh, shardings
from kd_jax.types import UserError, row_axes
from tests.support.small_models import FAMILIES, packed_batch, parameters, small_config, with_alone

ROWS = [[7, 12, 3], [20], [5, 5]]
LENGTH = 24


def model_and_params(family, **changes):
    """Loops, dtypes and dropout do not touch the parameters, so models that differ in them share theirs."""
    model = Functional("mlm", small_config(family, **changes))
    return model, parameters(Functional("mlm", small_config(family)))


def check_grads_equal(first, second, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance), first, second)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_row_equals_its_texts_alone(family):
    model, params = model_and_params(family)
    batch, places = with_alone(packed_batch(ROWS, LENGTH))
    hidden = np.asarray(jax.jit(model.hidden)(params, batch))
    packed, apart = hidden[: len(ROWS)], hidden[len(ROWS) :]
    assert np.all(np.isfinite(hidden))
    for index, (row, columns) in enumerate(places):
        size = columns.stop - columns.start
        np.testing.assert_allclose(packed[row, columns], apart[index, :size], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_values_and_other_texts_change_nothing(family):
    model, params = model_and_params(family)
    batch = packed_batch(ROWS, LENGTH)
    padding = batch["segment_ids"] == 0
    other = {name: values.copy() for name, values in batch.items()}
    other["tokens"][padding] = 9
    other["positions"][padding] = 3
    other["tokens"][0, 7:19] = 11  # the second text of the first row
    changed = padding.copy()
    changed[0, 7:19] = True
    wanted = jax.random.normal(jax.random.key(0), (*padding.shape, 16)) * ~changed[..., None]

    def loss(params, batch):
        hidden = model.hidden(params, batch)
        return jnp.sum(hidden * wanted), hidden

    run = jax.jit(jax.grad(loss, has_aux=True))
    (gradient, hidden), (other_gradient, other_hidden) = run(params, batch), run(params, other)
    np.testing.assert_array_equal(np.asarray(hidden)[~changed], np.asarray(other_hidden)[~changed])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))
    check_grads_equal(gradient, other_gradient, 1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_scan_unroll_and_remat_agree(family):
    batch = packed_batch(ROWS, LENGTH)
    wanted = jax.random.normal(jax.random.key(0), (*batch["tokens"].shape, 16))
    results = []
    for scan, remat in (("scan", False), ("scan", True), ("unroll", False), ("unroll", True)):
        model, params = model_and_params(family, scan=scan, remat=remat)

        def loss(params, model=model):
            return jnp.sum(model.hidden(params, batch) * wanted)

        results.append(jax.jit(jax.value_and_grad(loss))(params))
    for value, gradient in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-5)
        scale = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(results[0][1]))
        check_grads_equal(gradient, results[0][1], 1e-5 * scale)


@pytest.mark.parametrize("scan", ["scan", "unroll"])
def test_local_attention_reaches_half_a_window(scan):
    config = small_config("modernbert", scan=scan)
    model = Functional("mlm", config)
    params = parameters(model)
    # Layers 1 and 2 are local; layer 0 is global, so its attention is silenced.
    kernel = params["encoder"]["layers"]["attention"]["output"]["kernel"]
    params["encoder"]["layers"]["attention"]["output"]["kernel"] = kernel.at[0].set(0)
    batch = packed_batch([[20]], 20)
    changed = {name: values.copy() for name, values in batch.items()}
    changed["tokens"][0, 10] = batch["tokens"][0, 10] % 40 + 1
    run = jax.jit(model.hidden)
    difference = np.abs(run(params, batch) - run(params, changed)).max(-1)[0]
    reached = np.flatnonzero(difference > 1e-6)
    # Two local layers of two tokens on either side, the bound itself included.
    np.testing.assert_array_equal(reached, np.arange(10 - 4, 10 + 4 + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_float32(family):
    model, params = model_and_params(family)
    batch = packed_batch(ROWS, LENGTH)
    wide = np.asarray(jax.jit(model.hidden)(params, batch))
    narrow = jax.jit(dataclasses.replace(model, compute_dtype="bfloat16").hidden)(params, batch)
    assert narrow.dtype == jnp.bfloat16
    used = batch["segment_ids"] > 0
    error = np.abs(np.asarray(narrow, np.float32) - wide)[used]
    assert error.mean() < 0.01 * np.abs(wide[used]).mean() + 0.005


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_dropout_follows_its_key(family):
    model, params = model_and_params(family, dropout=0.5, attention_dropout=0.5)
    batch = packed_batch(ROWS, LENGTH)
    run = jax.jit(model.hidden)
    first = run(params, batch, jax.random.key(0))
    np.testing.assert_array_equal(first, run(params, batch, jax.random.key(0)))
    assert np.abs(first - run(params, batch, jax.random.key(1))).max() > 0.1
    unrolled = dataclasses.replace(model, config=dataclasses.replace(model.config, scan="unroll", remat=True))
    np.testing.assert_allclose(jax.jit(unrolled.hidden)(params, batch, jax.random.key(0)), first, atol=1e-5)
    without = jax.jit(model_and_params(family)[0].hidden)
    np.testing.assert_array_equal(without(params, batch, jax.random.key(0)), without(params, batch))


def test_rotation_matches_complex_multiplication():
    positions = np.array([[0, 1, 2, 0, 1]])
    x = np.random.default_rng(0).normal(size=(1, 5, 2, 6)).astype(np.float32)
    turned = rotate(jnp.asarray(x), rotary_tables(jnp.asarray(positions), 5, 6, 100.0))
    angle = positions[0][:, None] / 100.0 ** (np.arange(0, 6, 2) / 6)
    expected = (x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * angle)[None, :, None, :]
    np.testing.assert_allclose(turned, np.concatenate([expected.real, expected.imag], -1), atol=1e-6)


@pytest.mark.parametrize("family, first_row", [("bert", 0), ("roberta", 2)])
def test_positions_are_read_from_their_offset(family, first_row):
    model, params = model_and_params(family)
    assert params["encoder"]["embeddings"]["positions"].shape == (40 + first_row, 16)
    batch = packed_batch([[3, 4]], 8)
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.hidden(p, batch)[0, :7] ** 3)))(params)
    read = np.flatnonzero(np.abs(gradient["encoder"]["embeddings"]["positions"]).max(-1) > 1e-6)
    np.testing.assert_array_equal(read, first_row + np.arange(4))


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"num_heads": 3}, "encoder.num_heads"),
        ({"activation": "swish"}, "encoder.activation"),
        ({"positions": "alibi"}, "encoder.positions"),
        ({"num_layers": 0}, "encoder.num_layers"),
        ({"vocab_size": 100}, "encoder.vocab_size"),
    ],
)
def test_bad_configs_name_the_key(changes, key):
    with pytest.raises(UserError, match=key):
        encoder_config(PRESETS["student_small"] | changes, 8000)


def test_rows_longer_than_the_positions_are_refused():
    model, params = model_and_params("bert")
    with pytest.raises(UserError, match=r"rows\.length"):
        model.hidden(params, packed_batch([[20, 21]], 41))


def in_mesh(mesh):
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def test_layers_are_gathered_and_activations_are_not_summed():
    mesh = make_mesh(Mesh(data=1, fsdp=8, tensor=1))
    model = Functional("mlm", small_config("modernbert"))
    batch = packed_batch([[7, 5]] * 8, 16)
    params = parameters(model)
    expected = np.asarray(model.hidden(params, batch))
    placed = jax.device_put(params, shardings(mesh, model.logical_axes(), model.abstract()))
    rows = jax.device_put(batch, batch_sharding(mesh))

    def compiled(context):
        def hidden(params, batch):
            with context:
                return model.hidden(params, batch)

        return jax.jit(hidden).lower(placed, rows).compile()

    stated, left = compiled(in_mesh(mesh)), compiled(contextlib.nullcontext())
    in_loop = [{one.kind for one in Program(one.as_text()).collectives() if one.count > 1} for one in (stated, left)]
    assert in_loop[0] == {"all-gather"}
    assert "all-reduce" in in_loop[1], "XLA now finds the layout by itself, so by_rows may go"
    np.testing.assert_allclose(np.asarray(stated(placed, rows)), expected, atol=2e-5)


def test_without_a_mesh_or_with_rows_that_do_not_divide_nothing_is_said():
    mesh = make_mesh(Mesh(data=2, fsdp=4, tensor=1))
    x = np.ones((12, 2), np.float32)
    assert by_rows(x) is x and row_axes(8) == ((), 1)
    with in_mesh(mesh):
        assert by_rows(x) is x
        assert row_axes(8) == (("data", "fsdp"), 8)
    with in_mesh(make_mesh(Mesh(data=1, fsdp=4, tensor=2))):
        assert row_axes(8) == (("fsdp",), 4)
