"""Classification heads on packed rows, against NumPy and against the same utterances unpacked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.functional import Functional
from kd_jax.models.heads import gather_positions, pooled
from tests.support.small_models import FAMILIES, packed_batch, parameters, small_config, with_alone

ROWS = [[7, 12, 3], [20], [5, 5]]


def first_positions(batch, slots):
    """Column of each text's first token, 0 where there is none."""
    result = np.zeros((len(batch["tokens"]), slots), np.int32)
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            result[row, segment - 1] = np.flatnonzero(segments == segment)[0]
    return result


def test_gather_positions():
    hidden = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    positions = np.array([[4, 0, 0, 2], [1, 1, 3, 0]], np.int32)
    expected = np.stack([hidden[row, positions[row]] for row in range(2)])
    np.testing.assert_array_equal(gather_positions(jnp.asarray(hidden), jnp.asarray(positions)), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_utterances_equal_single_ones(family):
    model = Functional("icner", small_config(family), intents=4, tags=5)
    params = parameters(model)
    batch, places = with_alone(packed_batch(ROWS, 24))
    batch["first_positions"] = first_positions(batch, 3)
    intents, tags = map(np.asarray, jax.jit(model.intent_and_tag_logits)(params, batch))
    assert intents.shape == (9, 3, 4) and tags.shape == (9, 24, 5)
    intents_alone, tags_alone = intents[3:], tags[3:]
    for index, (row, columns) in enumerate(places):
        slot = batch["segment_ids"][row, columns.start] - 1
        size = columns.stop - columns.start
        np.testing.assert_allclose(intents[row, slot], intents_alone[index, 0], atol=1e-5)
        np.testing.assert_allclose(tags[row, columns], tags_alone[index, :size], atol=1e-5)


def pooling_case():
    """(states, batch): rows with one to three texts, padding after them, a row of padding alone, and unused slots."""
    batch = packed_batch([*ROWS, [], [24]], 24)
    batch["first_positions"] = first_positions(batch, 4)
    return np.random.default_rng(1).normal(size=(5, 24, 6)).astype(np.float32), batch


def texts_of(batch):
    """(row, slot, columns) of each text of a packed batch."""
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            yield row, segment - 1, np.flatnonzero(segments == segment)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_matches_numpy_in_float64_and_has_its_gradient(pooling):
    hidden, batch = pooling_case()
    weights = np.random.default_rng(2).normal(size=(5, 4, 6))

    def run(hidden):
        vectors = pooled(hidden, jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["first_positions"]), pooling)
        used = np.zeros((5, 4, 1))
        for row, slot, _ in texts_of(batch):
            used[row, slot] = 1.0
        return jnp.sum(vectors * jnp.asarray(weights * used, jnp.float32)), vectors

    (_, vectors), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(hidden)
    assert np.isfinite(vectors).all() and np.isfinite(gradient).all()
    expected = np.zeros(hidden.shape)
    for row, slot, columns in texts_of(batch):
        states = hidden[row, columns].astype(np.float64)
        wanted = states.mean(0) if pooling == "mean" else states.max(0)
        np.testing.assert_allclose(vectors[row, slot], wanted, rtol=1e-6, atol=1e-7)
        shares = np.ones(states.shape) / len(columns) if pooling == "mean" else states == wanted
        expected[row, columns] += shares * weights[row, slot]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)
    assert not expected[3].any()


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_matches_torch(pooling):
    torch = pytest.importorskip("torch", reason="parity needs PyTorch")
    hidden, batch = pooling_case()
    vectors = pooled(jnp.asarray(hidden), jnp.asarray(batch["segment_ids"]), batch["first_positions"], pooling)
    for row, slot, columns in texts_of(batch):
        states = torch.tensor(hidden[row, columns]).requires_grad_()
        theirs = states.mean(0) if pooling == "mean" else states.max(0).values
        np.testing.assert_allclose(vectors[row, slot], theirs.detach().numpy(), rtol=1e-6, atol=1e-7)


def test_a_mean_is_not_rounded_before_it_is_divided():
    """A sum of 257 ones is 256 in bfloat16, and the mean would then be less than 1."""
    batch = packed_batch([[257]], 257)
    states = jnp.ones((1, 257, 2), jnp.bfloat16)
    mean = pooled(states, jnp.asarray(batch["segment_ids"]), jnp.zeros((1, 1), jnp.int32), "mean")
    assert mean.dtype == jnp.bfloat16 and np.asarray(mean, np.float32).tolist() == [[[1.0, 1.0]]]


@pytest.mark.parametrize(("kind", "pooling", "family"), [("dc", "mean", "modernbert"), ("icner", "max", "bert")])
def test_pooled_utterances_equal_single_ones(kind, pooling, family):
    sizes = {"domains": 3} if kind == "dc" else {"intents": 3, "tags": 5}
    model = Functional(kind, small_config(family), pooling=pooling, **sizes)
    params = parameters(model)
    batch, places = with_alone(packed_batch(ROWS, 24))
    batch["first_positions"] = first_positions(batch, 3)

    def run(params):
        logits = model.domain_logits(params, batch) if kind == "dc" else model.intent_and_tag_logits(params, batch)[0]
        return model.hidden(params, batch), logits

    states, logits = map(np.asarray, jax.jit(run)(params))
    head = params["domain_head" if kind == "dc" else "intent_head"]
    for index, (row, columns) in enumerate(places):
        slot = batch["segment_ids"][row, columns.start] - 1
        np.testing.assert_allclose(logits[row, slot], logits[3 + index, 0], atol=1e-5)
        inside = states[row, columns].astype(np.float64)
        expected = numpy_head(head, inside.mean(0) if pooling == "mean" else inside.max(0), family)
        np.testing.assert_allclose(logits[row, slot], expected, atol=1e-4)


def numpy_head(params, x, style):
    """The head of `transformers` in that style, in float64; token heads are the same without a dense layer."""
    x = np.asarray(x, np.float64)
    if "dense" in params:
        x = x @ np.asarray(params["dense"]["kernel"], np.float64) + np.asarray(params["dense"].get("bias", 0.0))
        if style == "modernbert":
            x = np.asarray(jax.nn.gelu(x, approximate=False), np.float64)
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * params["norm"]["scale"]
        else:
            x = np.tanh(x)
    return x @ np.asarray(params["classifier"]["kernel"], np.float64) + np.asarray(params["classifier"]["bias"])


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_heads_match_numpy(family):
    batch = packed_batch(ROWS, 24)
    batch["first_positions"] = first_positions(batch, 3)
    rng = np.random.default_rng(0)

    def shaken(params):
        # Biases and norms start at 0 and 1; random ones show whether they are used.
        return jax.tree.map(lambda leaf: np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape).astype(np.float32), params)

    model = Functional("icner", small_config(family), intents=4, tags=5)
    params = shaken(parameters(model))
    run = jax.jit(
        lambda params, model=model: (model.hidden(params, batch), *model.intent_and_tag_logits(params, batch))
    )
    hidden, intents, tags = run(params)
    first = np.take_along_axis(np.asarray(hidden), batch["first_positions"][..., None], 1)
    np.testing.assert_allclose(intents, numpy_head(params["intent_head"], first, family), atol=1e-4)
    np.testing.assert_allclose(tags, numpy_head(params["tag_head"], hidden, family), atol=1e-4)
    model = Functional("dc", model.config, domains=3)
    params = shaken(parameters(model)) | {"encoder": params["encoder"]}
    domains = jax.jit(model.domain_logits)(params, batch)
    np.testing.assert_allclose(domains, numpy_head(params["domain_head"], first, family), atol=1e-4)


def test_unused_slots_get_no_gradient_and_change_nothing():
    model = Functional("dc", small_config("roberta"), domains=3)
    params = parameters(model)
    batch = packed_batch(ROWS, 24)
    batch["first_positions"] = first_positions(batch, 3)
    used = np.array([[1, 1, 1], [1, 0, 0], [1, 1, 0]], np.float32)
    wider = dict(batch, first_positions=np.pad(batch["first_positions"], ((0, 0), (0, 2))))

    def loss(params, batch, used):
        return jnp.sum(model.domain_logits(params, batch) ** 2 * used[..., None])

    run = jax.jit(jax.grad(loss))
    gradient = run(params, batch, used)
    other = run(params, wider, np.pad(used, ((0, 0), (0, 2))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), gradient, other)


def test_head_dropout_follows_the_key():
    model = Functional("icner", small_config("roberta", dropout=0.5), intents=4, tags=5)
    params = parameters(model)
    batch = packed_batch(ROWS, 24)
    batch["first_positions"] = first_positions(batch, 3)
    run = jax.jit(model.intent_and_tag_logits)
    first, again, other = (run(params, batch, jax.random.key(seed)) for seed in (0, 0, 1))
    for part in range(2):
        np.testing.assert_array_equal(first[part], again[part])
        assert np.abs(first[part] - other[part]).max() > 0.01
