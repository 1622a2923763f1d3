"""How far a command came: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import jax
from tqdm import tqdm

from kd_jax.runtime.preemption import poll
from kd_jax.runtime.watchdog import alive

SECONDS_BETWEEN_LINES = 30.0
_AT_ONCE = 256  # things between two looks at the clock


Thing = TypeVar("Thing")


class _Shown:
    """A bar that is there on a terminal only, and goes away with the block that it belongs to."""

    _bar: tqdm | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress(_Shown):
    """Of a training run: loss, real and padded tokens a second, the useful share, time left; on process 0 only."""

    def __init__(self, description: str, start: int, steps: int, lines: Sequence[str] = (), *, shown: bool = True):
        self._description, self._steps = description, steps
        self._shown = shown and jax.process_index() == 0
        self._printed = time.monotonic()
        self._measured: tuple[float, int] | None = None  # when the first step was shown, and which it was
        if not self._shown:
            return
        for line in lines:
            print(line, file=sys.stderr)
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=start, desc=description, unit="step", dynamic_ncols=True, leave=False)

    def update(self, step: int, loss: float, rates: Mapping[str, float]) -> None:
        """Shows step `step`; rates: tokens_per_second, padded_tokens_per_second and useful_share, or empty."""
        if not self._shown:
            return
        text = f"loss {loss:.4f}"
        if rates:
            text += (
                f", {_short(rates['tokens_per_second'])} tok/s ({_short(rates['padded_tokens_per_second'])} padded, "
                f"{rates['useful_share']:.0%} useful)"
            )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        self._measured = self._measured or (now, step)
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            if self._measured and step > self._measured[1]:  # since the first step, which compiled
                since, first = self._measured
                text += f", {(now - since) / (step - first) * (self._steps - step):.0f} s left"
            print(f"{self._description}: step {step}/{self._steps}, {text}", file=sys.stderr)
            self._printed = now

    def say(self, text: str) -> None:
        """A line of its own, also where no progress is shown; on process 0 only."""
        if jax.process_index() == 0:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """A word beside the bar about what is going on between two steps."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)


class Count(_Shown):
    """Of a loop over many things, of which `total` may be unknown; on process 0 only.

    Each `update` is also a sign of life to the watchdog, and a place where a preemption may stop the command.
    """

    def __init__(self, description: str, unit: str, total: int | None = None, *, shown: bool = True):
        self._description, self._unit, self._total = description, unit, total
        self._shown = shown and jax.process_index() == 0
        self._done = 0
        self._began = self._printed = time.monotonic()
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=description, unit=f" {unit}", dynamic_ncols=True, leave=False)

    def update(self, count: int) -> None:
        """So many more are done. Raises Preempted."""
        self._done += count
        alive(f"{self._description}, after {self._done:,} {self._unit}")
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            rate = self._done / (self._printed - self._began)
            line = f"{self._description}: {self._done:,} {self._unit}, {_short(rate)} a second"
            if self._total is not None:
                line = f"{self._description}: {self._done:,} of {self._total:,} {self._unit}, {_short(rate)} a second, "
                line += f"{(self._total - self._done) / max(rate, 1e-9):.0f} s left"
            print(line, file=sys.stderr)
        poll()


def counted(things: Iterable[Thing], description: str, *, unit: str, shown: bool = True) -> Iterator[Thing]:
    """The things, while a `Count` is kept of them."""
    with Count(description, unit, shown=shown) as count:
        for number, thing in enumerate(things, start=1):
            yield thing
            if number % _AT_ONCE == 0:
                count.update(_AT_ONCE)


def _short(number: float) -> str:
    """12,300 as 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number >= 10 or number == 0 else f"{number:.1f}"
