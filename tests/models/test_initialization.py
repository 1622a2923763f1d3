"""A student that starts as layers of its teacher: the same logits where all is taken, the right parts where not."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from kd_jax.models.functional import Functional
from kd_jax.models.initialization import check_table, from_teacher, principal_table, remarks
from kd_jax.types import UserError
from tests.support.small_models import FAMILIES, VOCAB, packed_batch, parameters, small_config

ROWS = [[7, 12, 3], [20], [5, 5]]
LENGTH = 24


def teacher_of(family):
    """A teacher whose biases and norms are not those that it was initialized with."""
    model = Functional("mlm", small_config(family))
    rng = np.random.default_rng(0)
    shaken = lambda leaf: np.asarray(leaf) + rng.normal(0, 0.1, leaf.shape).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(shaken, parameters(model))


def student_of(teacher, **changes):
    """A student and zeros for its parameters, so that what is not copied shows."""
    student = dataclasses.replace(teacher, config=dataclasses.replace(teacher.config, **changes))
    return student, jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), student.abstract())


@functools.cache
def compiled(model):
    return jax.jit(lambda params, batch: model.mlm_logits(params, model.hidden(params, batch)))


def logits(model, params, batch):
    return np.asarray(compiled(model)(params, batch))


def assert_fits(student, params):
    assert jax.tree.structure(params) == jax.tree.structure(student.abstract())
    for leaf, shape in zip(jax.tree.leaves(params), jax.tree.leaves(student.abstract()), strict=True):
        assert (leaf.shape, leaf.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_give_the_logits_of_the_teacher(family):
    teacher, params = teacher_of(family)
    student, empty = student_of(teacher)
    started = from_teacher(student, empty, teacher, params, (0, 1, 2), None)
    assert_fits(student, started)
    batch = packed_batch(ROWS, LENGTH)
    np.testing.assert_array_equal(logits(student, started, batch), logits(teacher, params, batch))


@pytest.mark.parametrize(("theirs", "ours"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("trimmed", [False, True])
def test_an_untied_decoder_on_either_side(theirs, ours, trimmed):
    model = Functional("mlm", small_config("bert", tied_decoder=theirs))
    params = parameters(model, 3)
    kept = np.arange(5, VOCAB, 2) if trimmed else None
    student, empty = student_of(model, tied_decoder=ours, vocab_size=VOCAB if kept is None else len(kept))
    started = from_teacher(student, empty, model, params, (0, 1, 2), kept)
    assert_fits(student, started)
    chosen = slice(None) if kept is None else kept
    if ours and not theirs:  # the teacher's matrix is left out
        expected = params["encoder"]["embeddings"]["tokens"]
    else:
        expected = model.decoder(params)[0]
    np.testing.assert_array_equal(student.decoder(started)[0], expected[chosen])
    told = [line for line in remarks(student.config, model.config, (0, 1, 2)) if "matrix of its own" in line]
    assert len(told) == (ours and not theirs)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_chosen_layers_are_taken_in_their_order(family):
    teacher, params = teacher_of(family)
    student, empty = student_of(teacher, num_layers=2)
    started = from_teacher(student, {**empty, "projections": {}}, teacher, params, (2, 1), None)
    assert started.pop("projections") == {}
    assert_fits(student, started)

    def check(ours, theirs):
        np.testing.assert_array_equal(ours, theirs[np.array([2, 1])])

    jax.tree.map(check, started["encoder"]["layers"], params["encoder"]["layers"])
    for tree in ("embeddings", *(("final_norm",) if teacher.config.final_norm else ())):
        jax.tree.map(np.testing.assert_array_equal, started["encoder"][tree], params["encoder"][tree])
    jax.tree.map(np.testing.assert_array_equal, started["mlm_head"], params["mlm_head"])


@pytest.mark.parametrize("family", ["roberta", "modernbert"])
def test_a_trimmed_vocabulary_leaves_the_logits_of_kept_pieces_as_they_are(family):
    teacher, params = teacher_of(family)
    kept = np.array([3, 0, 7, 8, 20, 21, 40, VOCAB - 1])
    student, empty = student_of(teacher, vocab_size=len(kept))
    started = from_teacher(student, empty, teacher, params, (0, 1, 2), kept)
    assert_fits(student, started)
    batch = packed_batch(ROWS, LENGTH)
    batch["tokens"] %= len(kept)
    full = {**batch, "tokens": kept[batch["tokens"]]}
    result, expected = logits(student, started, batch), logits(teacher, params, full)[..., kept]
    np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("family, changes", [("bert", {"type_vocab_size": 0}), ("roberta", {"max_positions": 25})])
def test_positions_are_cut_and_token_types_folded_into_them(family, changes):
    teacher, params = teacher_of(family)
    student, empty = student_of(teacher, **changes)
    started = from_teacher(student, empty, teacher, params, (0, 1, 2), None)
    assert_fits(student, started)
    batch = packed_batch(ROWS, LENGTH)
    np.testing.assert_allclose(logits(student, started, batch), logits(teacher, params, batch), atol=1e-4)


def test_a_first_layer_without_attention_norm_brings_that_of_the_embeddings_along():
    teacher, params = teacher_of("modernbert")
    student, empty = student_of(teacher, num_layers=3)
    started = from_teacher(student, empty, teacher, params, (0, 0, 1), None)
    scale = started["encoder"]["layers"]["attention_norm"]["scale"]
    np.testing.assert_array_equal(scale[1], params["encoder"]["embeddings"]["norm"]["scale"])
    np.testing.assert_array_equal(scale[2], params["encoder"]["layers"]["attention_norm"]["scale"][1])


def test_the_teacher_outlives_its_student():
    teacher, params = teacher_of("bert")
    params = jax.tree.map(jax.numpy.asarray, params)
    student, empty = student_of(teacher)
    started = from_teacher(student, empty, teacher, params, (0, 1, 2), None)
    jax.jit(lambda params: jax.tree.map(lambda leaf: leaf + 1, params), donate_argnums=0)(started)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_remarks_name_layers_that_change_their_work():
    modern = small_config("modernbert")  # layer 0 of 3 is global
    student = dataclasses.replace(modern, num_layers=2)
    assert remarks(student, modern, (0, 2)) == ()
    assert remarks(student, modern, (0, 0)) == (
        "student layer 1 attends to its local window, teacher layer 0, its origin, to the whole text",
    )
    assert remarks(student, modern, (2, 1)) == (
        "student layer 0 attends to the whole text, teacher layer 2, its origin, to its local window",
        "student layer 0 has no attention norm, unlike teacher layer 2, its origin",
    )
    assert remarks(small_config("bert"), small_config("bert"), (2, 1, 0)) == ()


@pytest.mark.parametrize(
    "family, changes, field",
    [
        ("bert", {"hidden_size": 32}, "hidden_size"),
        ("bert", {"num_heads": 4}, "num_heads"),
        ("bert", {"intermediate_size": 32}, "intermediate_size"),
        ("bert", {"positions": "rotary"}, "positions"),
        ("bert", {"norm_placement": "pre"}, "norm_placement"),
        ("bert", {"use_bias": False}, "use_bias"),
        ("bert", {"gated": True}, "gated"),
        ("bert", {"activation": "relu"}, "activation"),
        ("bert", {"head_style": "roberta"}, "head_style"),
        ("bert", {"type_vocab_size": 1}, "type_vocab_size"),
        ("bert", {"position_offset": 2}, "position_offset"),
        ("bert", {"max_positions": 41}, "max_positions"),
        ("bert", {"vocab_size": VOCAB + 1}, "vocab_size"),
        ("modernbert", {"local_theta": 10_000.0}, "local_theta"),
        ("modernbert", {"skip_first_attention_norm": False}, "skip_first_attention_norm"),
        ("modernbert", {"type_vocab_size": 1}, "type_vocab_size"),
    ],
)
def test_students_that_do_not_fit_are_refused_by_their_field(family, changes, field):
    teacher = Functional("mlm", small_config(family))
    student, empty = student_of(teacher, **changes)
    with pytest.raises(UserError, match=rf"config\.student\.{field}: it is "):
        from_teacher(student, empty, teacher, {}, (0, 1, 2), None)


def test_layers_and_pieces_that_are_not_there_are_refused():
    teacher = Functional("mlm", small_config("bert"))
    student, empty = student_of(teacher, num_layers=2, vocab_size=2)
    for layers, kept in (((0,), [0, 1]), ((0, 3), [0, 1]), ((0, -1), [0, 1]), ((0, 1), [0, VOCAB])):
        with pytest.raises(ValueError, match=r"layers|kept"):
            from_teacher(student, empty, teacher, {}, layers, np.array(kept))
    with pytest.raises(UserError, match=r"config\.student\.vocab_size: it is 2, and the trimmed vocabulary has 3"):
        from_teacher(student, empty, teacher, {}, (0, 1), np.arange(3))


def test_a_narrower_table_has_the_weighted_principal_components():
    rng = np.random.default_rng(0)
    table = rng.normal(3, 1, (200, 6)) @ np.diag([5, 3, 2, 1, 0.5, 0.1]) @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    counts = rng.integers(0, 50, 200)
    found, kept = principal_table(table.astype(np.float32), counts, 3, 0.02)
    assert found.dtype == np.float32 and found.shape == (200, 3)
    np.testing.assert_allclose(np.sqrt(np.mean(found.astype(np.float64) ** 2)), 0.02, rtol=1e-6)
    weights = np.sqrt(counts) / np.sqrt(counts).sum()
    centered = table - weights @ table
    _, sizes, rows = np.linalg.svd(centered * np.sqrt(weights)[:, None], full_matrices=False)
    np.testing.assert_allclose(kept, (sizes[:3] ** 2).sum() / (sizes**2).sum(), rtol=1e-5)
    expected = centered @ rows[:3].T
    scale = 0.02 / np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(np.abs(found), np.abs(expected * scale), atol=1e-6)
    # Distances between tokens are those of the whole table, up to what lies outside the components.
    whole, share = principal_table(table.astype(np.float32), counts, 6, 0.02)
    ours, theirs = (one @ one.T for one in (whole.astype(np.float64), centered))
    np.testing.assert_allclose(ours / ours[0, 0], theirs / theirs[0, 0], atol=1e-3)
    assert share > 0.99999


def test_a_wider_table_is_filled_up_with_zeros():
    table, counts = np.random.default_rng(1).normal(size=(50, 4)).astype(np.float32), np.ones(50, int)
    found, kept = principal_table(table, counts, 6, 0.5)
    assert found.shape == (50, 6) and kept > 0.99999
    np.testing.assert_array_equal(found[:, 4:], 0)
    np.testing.assert_allclose(np.sqrt(np.mean(found[:, :4] ** 2)), 0.5, rtol=1e-6)


def test_a_table_of_other_tokens_is_refused():
    teacher, student = small_config("bert"), small_config("modernbert", hidden_size=8)
    check_table(student, teacher, None)
    with pytest.raises(UserError, match=r"config\.student\.vocab_size: it is 7, the teacher's is 50"):
        check_table(dataclasses.replace(student, vocab_size=7), teacher, None)
    with pytest.raises(UserError, match=r"config\.student\.vocab_size: it is 7, and the trimmed vocabulary has 3"):
        check_table(dataclasses.replace(student, vocab_size=7), teacher, np.arange(3))
