"""metrics.jsonl, copied to TensorBoard and a tracker, and the window that a logged value averages over."""

import json
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax

from kd_jax.runtime.copies import on_this_host, put
from kd_jax.runtime.files import GrowingFile, full_disk_is_user_error, read_json_lines, write_json_lines
from kd_jax.runtime.paths import as_path, is_remote, make_folder, names_in
from kd_jax.trainer.weights_and_biases import Tracker
from kd_jax.types import Array, UserError

FILE = "metrics.jsonl"

# Prefix of values that differ from run to run on the same machine; comparisons of runs leave them out.
TIME = "time/"


class Window:
    """Sums (sum, weight) terms since the last logged step, and divides once.

    In Python's float64: a window may be thousands of steps long, over which float32 sums would lose digits.
    """

    def __init__(self, totals: Mapping[str, tuple[float, float]] | None = None):
        self._totals = {name: (float(value), float(weight)) for name, (value, weight) in (totals or {}).items()}

    def add(self, terms: Mapping[str, tuple[float | Array, float | Array]]) -> None:
        for name, (value, weight) in terms.items():
            old_value, old_weight = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (old_value + float(value), old_weight + float(weight))

    def take(self) -> dict[str, float | None]:
        """name -> sum / weight, or None if nothing was counted; starts a new window."""
        values = {name: value / weight if weight else None for name, (value, weight) in self._totals.items()}
        self._totals = {}
        return values

    def totals(self) -> dict[str, list[float]]:
        """The sums so far as JSON values, for a checkpoint between two logged steps."""
        return {name: [value, weight] for name, (value, weight) in self._totals.items()}


class MetricsWriter:
    """Writes rows {"step": int, name: float or null} to metrics.jsonl, TensorBoard and a tracker; on process 0 only.

    On a remote store, metrics.jsonl is put again every few seconds, and both files by `sync` and `close`.
    """

    def __init__(self, workdir: str | pathlib.Path, tensorboard: bool, tracker: Tracker | None = None):
        self._path = as_path(workdir) / FILE
        self._events = on_this_host(self._path.parent) / "tensorboard"
        self._wants_tensorboard, self._tracker = tensorboard, tracker
        self._writes = jax.process_index() == 0
        self._file = None
        self._tensorboard = None
        self.rows = 0  # in the file, for a checkpoint to remember

    def start(self, step: int, rows: int | None = None) -> int:
        """Continues after `step`: keeps the rows up to it, at most the first `rows`; later ones are from a killed run.

        Returns how many steps the later rows reach beyond `step`: work that was lost and is done again.
        """
        if not self._writes:
            return 0
        self.close()
        make_folder(self._path.parent)
        found = read_json_lines(self._path, growing=True)
        for number, row in enumerate(found, 1):
            if not isinstance(row.get("step"), int):
                raise UserError(f"{self._path}:{number}: has no step; remove the line, or restore the file from a copy")
        kept = [row for row in found[:rows] if row["step"] <= step]
        self.rows = len(kept)
        write_json_lines(self._path, kept)
        self._file = GrowingFile(self._path)
        if self._wants_tensorboard:
            from tensorboardX import SummaryWriter

            if is_remote(self._path):
                shutil.rmtree(self._events, ignore_errors=True)
            # The suffix keeps a restart within the same second from overwriting the former file, named by the second.
            self._tensorboard = SummaryWriter(str(self._events), purge_step=step + 1, filename_suffix=f".{step}")
        if self._tracker is not None:
            self._tracker.start()
        return max([0, *(row["step"] - step for row in found)])

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """One row; a value that is not finite becomes null, since NaN is not JSON."""
        if not self._writes:
            return
        if self._file is None:
            raise RuntimeError("MetricsWriter.start comes before write")
        row: dict[str, Any] = {"step": step}
        row |= {name: _finite(value) for name, value in values.items()}
        with full_disk_is_user_error(self._path):
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self.rows += 1
        if self._tensorboard is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.log(row)

    def sync(self) -> None:
        """Returns when all rows so far are stored; called before a checkpoint that counts them is saved."""
        if self._file is not None:
            self._file.sync()
        if self._tensorboard is not None:
            self._tensorboard.flush()
            self._put_events()

    def _put_events(self) -> None:
        if is_remote(self._path):
            put(self._events, self._path.parent / self._events.name, names_in(self._events))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None
            self._put_events()
        if self._tracker is not None:
            self._tracker.close()


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
