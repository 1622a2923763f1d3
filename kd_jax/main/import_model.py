"""Reads a model of `transformers` into the directory of a run, from which others start or distill.

python -m kd_jax.main.import_model --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.import_model.path=FOLDER_OR_HUB_NAME
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from kd_jax.config import identity, resolved
from kd_jax.config.commands import ImportModel
from kd_jax.config.data import Masking
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.data.embedded.teacher import EMBEDDED_HUB_NAME, EMBEDDED_MODEL, embedded_model, model_title
from kd_jax.data.prepared import Prepared
from kd_jax.data.text.files import fill_path
from kd_jax.data.text.tokenizer import HUB_NAME, Tokenizer
from kd_jax.jobs import masked_lm, trained
from kd_jax.jobs.job import model_layout
from kd_jax.main import command
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional, parameter_count
from kd_jax.models.huggingface.checkpoint import unused_heads
from kd_jax.models.huggingface.config import CONFIG, read_config
from kd_jax.models.huggingface.files import TensorFiles, check_files, load_params
from kd_jax.runtime.files import write_json
from kd_jax.trainer.checkpoint import FOLDER, Checkpoints
from kd_jax.trainer.mesh import make_mesh, row_multiple
from kd_jax.trainer.run_directory import RunDirectory, run_once
from kd_jax.trainer.state import params_notes
from kd_jax.types import UserError

KEY = "import_model.path"
# Of a repository on the hub: its own files, not the copies for other programs in subfolders.
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "README.md")


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return ("prepared", "seed", "import_model", "masking", "compute_dtype")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Checks everything, then writes a finished run whose checkpoint of step 0 holds the model's parameters."""
    settings, execution = read(ImportModel, config.import_model, "import_model"), read_execution(config)
    masking, seed = read(Masking, config.masking, "masking"), config.seed
    name = fill_path(settings.path, key=f"config.{KEY}")
    folder = model_folder(name, settings.revision)
    values, prepared = read_config(folder), Prepared(config.prepared)
    check_tokenizer(name, folder, prepared)
    stored, size = values["vocab_size"], prepared.tokenizer.vocab_size
    if stored < size:
        raise UserError(
            f"{folder / CONFIG}: vocab_size is {stored}, and the tokenizer has {size} tokens; use the tokenizer that "
            "belongs to the model"
        )
    values["vocab_size"] = size
    mesh = make_mesh(execution.mesh)

    def work(directory: RunDirectory) -> dict[str, Any]:
        directory.start(
            tokenizer_fingerprint=prepared.tokenizer.fingerprint,
            parameters=parameter_count(model.abstract()),
            source=model_title(name) if name == EMBEDDED_MODEL else str(folder),
            hub_name=hub_name(name),
            license=stated_license(folder),
            masked_lm_head="imported" if has_head else "new",
            rows_left_out=stored - size,
        )
        layout = model_layout(model, mesh, execution.sharding.teacher)
        params = load_params(files, shape, layout, stored_vocab_size=stored, head_key=jax.random.key(seed))
        if not has_head and shape.decoder_bias:
            # Log frequencies: a new head would take thousands of small steps to learn them, and little else meanwhile.
            bias = masked_lm.unigram_log_probabilities(prepared)["generic"]
            params["mlm_head"]["bias"] = jax.device_put(bias, layout["mlm_head"]["bias"])
        if jax.process_index() == 0:
            left_out = unused_heads(files.names(), shape)
            print("".join(f"{line}\n" for line in remarks(has_head, stored - size, left_out)), end="")
        with Checkpoints(workdir / FOLDER, keep=1) as checkpoints:
            checkpoints.save(0, {"step": jnp.int32(0), "params": params}, {"identity": {"config": identity(record)}})
            checkpoints.wait()
        rows: list[dict[str, Any]] = []
        if settings.evaluate_rows and has_head:  # the loss of an untrained head would say nothing about the model
            measured = dataclasses.replace(model, compute_dtype=masked_lm.resolve_dtype(config.compute_dtype))
            at_once = row_multiple(mesh) * -(-8 // row_multiple(mesh))
            rows = masked_lm.heldout_rows(measured, params, prepared, masking, mesh, at_once, settings.evaluate_rows)
        if jax.process_index() == 0:
            write_json(workdir / masked_lm.HELDOUT, rows)
        return params_notes(params)

    with TensorFiles(folder) as files:
        # Before the directory is claimed, so that a model that is refused leaves nothing.
        has_head = check_files(files, EncoderConfig(**values), stored_vocab_size=stored)
        values["tied_decoder"] |= not has_head  # a new head reads the token table
        shape = EncoderConfig(**values)
        model, record = Functional("mlm", shape), {**resolved(config, keys(config)), "teacher": values}
        run_once(workdir, "import_model", record, execution, work)


def remarks(has_head: bool, rows_left_out: int, tensors_left_out: Sequence[str] = ()) -> list[str]:
    """What the user should know about the imported model, one sentence per line."""
    lines: list[str] = []
    if tensors_left_out:
        lines.append(f"Left out, since they are the head of a finetuned model: {', '.join(tensors_left_out)}.")
    if not has_head:
        lines.append(
            "The model has no masked-LM head: a new one, tied to its token table, was drawn from config.seed. Train it "
            "before distilling logits: pretrain with --config.pretrain.init_from=THIS --config.train_body=False."
        )
    if rows_left_out:
        lines.append(f"{rows_left_out} rows of the token table belong to no token of the tokenizer and were left out.")
    return lines


def hub_name(name: str) -> str:
    """The name on the hub of the model that a config names; empty for a folder."""
    if name == EMBEDDED_MODEL:
        return EMBEDDED_HUB_NAME
    return "" if pathlib.Path(name).expanduser().is_dir() else name


def stated_license(folder: pathlib.Path) -> str:
    """The license in the front matter of a model's README.md; empty if none is stated."""
    from huggingface_hub import metadata_load  # slow to import

    try:
        stated = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:  # no file, no front matter, or invalid YAML
        return ""
    return stated if isinstance(stated, str) else ""


def model_folder(name: str, revision: str = "") -> pathlib.Path:
    """The folder of a model: `name` itself, that of the embedded model, or the download of that name from the hub.

    Raises UserError if there is none.
    """
    if name == EMBEDDED_MODEL:
        return embedded_model(KEY)
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"config.{KEY}: there is no folder {name}; name a model's folder or its name on the hub")
    from huggingface_hub import snapshot_download  # slow to import, and not needed for folders

    try:
        wanted = {"allow_patterns": list(_WANTED), "ignore_patterns": ["*/*"]}
        return pathlib.Path(snapshot_download(name, revision=revision or None, **wanted))
    except Exception as error:
        raise UserError(
            f"config.{KEY}: there is no folder {name}, and the hub gave no model of that name "
            f"({type(error).__name__}); check the name and the network, or download it and name its folder"
        ) from error


def check_tokenizer(name: str, folder: pathlib.Path, prepared: Prepared) -> None:
    """Raises UserError, with the first difference, when `prepared` was made with another tokenizer than the model's."""
    theirs, ours = Tokenizer.load(folder), prepared.tokenizer
    if theirs.fingerprint == ours.fingerprint:
        return
    # `prepare` may have loaded it by its name on the hub, through `transformers`, which writes some differently.
    if str(folder) != name and Tokenizer.load(name).fingerprint == ours.fingerprint:
        return
    raise UserError(
        f"config.prepared: its rows were made with another tokenizer than {name} has"
        f"{trained.first_difference(theirs, ours)}; prepare again with --config.tokenizer.kind=load "
        f"--config.tokenizer.path={name}"
    )


if __name__ == "__main__":
    command.main(run, description="Reads a model of `transformers` into the directory of a run.")
