"""How far a command has come: a bar on a terminal, a line every half minute in a log file; on process 0 only."""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Self, TypeVar

import jax
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0

Item = TypeVar("Item")


class _Shown:
    """A bar that exists on a terminal only, and disappears with its block."""

    def __init__(self, description: str, unit: str, total: int | None, start: int, shown: bool):
        self._description, self._total = description, total
        self._shown = shown and jax.process_index() == 0
        self._began = self._printed = time.monotonic()
        self._bar: tqdm | None = None
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=description, unit=unit, dynamic_ncols=True, leave=False)

    def _due(self) -> bool:
        """Whether it is time for a line in a log file."""
        now = time.monotonic()
        due = self._shown and self._bar is None and now - self._printed >= SECONDS_BETWEEN_LINES
        self._printed = now if due else self._printed
        return due

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()


class Progress(_Shown):
    """Progress of a training run: loss, real and padded tokens per second, their ratio, time left."""

    def __init__(self, description: str, start: int, steps: int, lines: Sequence[str] = (), *, shown: bool = True):
        if shown and jax.process_index() == 0:
            for line in lines:
                print(line, file=sys.stderr)
        super().__init__(description, "step", steps, start, shown)
        self._steps = steps
        self._first: tuple[float, int] | None = None  # when the first step was shown, and its number

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
        # Time left is measured from the first step's end, since that step included compilation.
        began, first = self._first = self._first or (time.monotonic(), step)
        if self._due():
            if step > first:
                text += f", {(self._printed - began) / (step - first) * (self._steps - step):.0f} s left"
            print(f"{self._description}: step {step}/{self._steps}, {text}", file=sys.stderr)

    def say(self, text: str) -> None:
        """A line of its own, even if progress is not shown."""
        if jax.process_index() == 0:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """A note next to the bar about what happens between two steps."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)


class Count(_Shown):
    """Progress of a loop over many items; `total` may be unknown."""

    def __init__(self, description: str, unit: str, total: int | None = None, *, shown: bool = True):
        super().__init__(description, f" {unit}", total, 0, shown)
        self._unit, self._done = unit, 0

    def update(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._due():
            rate = self._done / (self._printed - self._began)
            of, left = "", ""
            if self._total is not None:
                of, left = f" of {self._total:,}", f", {(self._total - self._done) / max(rate, 1e-9):.0f} s left"
            print(
                f"{self._description}: {self._done:,}{of} {self._unit}, {_short(rate)} a second{left}", file=sys.stderr
            )


def counted(items: Iterable[Item], description: str, *, unit: str, shown: bool = True) -> Iterator[Item]:
    """The items, while a `Count` of them is shown."""
    with Count(description, unit, shown=shown) as count:
        for number, item in enumerate(items, start=1):
            yield item
            if number % 256 == 0:  # a look at the clock for each of millions of texts would be noticeable
                count.update(256)


def _short(number: float) -> str:
    """12,300 as 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}" if number >= 10 or number == 0 else f"{number:.1f}"
