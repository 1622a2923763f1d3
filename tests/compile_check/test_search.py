"""The search for the largest batch, on a memory that is known."""

import itertools

import pytest

from kd_jax.compile_check.measurement import Measurement
from kd_jax.compile_check.roofline import Roofline
from kd_jax.compile_check.search import largest_batch, steps_up_to

ROOF = Roofline(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def searched(largest: int, first: int, multiple: int, tries: int, says: bool):
    """The search where `largest` rows fit. says: too large a program is compiled and says its size."""
    asked = []

    def measure(rows: int) -> Measurement:
        asked.append(rows)
        fits = rows <= largest
        compiled = fits or says
        roofline = ROOF if compiled else None
        return Measurement(rows, 0.0, 100, 0, 10 * rows if compiled else 0, 0, fits, roofline=roofline)

    return largest_batch(measure(first), multiple, 100 + 10 * largest, measure, tries), asked


@pytest.mark.parametrize(("first", "says"), list(itertools.product((16, 64, 2048), (True, False))))
def test_the_largest_batch_on_the_grid_is_found(first, says):
    every, asked = searched(800, first, 16, 12, says)
    assert max(one.rows for one in every if one.fits) == 768
    assert min(one.rows for one in every if not one.fits) == 1024
    assert len(asked) == len(set(asked)) == len(every)


def test_a_memory_that_grows_linearly_takes_few_compilations():
    _, asked = searched(10_000, 64, 16, 12, True)
    assert len(asked) <= 5


def test_no_more_is_compiled_than_was_allowed():
    every, asked = searched(10_000, 64, 16, 1, True)
    assert len(asked) == 2 and len(every) == 2
    assert searched(10_000, 64, 16, 0, True)[1] == [64]


def test_nothing_may_fit():
    every, _ = searched(10, 64, 16, 12, False)
    assert not any(one.fits for one in every) and every[0].rows == 16


def test_steps_are_at_most_one_and_a_half_times_the_one_before():
    assert steps_up_to(13) == [1, 2, 3, 4, 6, 8, 12]
