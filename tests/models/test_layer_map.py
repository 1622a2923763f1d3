"""Layer maps and initial layers: each kind of spec, and the errors that name the key."""

import pytest

from kd_jax.models.layer_map import initial_layers, layer_map, read_layers
from kd_jax.types import UserError


@pytest.mark.parametrize(
    "spec, student, teacher, expected",
    [
        ("uniform", 2, 4, ((0, 1), (1, 3))),
        ("uniform", 4, 12, ((0, 2), (1, 5), (2, 8), (3, 11))),
        ("uniform", 3, 3, ((0, 0), (1, 1), (2, 2))),
        ("uniform", 6, 22, ((0, 3), (1, 6), (2, 10), (3, 14), (4, 17), (5, 21))),
        ("uniform", 5, 2, ((0, 0), (1, 0), (2, 0), (3, 1), (4, 1))),  # a deeper student
        ("uniform", 1, 7, ((0, 6),)),
        ("last", 2, 12, ((1, 11),)),
        (((0, 3), (1, 7)), 2, 12, ((0, 3), (1, 7))),
        (((-1, -1), (0, -12), (1, 0)), 2, 12, ((1, 11), (0, 0), (1, 0))),
        ([[0, 3]], 2, 12, ((0, 3),)),  # as JSON holds it
    ],
)
def test_layer_map(spec, student, teacher, expected):
    assert layer_map(spec, student, teacher, "distill.hidden.layers") == expected


@pytest.mark.parametrize(
    "spec, message",
    [
        ("first", "'first' is unknown; use uniform, last"),
        (((2, 0),), "the student has no layer 2; it has 2"),
        (((0, 12),), "the teacher has no layer 12; it has 12"),
        (((0, -13),), "the teacher has no layer -13"),
        (((0, 1.0),), "1.0 is not a layer"),
        (((True, 1),), "True is not a layer"),
        ((0, 1), "is not a list of pairs"),
        (((0, 1, 2),), "is not a list of pairs"),
        (("01",), "is not a list of pairs"),
        ((), "is not a list of pairs"),
        (3, "is not a list of pairs"),
        (((0, 3), (-2, 3)), r"the pair \(0, 3\) is listed twice"),
    ],
)
def test_layer_maps_that_cannot_be(spec, message):
    with pytest.raises(UserError, match=rf"config\.distill\.hidden\.layers: .*{message}"):
        layer_map(spec, 2, 12, "distill.hidden.layers")


@pytest.mark.parametrize(
    "spec, student, teacher, expected",
    [
        ("uniform", 4, 12, (2, 5, 8, 11)),
        ("uniform", 4, 2, (0, 0, 1, 1)),
        ("first", 2, 12, (0, 1)),
        ("last", 2, 12, (10, 11)),
        ("first", 3, 3, (0, 1, 2)),
        ((0, -1), 2, 12, (0, 11)),
        ([5, 5], 2, 12, (5, 5)),
    ],
)
def test_initial_layers(spec, student, teacher, expected):
    assert initial_layers(spec, student, teacher, "distill.init") == expected


@pytest.mark.parametrize(
    "spec, student, message",
    [
        ("middle", 2, "'middle' is unknown; use uniform, first, last"),
        ("first", 5, "the teacher has 4 layers, fewer than the student's 5"),
        ("last", 5, "the teacher has 4 layers, fewer than the student's 5"),
        ((0,), 2, "does not name one layer of the teacher for each of the student's 2"),
        ((0, 4), 2, "the teacher has no layer 4"),
        (((0, 1), (1, 3)), 2, r"\(0, 1\) is not a layer"),
        (7, 2, "does not name one layer"),
    ],
)
def test_initial_layers_that_cannot_be(spec, student, message):
    with pytest.raises(UserError, match=rf"config\.distill\.init: .*{message}"):
        initial_layers(spec, student, 4, "distill.init")


def test_layers_are_read_from_a_string_as_flags_give_them():
    assert read_layers("uniform", "x") == "uniform"
    assert read_layers("0,3", "x") == (0, 3)
    assert read_layers("0:-1,1:7", "x") == ((0, -1), (1, 7))
    with pytest.raises(UserError, match=r"config\.distill\.init_layers: '0;1' names no layers"):
        read_layers("0;1", "distill.init_layers")
