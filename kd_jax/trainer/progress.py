"""The progress of a training run: a bar on a terminal, a line now and then in a log file."""

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

import jax
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Shows loss, real and padded tokens a second, the share of useful tokens and the time left; on process 0 only."""

    def __init__(self, description: str, start: int, steps: int, lines: Sequence[str] = (), *, shown: bool = True):
        self._description, self._start, self._steps = description, start, steps
        self._shown = shown and jax.process_index() == 0
        self._bar = None
        self._began = self._printed = time.monotonic()
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
        if now - self._printed >= SECONDS_BETWEEN_LINES:
            left = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            print(f"{self._description}: step {step}/{self._steps}, {text}, {left:.0f} s left", file=sys.stderr)
            self._printed = now

    def say(self, text: str) -> None:
        """A line of its own, also where no progress is shown; on process 0 only."""
        if jax.process_index() == 0:
            tqdm.write(text, file=sys.stderr)

    def note(self, text: str) -> None:
        """A word beside the bar about what is going on between two steps."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _short(number: float) -> str:
    """12,300 as 12.3k."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
