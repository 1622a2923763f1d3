"""The name map without PyTorch: a round trip, the layout of merged projections, and clear errors."""

import jax
import numpy as np
import pytest

from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.names import from_huggingface, name_map, to_huggingface
from kd_jax.types import UserError
from tests.support.small_models import FAMILIES, parameters, small_config


@pytest.fixture(params=FAMILIES)
def case(request):
    config = small_config(request.param)
    params = parameters(Functional("mlm", config))
    return config, params, to_huggingface(params, config)


def test_round_trip(case):
    config, params, tensors = case
    assert tensors.keys() == {entry.name for entry in name_map(config)}
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(tensors, config), jax.tree.map(np.asarray, params))


def test_every_value_has_exactly_one_place(case):
    config, _, tensors = case
    numbered, first = {}, 2  # above the ones of the norm that is left out
    for name, tensor in tensors.items():
        numbered[name] = np.arange(first, first + tensor.size, dtype=np.float32).reshape(tensor.shape)
        first += tensor.size
    values = np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(from_huggingface(numbered, config))])
    unused = config.hidden_size if config.skip_first_attention_norm else 0
    assert len(values) == sum(tensor.size for tensor in tensors.values()) + unused
    assert len(np.unique(values[values > 1])) == len(values) - unused


def test_tensors_lie_where_the_encoder_reads_them():
    config = small_config("bert")
    tensors = to_huggingface(parameters(Functional("mlm", config)), config)
    x = np.random.default_rng(0).normal(size=16).astype(np.float32)
    params = from_huggingface(tensors, config)
    kernel = params["encoder"]["layers"]["attention"]["query_key_value"]["kernel"]
    for part, name in enumerate(("query", "key", "value")):
        weight = tensors[f"bert.encoder.layer.2.attention.self.{name}.weight"]
        ours = np.einsum("h,hnd->nd", x, kernel[2, :, part])
        np.testing.assert_allclose(ours.ravel(), weight @ x, rtol=1e-4, atol=1e-5)
    table = tensors["bert.embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(params["encoder"]["embeddings"]["tokens"], table)
    output = params["encoder"]["layers"]["attention"]["output"]["kernel"][1]
    weight = tensors["bert.encoder.layer.1.attention.output.dense.weight"]
    np.testing.assert_allclose(np.einsum("nd,ndh->h", x.reshape(2, 8), output), weight @ x, rtol=1e-4, atol=1e-5)


def test_errors_name_the_tensor(case):
    config, _, tensors = case
    last = list(tensors)[-4]
    with pytest.raises(UserError, match=last.replace(".", r"\.")):
        from_huggingface({name: tensor for name, tensor in tensors.items() if name != last}, config)
    with pytest.raises(UserError, match="surprise"):
        from_huggingface(tensors | {"surprise.weight": np.zeros(3)}, config)
    with pytest.raises(UserError, match=last.replace(".", r"\.")):
        from_huggingface(tensors | {last: np.zeros((5, 3, 2), np.float32)}, config)


def test_untied_embeddings_are_refused():
    config = small_config("modernbert")
    tensors = to_huggingface(parameters(Functional("mlm", config)), config)
    table = tensors["model.embeddings.tok_embeddings.weight"]
    from_huggingface(tensors | {"decoder.weight": table.copy()}, config)
    with pytest.raises(UserError, match=r"decoder\.weight"):
        from_huggingface(tensors | {"decoder.weight": table + 1}, config)
