"""The largest batch that fits, in few compilations."""

from collections.abc import Callable

from kd_jax.compile_check.measurement import Measurement


def steps_up_to(most: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ...: each at most one and a half times the one before, from 2 on."""
    found = [1]
    power = 2
    while power <= most:
        found += [power] + ([power * 3 // 2] if power * 3 // 2 <= most else [])
        power *= 2
    return found


def largest_batch(
    first: Measurement, multiple: int, capacity: float, measure: Callable[[int], Measurement], tries: int
) -> list[Measurement]:
    """All measurements, `first` included, until the largest batch is known or `tries` are used up.

    Batches are `multiple` times 1, 2, 3, 4, 6, 8, 12, ... rows; capacity: bytes of a device.
    """
    known = {first.rows: first}
    grid = [multiple * step for step in steps_up_to(2**16)]
    while len(known) <= tries and (rows := _next(known, grid, capacity)) is not None:
        known[rows] = measure(rows)
    return [known[rows] for rows in sorted(known)]


def _next(known: dict[int, Measurement], grid: list[int], capacity: float) -> int | None:
    """The batch to try next; None when there is nothing left to learn."""
    low = max((rows for rows, one in known.items() if one.fits), default=0)
    high = min((rows for rows, one in known.items() if not one.fits and rows > low), default=2 * grid[-1])
    between = [rows for rows in grid if low < rows < high]
    if not between:
        return None
    guess = _predicted(known, capacity)
    if guess is None:
        guess = (low + high) // 2 if low and high <= grid[-1] else high // 4
    return max((rows for rows in between if rows <= guess), default=between[0])


def _predicted(known: dict[int, Measurement], capacity: float) -> float | None:
    """Rows at which the line through the two largest measured batches that compiled meets the capacity."""
    points = sorted((rows, one.total) for rows, one in known.items() if one.roofline is not None)
    if not points:
        return None
    more, much = points[-1]
    if len(points) == 1:  # as if all temporaries grew with the rows, which rather promises too little
        slope = known[more].temporaries / more
    else:
        slope = (much - points[-2][1]) / (more - points[-2][0])
    return more + (capacity - much) / slope if slope > 0 else None
