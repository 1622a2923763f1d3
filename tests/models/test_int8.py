"""Matrices in int8: the error stays within half a scale, a channel's scale is its own, and the bytes are as counted."""

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from kd_jax.models.functional import Functional
from kd_jax.models.int8 import SCALE, dequantized, input_axes, quantized, weight_bytes
from tests.support.finished_runs import random_params
from tests.support.small_models import FAMILIES, small_config


@pytest.fixture(scope="module", params=FAMILIES)
def model_and_params(request):
    model = Functional("icner", small_config(request.param), intents=5, tags=7)
    return model, random_params(model)


def test_every_matrix_and_nothing_else_is_int8(model_and_params):
    _, params = model_and_params
    tensors = quantized(params)
    for name, leaf in flatten_dict(params, sep=".").items():
        matrix = name.endswith(("kernel", "embeddings.tokens", "embeddings.positions", "embeddings.types"))
        assert tensors[name].dtype == (np.int8 if matrix else np.float32), name
        assert (name + SCALE in tensors) == matrix
        if not matrix:
            np.testing.assert_array_equal(tensors[name], leaf)


def test_error_is_at_most_half_a_scale(model_and_params):
    _, params = model_and_params
    tensors, flat = quantized(params), flatten_dict(params, sep=".")
    for name, values in flatten_dict(dequantized(tensors), sep=".").items():
        bound = tensors[name + SCALE] / 2 if name + SCALE in tensors else 0.0
        assert (np.abs(np.asarray(values) - np.asarray(flat[name])) <= bound * (1 + 1e-5)).all(), name


def test_a_scale_belongs_to_one_output_channel_of_one_layer():
    model = Functional("dc", small_config("modernbert", num_layers=2), domains=3)
    params = random_params(model)
    for name, index in (
        ("encoder.layers.attention.query_key_value.kernel", (1, slice(None), 2, 0, 3)),  # [layers, H, 3, N, D]
        ("encoder.layers.attention.output.kernel", (0, slice(None), slice(None), 5)),  # [layers, N, D, H]
        ("encoder.embeddings.tokens", (4,)),
        ("domain_head.classifier.kernel", (slice(None), 1)),
    ):
        flat = {key: np.array(leaf) for key, leaf in flatten_dict(params, sep=".").items()}
        before = quantized(unflatten_dict(flat, sep="."))
        flat[name][index] *= 1000.0
        after = quantized(unflatten_dict(flat, sep="."))
        ratio = after[name + SCALE] / before[name + SCALE]
        assert ((ratio > 1.5).sum(), np.isclose(ratio, 1.0).sum()) == (1, ratio.size - 1), name
        np.testing.assert_array_equal(after[name], before[name])


def test_a_column_of_zeros_stays_zero():
    tensors = quantized({"classifier": {"kernel": np.zeros((4, 2), np.float32)}})
    np.testing.assert_array_equal(dequantized(tensors)["classifier"]["kernel"], np.zeros((4, 2)))


def test_bytes_are_those_of_the_file(model_and_params, tmp_path):
    model, params = model_and_params
    counted = weight_bytes(model.abstract())
    for kind, tensors in (
        ("int8", quantized(params)),
        ("float32", {n: np.asarray(x) for n, x in flatten_dict(params, sep=".").items()}),
    ):
        save_file(tensors, tmp_path / kind)
        assert sum(one.nbytes for one in load_file(tmp_path / kind).values()) == counted[kind]


def test_unknown_names_stay_float():
    assert input_axes("encoder.final_norm.scale", 1) is None
    assert input_axes("mlm_head.bias", 1) is None
    assert input_axes("encoder.layers.mlp.input.kernel", 4) == (1,)
