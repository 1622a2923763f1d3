"""Measuring in alternation: A B C ... C B A ... over the same fixed batches, and what the rounds say together."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.machine import busy_cores
from benchmarks.workers import Worker

LISTEN = 0.5  # seconds before each round in which all workers sleep and the rest of the machine is listened to


@dataclass
class Measured:
    """What one worker told: passes are over all of its batches."""

    prepared: dict[str, Any]
    first_values: list[dict[str, float]] = field(default_factory=list)  # of each step of the first pass
    first_pass: float = 0.0  # seconds, compilation included
    passes: list[float] = field(default_factory=list)  # seconds, one a round
    base_memory: int = 0  # bytes after the imports
    step_memory: int = 0  # bytes at the most while stepping

    @property
    def compile_seconds(self) -> float:
        """The first pass less a later one."""
        return max(self.first_pass - statistics.median(self.passes), 0.0)


@dataclass
class Measurement:
    """What all workers told, by name."""

    workers: dict[str, Measured]
    others_busy: list[float] = field(default_factory=list)  # cores that other programs kept busy before each round


def measure(
    workers: Mapping[str, Worker],
    batches: Mapping[str, int],
    rounds: int,
    check: Callable[[Mapping[str, Measured]], None],
    say: Callable[[str], None],
) -> Measurement:
    """Prepares the workers one after the other, takes the first pass of each step by step, lets `check` look at what
    the first pass gave, and then lets the workers take turns; `batches` is how many steps a pass of each has.
    """
    # Only when all have finished their imports is the machine free for the first to compile.
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
        worker.ask("run", first=batches[name], steps=batches[name])  # a second pass, not counted
        worker.ask("forget_peak")
    measurement = Measurement(found)
    for index in range(rounds):
        busy = busy_cores(LISTEN)
        measurement.others_busy += [] if busy is None else [busy]
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
    """How many times faster `faster` takes a pass, round by round: each round compares neighbors in time."""
    return spread([a / b for a, b in zip(slower.passes, faster.passes, strict=True)])
