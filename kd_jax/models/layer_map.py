"""Which layers of the teacher a student learns from, and which ones it is initialized with."""

from collections.abc import Sequence
from typing import Any, cast

from kd_jax.types import UserError

_LAYERS = "use uniform, last, or pairs like ((0, 3), (1, 7))"


def read_layers(text: str, key: str) -> str | tuple[Any, ...]:
    """The meaning of a config's string: a word like "uniform", layers "0,3", or pairs "0:3,1:7" (student:teacher)."""
    if not text or text[0].isalpha():
        return text
    try:
        parts = [tuple(int(number) for number in part.split(":")) for part in text.split(",")]
    except ValueError:
        raise UserError(f"config.{key}: {text!r} names no layers; write a word like uniform, 0,3 or 0:3,1:7") from None
    return tuple(part[0] if len(part) == 1 else part for part in parts)


def layer_map(spec: Any, student_layers: int, teacher_layers: int, key: str) -> tuple[tuple[int, int], ...]:
    """Pairs (student layer, teacher layer), counted from 0.

    spec: "uniform" pairs every layer of the student with one of the teacher at the same relative depth, so that the
    last meets the last (TinyBERT, Jiao et al., arXiv 1909.10351); "last" the last layers only; or pairs like
    ((0, 3), (1, 7)), where negative numbers count from the end. Raises UserError naming `config.<key>`.
    """
    if spec == "uniform":
        return tuple(enumerate(_uniform(student_layers, teacher_layers)))
    if spec == "last":
        return ((student_layers - 1, teacher_layers - 1),)
    if isinstance(spec, str):
        raise UserError(f"config.{key}: {spec!r} is unknown; {_LAYERS}")
    listed = _listed(spec)
    if not listed or not all(len(_listed(pair)) == 2 for pair in listed):
        raise UserError(f"config.{key}: {spec!r} is not a list of pairs (student layer, teacher layer); {_LAYERS}")
    pairs = tuple(
        (_layer(mine, student_layers, "student", key), _layer(theirs, teacher_layers, "teacher", key))
        for mine, theirs in listed
    )
    for pair in pairs:
        if pairs.count(pair) > 1:
            raise UserError(f"config.{key}: the pair {pair} is listed twice; leave one out")
    return pairs


def initial_layers(spec: Any, student_layers: int, teacher_layers: int, key: str) -> tuple[int, ...]:
    """For each layer of the student the layer of the teacher that it is initialized with, counted from 0.

    spec: "uniform" as in `layer_map`, "first", "last", or one number for each layer of the student, where negative ones
    count from the end. Raises UserError naming `config.<key>`.
    """
    if spec == "uniform":
        return _uniform(student_layers, teacher_layers)
    if spec in ("first", "last"):
        if student_layers > teacher_layers:
            raise UserError(
                f"config.{key}: the teacher has {teacher_layers} layers, fewer than the student's {student_layers}, so "
                f"there are no {spec} {student_layers}; use uniform, or name the layers"
            )
        start = 0 if spec == "first" else teacher_layers - student_layers
        return tuple(range(start, start + student_layers))
    if isinstance(spec, str):
        raise UserError(f"config.{key}: {spec!r} is unknown; use uniform, first, last, or layers like (0, 3)")
    if len(_listed(spec)) != student_layers:
        raise UserError(
            f"config.{key}: {spec!r} does not name one layer of the teacher for each of the student's "
            f"{student_layers}; use uniform, first, last, or {student_layers} numbers"
        )
    return tuple(_layer(layer, teacher_layers, "teacher", key) for layer in spec)


def chosen_layers(spec: Any, num_layers: int, key: str) -> tuple[int, ...]:
    """The layers of a teacher to keep, counted from 0, ascending.

    spec: "last", "none", or numbers; negative ones count from the end. Raises UserError naming `config.<key>`.
    """
    if isinstance(spec, str):
        if spec not in ("last", "none"):
            raise UserError(f"config.{key}: {spec!r} is unknown; use last, none, or layers like 3,-1")
        return (num_layers - 1,) if spec == "last" else ()
    return tuple(sorted({_layer(layer, num_layers, "teacher", key) for layer in _listed(spec)}))


def _uniform(student_layers: int, teacher_layers: int) -> tuple[int, ...]:
    """Layers at equal steps that end at the last one; a teacher with fewer layers lends some of them twice."""
    steps = (round((layer + 1) * teacher_layers / student_layers) for layer in range(student_layers))
    return tuple(max(step, 1) - 1 for step in steps)


def _layer(layer: Any, num_layers: int, whose: str, key: str) -> int:
    """The layer counted from 0."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UserError(f"config.{key}: {layer!r} is not a layer; give whole numbers")
    if not -num_layers <= layer < num_layers:
        raise UserError(
            f"config.{key}: the {whose} has no layer {layer}; it has {num_layers}, so give 0 to {num_layers - 1}, or "
            f"-1 to {-num_layers} counted from the end"
        )
    return layer % num_layers


def _listed(value: Any) -> Sequence[Any]:
    """The value if it is a list or tuple, else nothing."""
    return cast(Sequence[Any], value) if isinstance(value, Sequence) and not isinstance(value, str) else ()
