"""Parameter trees, shardable axes, counting, and models under jit and grad."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.functional import Functional, flops_per_row, parameter_count
from kd_jax.models.heads import gather_positions
from tests.support.small_models import FAMILIES, VOCAB, packed_batch, parameters, small_config

KINDS = {
    "mlm": {},
    "dc": {"domains": 3},
    "icner": {"intents": 4, "tags": 5},
}


def is_axes(value):
    return isinstance(value, tuple)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_trees_agree(family, kind):
    model = Functional(kind, small_config(family), **KINDS[kind])
    params = jax.eval_shape(model.init, jax.random.key(0))
    abstract, axes = model.abstract(), model.logical_axes()
    assert jax.tree.structure(params) == jax.tree.structure(abstract) == jax.tree.structure(axes, is_leaf=is_axes)
    for (path, leaf), shape, names in zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(abstract),
        jax.tree.leaves(axes, is_leaf=is_axes),
        strict=True,
    ):
        assert all(isinstance(entry.key, str) for entry in path)
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype) == (leaf.shape, jnp.float32)
        assert len(names) == leaf.ndim
        assert set(names) <= {"layers", "vocab", "positions", "embed", "heads", "mlp", None}
        assert (names[0] == "layers") == (path[1].key == "layers")
    assert params["encoder"]["layers"]["mlp"]["output"]["kernel"].shape[0] == model.config.num_layers
    assert axes["encoder"]["embeddings"]["tokens"] == ("vocab", "embed")


def test_layers_start_different_and_keys_matter():
    model = Functional("mlm", small_config("modernbert"))
    first, second = parameters(model), parameters(model, seed=1)
    kernel = first["encoder"]["layers"]["attention"]["query_key_value"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])
    assert not np.allclose(kernel, second["encoder"]["layers"]["attention"]["query_key_value"]["kernel"])
    assert np.std(kernel) == pytest.approx(0.3 * 0.88, rel=0.1)  # cut at two standard deviations


def test_models_are_hashable_and_share_their_graph():
    one = Functional("mlm", small_config("bert"))
    other = Functional("mlm", small_config("bert"))
    assert one == other and hash(one) == hash(other)
    assert one != dataclasses.replace(one, compute_dtype="bfloat16")


@pytest.mark.parametrize("family", FAMILIES)
def test_mlm_logits_are_tied_to_the_token_table(family):
    model = Functional("mlm", small_config(family))
    params = parameters(model)
    batch = packed_batch([[6, 5], [9]], 12)
    positions = np.array([[0, 7, 7], [3, 0, 0]], np.int32)

    @jax.jit
    def logits(params):
        return model.mlm_logits(params, gather_positions(model.hidden(params, batch), positions))

    result = logits(params)
    assert result.shape == (2, 3, VOCAB)
    np.testing.assert_array_equal(result[0, 1], result[0, 2])
    # Adding a vector to one token's row moves that token's logits only, beyond what the row does as an input.
    table = params["encoder"]["embeddings"]["tokens"]
    unused = next(token for token in range(VOCAB) if token not in batch["tokens"])
    params["encoder"]["embeddings"]["tokens"] = table.at[unused].add(jnp.arange(16) / 16)
    moved = np.abs(logits(params) - result).max((0, 1)) > 1e-6
    np.testing.assert_array_equal(np.flatnonzero(moved), [unused])


def test_every_parameter_learns():
    # Only the first attention norm, which ModernBERT leaves out, has no gradient.
    for family in FAMILIES:
        model = Functional("mlm", small_config(family))
        params = parameters(model)
        batch = packed_batch([[10], [12]], 12)

        def loss(params, model=model, batch=batch):
            return jnp.sum(jax.nn.log_softmax(model.mlm_logits(params, model.hidden(params, batch)))[..., 1])

        gradient = jax.jit(jax.grad(loss))(params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
            assert np.any(leaf), (family, path)
        if family == "modernbert":
            scale = gradient["encoder"]["layers"]["attention_norm"]["scale"]
            assert not np.any(scale[0]) and np.any(scale[1])


def test_an_encoder_moves_between_kinds():
    config = small_config("modernbert")
    source, target = Functional("mlm", config), Functional("dc", config, domains=3)
    distilled = parameters(source)
    params = parameters(target, seed=1) | {"encoder": distilled["encoder"]}
    batch = packed_batch([[5, 4]], 10)
    np.testing.assert_array_equal(jax.jit(target.hidden)(params, batch), jax.jit(source.hidden)(distilled, batch))


def test_parameter_count():
    config = small_config("bert", num_layers=2)
    counts = parameter_count(Functional("mlm", config).abstract())
    layer = 4 * 16 * 16 + 4 * 16 + 2 * 16 * 24 + 24 + 16 + 4 * 16
    body = 2 * layer + 2 * 16 + (16 * 16 + 16) + 2 * 16
    assert counts == {"total": body + (VOCAB + 40 + 2) * 16 + VOCAB, "without_embeddings": body}


@pytest.mark.parametrize(
    "family, changes",
    [
        ("bert", {"scan": "unroll", "remat": True}),
        ("xlmr_xl", {"scan": "unroll"}),
        ("modernbert", {"scan": "unroll"}),
        ("modernbert", {"scan": "scan"}),
    ],
)
def test_hidden_at_gives_the_states_and_gradients_of_all_columns(family, changes):
    model = Functional("mlm", small_config(family, **changes))
    batch = packed_batch([[7, 9], [12]], 20)
    params = parameters(Functional("mlm", small_config(family)))
    params = jax.tree.map(
        lambda leaf: leaf + 0.3 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )  # biases
    columns = np.array([[3, 0, 15, 8], [11, 4, 4, 0]], np.int32)  # one of them twice
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, model.config.hidden_size)), jnp.float32)

    def narrow(params):
        hidden = model.hidden_at(params, batch, columns)
        return jnp.sum(hidden * weights), hidden

    def whole(params):
        hidden = gather_positions(model.hidden(params, batch), columns)
        return jnp.sum(hidden * weights), hidden

    results = [jax.jit(jax.value_and_grad(function, has_aux=True))(params) for function in (narrow, whole)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *results)


def test_hidden_at_beside_captured_states_of_the_last_layer():
    model = Functional("mlm", small_config("modernbert", scan="unroll"))
    params, batch = parameters(Functional("mlm", small_config("modernbert"))), packed_batch([[7, 9], [12]], 20)
    columns = np.array([[3, 0], [11, 4]], np.int32)
    for wanted in ({"layers": (2,)}, {"projections": (2,)}, {"layers": (1,), "projections": (0,), "embeddings": True}):
        captured = model.capture(params, batch, **wanted, columns_RxK=columns)
        expected = model.capture(params, batch, **wanted)
        expected = expected._replace(hidden=gather_positions(expected.hidden, columns))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), captured, expected)


def test_flops_match_what_xla_counts():
    # XLA counts a loop's body once, so layers are unrolled; it also counts elementwise work, which is small here.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_layers": 2, "max_positions": 128, "scan": "unroll"}
    for family in ("bert", "modernbert"):
        model = Functional("mlm", small_config(family, vocab_size=3000, **sizes))
        batch = packed_batch([[128]], 128)

        def logits(params, batch, model=model):
            return model.mlm_logits(params, model.hidden(params, batch)[:, :20])

        def narrow(params, batch, model=model):
            return model.mlm_logits(params, model.hidden_at(params, batch, np.arange(20)[None]))

        for function, columns in ((logits, None), (narrow, 20)):
            counted = jax.jit(function).lower(model.abstract(), batch).compile().cost_analysis()["flops"]
            expected = flops_per_row(model.config, 128, 20, 3000, training=False, last_layer_at=columns)
            assert counted == pytest.approx(expected, rel=0.1)
    config = model.config
    forward = flops_per_row(config, 128, 20, 3000, training=False)
    assert flops_per_row(config, 128, 20, 3000, training=True) == 3 * forward
    layers = flops_per_row(config, 128, 0, 3000, training=False)
    scanned = dataclasses.replace(config, scan="scan")  # computes every layer for the whole row
    assert flops_per_row(scanned, 128, 20, 3000, training=False, last_layer_at=20) == forward
    remat = dataclasses.replace(config, remat=True)
    assert flops_per_row(remat, 128, 20, 3000, training=True) == 3 * forward + layers
