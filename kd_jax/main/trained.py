"""Reading back what another run trained: its encoder's config and its parameters."""

import json
import pathlib
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import from_dict
from kd_jax.data.prepared import Prepared
from kd_jax.models.functional import Functional
from kd_jax.trainer.checkpoint import load_params
from kd_jax.trainer.mesh import shardings
from kd_jax.trainer.state import with_shardings
from kd_jax.types import Params, UserError


def run_config(workdir: str | pathlib.Path, key: str) -> ConfigDict:
    """The resolved config of a run; `key` is the config key that named its directory."""
    file = pathlib.Path(workdir) / "config.json"
    if not file.is_file():
        raise UserError(f"config.{key}: {workdir} holds no config.json; give the workdir of a finished run")
    return from_dict(read_json(file)["config"])


def encoder_block(workdir: str | pathlib.Path, key: str) -> ConfigDict:
    """The encoder keys of the model that a pretrain or distill run trained."""
    config = run_config(workdir, key)
    which = config.pretrain.model if "pretrain" in config else "student"
    if which not in config:
        raise UserError(f"config.{key}: {workdir} is no pretrain or distill run; give the workdir of one")
    return config[which]


def check_tokenizer(workdir: str | pathlib.Path, prepared: Prepared, key: str) -> None:
    """Raises when the run was trained on rows of another tokenizer than `prepared` has."""
    recorded = read_json(pathlib.Path(workdir) / "run.json")["tokenizer_fingerprint"]
    if recorded != prepared.tokenizer.fingerprint:
        raise UserError(
            f"config.{key}: {workdir} was trained with another tokenizer ({recorded[:12]}) than config.prepared has "
            f"({prepared.tokenizer.fingerprint[:12]}); prepare the data with that run's tokenizer"
        )


def trained_params(workdir: str | pathlib.Path, model: Functional, mesh, subtree: str | None = None) -> Params:
    """The parameters (or one subtree) of a run's newest checkpoint, placed on the mesh."""
    abstract, axes = model.abstract(), model.logical_axes()
    if subtree:
        abstract, axes = {subtree: abstract[subtree]}, {subtree: axes[subtree]}
    return load_params(workdir, with_shardings(abstract, shardings(mesh, axes, abstract)))


def read_json(file: pathlib.Path) -> Any:
    """The value that a JSON file holds."""
    return json.loads(file.read_text(encoding="utf-8"))
