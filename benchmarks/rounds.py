"""Measuring in alternation, A B C ... C B A ..., over the same fixed batches, if the first losses agree."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.machine import busy_cores
from benchmarks.worker import Worker
from kd_jax.types import UserError

LISTEN = 0.5  # seconds before each round in which all workers wait and the load by other programs is measured
Values = Sequence[Mapping[str, float]]


@dataclass
class Measured:
    """What one worker reported; a pass is over all of its batches."""

    prepared: dict[str, Any]
    first_values: list[dict[str, float]] = field(default_factory=list)  # of each step of the first pass
    first_pass: float = 0.0  # seconds, compilation included
    passes: list[float] = field(default_factory=list)  # seconds, one for each round
    base_memory: int = 0  # bytes after the imports
    step_memory: int = 0  # bytes, the peak while stepping

    @property
    def compile_seconds(self) -> float:
        """The first pass minus a later one."""
        return max(self.first_pass - statistics.median(self.passes), 0.0)

    def summary(self) -> dict[str, Any]:
        """What every section reports of a variant: sizes, seconds, bytes."""
        return {
            **{key: self.prepared[key] for key in ("framework", "rows", "length", "flops")},
            "compile_seconds": self.compile_seconds,
            "memory": self.step_memory - self.base_memory,
        }


@dataclass
class Measurement:
    """What all workers reported, by name."""

    workers: dict[str, Measured]
    others_busy: list[float] = field(default_factory=list)  # cores that other programs kept busy before each round


def measure(
    workers: Mapping[str, Worker],
    batches: Mapping[str, int],
    rounds: int,
    check: Callable[[Mapping[str, Measured]], None],
    say: Callable[[str], None],
) -> Measurement:
    """Prepares the workers, takes the first pass of each step by step, calls `check` with what it gave, and then lets
    the workers take turns. batches: the steps in a pass of each.
    """
    # Only after all imports are done is the machine free for the first worker to compile.
    found = {name: Measured(worker.ask("prepare")) for name, worker in workers.items()}
    for name, worker in workers.items():
        one = found[name]
        for step in range(batches[name]):
            reply = worker.ask("run", first=step, steps=1)
            one.first_pass += reply["seconds"]
            one.first_values += reply["values"]
        say(f"{name}: first pass {one.first_pass:.1f} s")
    check(found)
    for name, worker in workers.items():
        worker.ask("run", first=batches[name], steps=batches[name])  # warms caches; not counted
        worker.ask("forget_peak")
    measurement = Measurement(found)
    for index in range(rounds):
        busy = busy_cores(LISTEN)
        measurement.others_busy += [] if busy is None else [busy]
        # Back and forth, so that a machine that slows down over time favors no variant.
        order = list(workers) if index % 2 == 0 else list(workers)[::-1]
        for name in order:
            steps = batches[name]
            reply = workers[name].ask("run", first=(index + 2) * steps, steps=steps)
            found[name].passes.append(reply["seconds"])
        taken = ", ".join(f"{name} {one.passes[-1]:.2f} s" for name, one in found.items())
        say(f"round {index + 1} of {rounds}: {taken}")
    for name, worker in workers.items():
        reply = worker.ask("memory")
        found[name].base_memory, found[name].step_memory = reply["base"], reply["peak"]
    return measurement


def spread(values: Sequence[float]) -> dict[str, float]:
    """{"median", "min", "max"} of the rounds."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(slower: Measured, faster: Measured) -> dict[str, float]:
    """How many times faster `faster` takes a pass, round by round, so that neighbors in time are compared."""
    return spread([a / b for a, b in zip(slower.passes, faster.passes, strict=True)])


def largest_difference(values: Values, reference: Values) -> float:
    """The largest relative difference over the steps and names that both have; infinite for non-finite values.

    Equal losses in the first step mean equal forward passes; in later ones, equal gradients and updates too.
    """
    largest = 0.0
    for mine, theirs in zip(values, reference, strict=True):
        for name in mine.keys() & theirs.keys():
            difference = abs(mine[name] - theirs[name]) / max(abs(theirs[name]), 1e-12)
            largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


def check_agreement(values: Mapping[str, Values], reference: str, steps: int, tolerance: float) -> dict[str, float]:
    """Variant -> largest relative difference from `reference` over the first `steps` steps.

    Raises UserError when one exceeds `tolerance` or shares no value with the reference.
    """
    differences = {}
    for name, of_variant in values.items():
        if not of_variant[0].keys() & values[reference][0].keys():
            raise UserError(f"benchmark: {name} and {reference} report no common loss, so nothing is reported")
        differences[name] = largest_difference(of_variant[:steps], values[reference][:steps])
        if differences[name] > tolerance:
            raise UserError(
                f"benchmark: the first {steps} losses of {name} differ from those of {reference} by "
                f"{differences[name]:.1e} relative, more than config.benchmark.tolerance = {tolerance:.0e}, so "
                f"nothing is reported: {list(of_variant[:steps])} against {list(values[reference][:steps])}"
            )
    return differences
