"""Reading back what another run trained: its encoder's config and its parameters."""

import itertools
import pathlib
from typing import Any

from ml_collections import ConfigDict

from kd_jax.config import from_dict
from kd_jax.config.data import Vocabulary
from kd_jax.config.settings import read
from kd_jax.data.prepared import Prepared
from kd_jax.data.rows import MANIFEST
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs.job import BEST_STEP
from kd_jax.models.functional import Functional
from kd_jax.runtime.files import RESTORE, digest_of, read_json_object
from kd_jax.runtime.paths import as_path, is_there
from kd_jax.trainer.checkpoint import load_params
from kd_jax.trainer.mesh import DEFAULT, Rules, shardings
from kd_jax.trainer.run_directory import CONFIG, DONE, RUN, SUMS
from kd_jax.trainer.state import check_parts, with_shardings
from kd_jax.types import Params, UserError


def run_config(workdir: str | pathlib.Path, key: str) -> ConfigDict:
    """The resolved config of a run; `key` is the config key that named its directory."""
    config = from_dict(_recorded(workdir, CONFIG, key)["config"])
    # What 0.2.0 had no key for.
    for block, name, value in (
        ("finetune", "pooling", "first"),
        ("finetune", "labels", ""),
        ("transfer", "task_texts", 0),
    ):
        if block in config and name not in config[block]:
            config[block][name] = value
    return config


def _recorded(workdir: str | pathlib.Path, name: str, key: str) -> dict[str, Any]:
    """Reads config.json or run.json of a run."""
    try:
        return read_json_object(as_path(workdir) / name)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"config.{key}: {workdir} holds no {name}; give the workdir of a finished run") from None


def run_command(workdir: str | pathlib.Path, key: str = "checkpoint") -> str:
    """The command that a run's directory belongs to."""
    return _recorded(workdir, CONFIG, key)["command"]


def run_record(workdir: str | pathlib.Path, key: str = "checkpoint") -> dict[str, Any]:
    """What a run's run.json says."""
    return _recorded(workdir, RUN, key)


def encoder_block(workdir: str | pathlib.Path, key: str) -> dict[str, Any]:
    """The encoder keys of the model that a pretrain, distill or initialize run wrote, or that import_model read."""
    config = run_config(workdir, key)
    which = config.pretrain.model if "pretrain" in config else "teacher" if "import_model" in config else "student"
    if which not in config:
        raise UserError(
            f"config.{key}: {workdir} is not a pretrain, distill or import_model run; give the workdir of one"
        )
    return config[which].to_dict()


def tokenizer_fingerprint(workdir: str | pathlib.Path) -> str:
    """Of the tokenizer, trimmed or not, that a run's rows were made with."""
    return run_record(workdir)["tokenizer_fingerprint"]


def check_tokenizer(workdir: str | pathlib.Path, prepared: Prepared, key: str) -> None:
    """Raises when the run was trained on rows of another tokenizer than `prepared` has, naming the first difference."""
    recorded = tokenizer_fingerprint(workdir)
    if recorded != prepared.tokenizer.fingerprint:
        raise UserError(
            f"config.{key}: {workdir} was trained with another tokenizer ({recorded[:12]}) than config.prepared has "
            f"({prepared.tokenizer.fingerprint[:12]}){_first_difference(workdir, prepared, key)}; prepare the data "
            "with that run's tokenizer (config.tokenizer.kind=load)"
        )


def _first_difference(workdir: str | pathlib.Path, prepared: Prepared, key: str) -> str:
    """Where the two token maps part, as far as the run's own prepared folder is still there to be read."""
    folder = as_path(run_config(workdir, key).prepared)
    return first_difference(Prepared(folder).tokenizer, prepared.tokenizer) if is_there(folder / MANIFEST) else ""


def first_difference(theirs: Tokenizer, ours: Tokenizer) -> str:
    """The first id that two tokenizers read differently, as the end of a message."""
    tokens = theirs.tokens(), ours.tokens()
    for i, (one, other) in enumerate(itertools.zip_longest(*tokens)):
        if one != other:
            names = " and ".join("nothing" if token is None else repr(token) for token in (one, other))
            return f": id {i} stands for {names} ({len(tokens[0])} and {len(tokens[1])} tokens)"
    return ": the tokens are the same, but text is normalized or split differently"


def own_prepared(workdir: str | pathlib.Path, key: str) -> Prepared:
    """The prepared folder that a run was made with, for its tokenizer. Raises UserError if it is gone."""
    folder = as_path(run_config(workdir, key).prepared)
    if not is_there(folder / MANIFEST):
        raise UserError(
            f"config.{key}: {workdir} has another tokenizer than config.prepared, and {folder}, which has it, is gone; "
            "prepare it again"
        )
    return run_prepared(workdir, Prepared(folder), key)


def run_prepared(workdir: str | pathlib.Path, prepared: Prepared, key: str) -> Prepared:
    """The prepared folder as the model of a run saw it: with its vocabulary, trimmed or not."""
    config = run_config(workdir, key)
    return (
        seen_by_student(prepared, read(Vocabulary, config.vocabulary, "vocabulary"))
        if "vocabulary" in config
        else prepared
    )


def whole(file: pathlib.Path) -> pathlib.Path:
    """One of RESULT_FILES of a run. Raises UserError if it was changed or removed since the run finished."""
    for folder in (file.parent, file.parent.parent):  # a baseline has one folder for each task
        noted = ended(folder).get(SUMS, {}).get(file.relative_to(folder).as_posix())
        if noted is not None and not (file.is_file() and digest_of(file) == noted):
            raise UserError(f"{file}: is missing, or was changed or damaged since it was written; {RESTORE}")
    return file


def ended(workdir: str | pathlib.Path) -> dict[str, Any]:
    """What a finished run recorded at its end; {} for one that is not finished."""
    try:
        return read_json_object(as_path(workdir) / DONE)
    except (FileNotFoundError, NotADirectoryError):
        return {}


def parameters_fingerprint(workdir: str | pathlib.Path, key: str) -> str:
    """Fingerprint of a finished run's parameters: those of its best evaluation if it kept them, else the last."""
    notes = ended(workdir)
    if notes:
        return notes["parameters_fingerprint"]
    if not is_there(as_path(workdir)):
        raise UserError(f"config.{key}: {workdir} does not exist; name the workdir of a finished run")
    raise UserError(f"config.{key}: {workdir} is not finished; start its command again first")


def trained_params(
    workdir: str | pathlib.Path,
    model: Functional,
    mesh,
    subtree: str | None = None,
    rules: Rules = DEFAULT,
) -> Params:
    """The parameters (or one subtree) of a run, placed on the mesh by the rules: those of its best evaluation if it
    finished and kept them, else those of its newest checkpoint."""
    abstract, axes = model.abstract(), model.logical_axes()
    if subtree:
        abstract, axes = {subtree: abstract[subtree]}, {subtree: axes[subtree]}
    placed = with_shardings(abstract, shardings(mesh, axes, abstract, rules))
    notes = ended(workdir)
    params = load_params(workdir, placed, notes.get(BEST_STEP))
    check_parts(params, notes.get("parts", {}), workdir)
    return params
