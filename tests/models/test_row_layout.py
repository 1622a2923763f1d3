"""Rows stay on their devices: a model whose parameters are cut along the same axis is gathered layer by layer."""

import contextlib

import jax
import numpy as np

from kd_jax.compile_check.hlo import Program
from kd_jax.config.execution import Mesh
from kd_jax.models.functional import Functional
from kd_jax.models.row_layout import by_rows
from kd_jax.trainer.mesh import batch_sharding, make_mesh, shardings
from kd_jax.types import row_axes
from tests.support.small_models import packed_batch, parameters, small_config


def in_mesh(mesh):
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def test_layers_are_gathered_and_activations_are_not_summed():
    mesh = make_mesh(Mesh(1, 8, 1))
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
    mesh = make_mesh(Mesh(2, 4, 1))
    x = np.ones((12, 2), np.float32)
    assert by_rows(x) is x and row_axes(8) == ((), 1)
    with in_mesh(mesh):
        assert by_rows(x) is x
        assert row_axes(8) == (("data", "fsdp"), 8)
    with in_mesh(make_mesh(Mesh(1, 4, 2))):
        assert row_axes(8) == (("fsdp",), 4)
