"""Weights & Biases behind config.wandb: imported only where a project is named, and on process 0 only."""

import importlib
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.runtime.copies import on_this_host
from kd_jax.runtime.files import read_json, write_json
from kd_jax.runtime.paths import as_path, make_folder

FILE = "wandb.json"  # in the run's directory: the id under which a restart goes on
MODES = ("online", "offline")


class Tracker:
    """One run of Weights & Biases for one run's directory; a restart goes on with the same one.

    settings: config.wandb. Raises UserError when the package is missing, before anything is written.
    """

    def __init__(self, settings: ConfigDict, workdir: str | os.PathLike, config: Mapping[str, Any]):
        require(settings.mode in MODES, "wandb.mode", f"{settings.mode!r} is unknown", f"use {' or '.join(MODES)}")
        try:
            self._package: Any = importlib.import_module("wandb")
        except ImportError:
            self._package = None
        # A folder of that name, as the package leaves behind, can be imported too.
        found = hasattr(self._package, "init")
        remedy = "install it with `pip install wandb`, or empty the key"
        require(found, "wandb.project", "it is set, and the package wandb is not installed", remedy)
        self._settings, self._folder, self._config = settings, as_path(workdir), dict(config)
        self._run: Any = None

    def start(self) -> None:
        """Begins the run, or goes on with it."""
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
        # A restart repeats steps, and the service takes no row whose own step is below the last one.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, Any]) -> None:
        """One row of metrics.jsonl; what is undefined is left out."""
        self._run.log({name: value for name, value in row.items() if value is not None})

    def close(self) -> None:
        """Sends what is left."""
        if self._run is not None:
            self._run.finish()
            self._run = None


def tracker(settings: ConfigDict, workdir: str | os.PathLike, config: Mapping[str, Any]) -> Tracker | None:
    """The tracker that config.wandb asks for, on process 0; None where it names no project."""
    return Tracker(settings, workdir, config) if settings.project and jax.process_index() == 0 else None
