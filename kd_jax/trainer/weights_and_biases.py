"""Weights & Biases behind config.wandb: imported only where a project is named, and on process 0 only."""

import importlib
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jax

from kd_jax.config.execution import Wandb
from kd_jax.runtime.copies import on_this_host
from kd_jax.runtime.files import read_json, write_json
from kd_jax.runtime.paths import as_path, make_folder
from kd_jax.types import UserError

FILE = "wandb.json"  # in the run's directory: the id under which a restart goes on


class Tracker:
    """One run of Weights & Biases per run directory; a restart continues it.

    settings: config.wandb. Raises UserError when the package is missing, before anything is written.
    """

    def __init__(self, settings: Wandb, workdir: str | os.PathLike, config: Mapping[str, Any]):
        try:
            self._package: Any = importlib.import_module("wandb")
        except ImportError:
            self._package = None
        # The package leaves folders of its own name behind, which can be imported as well.
        if not hasattr(self._package, "init"):
            raise UserError(
                "config.wandb.project: it is set, and the package wandb is not installed; install it with "
                "`pip install wandb`, or empty the key"
            )
        self._settings, self._folder, self._config = settings, as_path(workdir), dict(config)
        self._run: Any = None

    def start(self) -> None:
        """Begins the run, or continues it."""
        files = on_this_host(self._folder)
        for folder in (self._folder, files):
            make_folder(folder)
        note = self._folder / FILE
        if not note.exists():
            write_json(note, {"id": uuid.uuid4().hex})
        self._run = self._package.init(
            project=self._settings.project,
            entity=self._settings.entity or None,
            group=self._settings.group or None,
            mode=self._settings.mode,
            id=read_json(note)["id"],
            resume="allow",
            name=self._folder.name,
            dir=str(files),
            config=self._config,
        )
        # A restart repeats steps, and the service drops rows whose built-in step is below the last one.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl, without undefined values."""
        self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        """Sends the rest."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def tracker(settings: Wandb, workdir: str | os.PathLike, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker that config.wandb asks for, on process 0; None where it names no project."""
    return Tracker(settings, workdir, config) if settings.project and jax.process_index() == 0 else None
