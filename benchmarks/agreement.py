"""The honesty check: what is compared must compute the same numbers from the same weights, texts and masks."""

import math
from collections.abc import Mapping, Sequence

from kd_jax.types import UserError

Values = Sequence[Mapping[str, float]]


def largest_difference(values: Values, reference: Values) -> float:
    """The largest relative difference over the steps and names that both have; infinite for what is not finite.

    The first step holds equal losses, later ones equal gradients and updates as well.
    """
    largest = 0.0
    for mine, theirs in zip(values, reference, strict=True):
        for name in mine.keys() & theirs.keys():
            difference = abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1e-12)
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


def check_agreement(values: Mapping[str, Values], reference: str, steps: int, tolerance: float) -> dict[str, float]:
    """Variant -> largest relative difference from `reference` over the first `steps` steps.

    Raises UserError, before anything is reported, when one exceeds `tolerance` or shares no value with the reference.
    """
    differences = {}
    for name, of_variant in values.items():
        shared = of_variant[0].keys() & values[reference][0].keys()
        if not shared:
            raise UserError(f"benchmark: {name} and {reference} report no common loss, so nothing is reported")
        differences[name] = largest_difference(of_variant[:steps], values[reference][:steps])
        if differences[name] > tolerance:
            raise UserError(
                f"benchmark: the first {steps} losses of {name} differ from those of {reference} by "
                f"{differences[name]:.1e} of their size, more than config.benchmark.tolerance = {tolerance:.0e}, so "
                f"nothing is reported: {list(of_variant[:steps])} against {list(values[reference][:steps])}"
            )
    return differences
