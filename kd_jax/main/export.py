"""Writes a trained model as a folder that `transformers` loads, with its tokenizer, label names and a model card.

python -m kd_jax.main.export --config=configs/FILE.py --workdir=DIR --config.export.checkpoint=DIR

--config.export.stablehlo=True adds the compiled program and its weights (kd_jax/jobs/serving.py), which need only jax;
--config.export.int8=True writes the weights in int8 instead of those that `transformers` loads.
"""

import dataclasses
import importlib.util
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from kd_jax.config import require
from kd_jax.config.commands import Export
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.data.prepared import Prepared
from kd_jax.data.rows import new_folder
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.data.vocabulary import TrimmedTokenizer, standalone
from kd_jax.jobs import finetune, masked_lm, serving, trained
from kd_jax.jobs.model_card import TEXT_HEADS, model_card
from kd_jax.jobs.serving import RECORD
from kd_jax.main import command
from kd_jax.models.functional import Functional, parameter_count
from kd_jax.models.huggingface.checkpoint import exported, tokenizer_ids
from kd_jax.models.huggingface.config import CONFIG
from kd_jax.models.huggingface.files import SINGLE
from kd_jax.runtime.files import read_json, read_json_object, write_json, write_sealed
from kd_jax.runtime.paths import as_path, need_local
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.run_directory import provenance
from kd_jax.types import Params, UserError

KEY = "export.checkpoint"


class Trained(NamedTuple):
    """A finished run's model, the names of its classes, its data and its tokenizer."""

    model: Functional
    params: Params
    classes: dict[str, tuple[str, ...]]
    prepared: Prepared
    tokenizer: Tokenizer  # with the model's vocabulary, for a file of its own
    seen: serving.Seen


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return ("export",)


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes the whole folder atomically; the same command again leaves it as it is."""
    settings, mesh = read(Export, config.export, "export"), make_mesh(read_execution(config).mesh)
    need_local(workdir, "an export")
    source = as_path(settings.checkpoint)
    record = {
        "command": "export",
        # Exports of 0.2.0 have no license key, and stay valid.
        "config": {"export": {name: value for name, value in vars(settings).items() if name != "license" or value}},
        "parameters_fingerprint": trained.parameters_fingerprint(source, KEY),
    }
    if is_exported(workdir, record):
        return
    one = read_run(source, mesh)
    tokenizer, shape, serves = one.tokenizer, one.model.config, settings.int8 or settings.stablehlo
    if serves:
        check_serving(one.model.kind, settings)
    card = model_card(one.model, source, one.prepared, parameter_count(one.params), settings)
    with new_folder(workdir) as folder:
        tokenizer.save(folder)
        # The models have no token types, and no more positions than this.
        limits = {"model_input_names": ["input_ids", "attention_mask"], "model_max_length": shape.max_positions}
        file = folder / "tokenizer_config.json"
        write_json(file, read_json(file) | limits)
        if not settings.int8:
            write_transformers(folder, one)
        if serves:
            model, params = serving.without_padding(one.model, one.params, one.classes)
            length, form = one.prepared.settings.rows.length, {"int8": settings.int8, "program": settings.stablehlo}
            serving.write(folder, model, params, one.classes, length=length, seen=one.seen, **form)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_sealed(folder / RECORD, {**record, **provenance()})
        for file in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner only
            shutil.copymode(folder / RECORD, file)
    print(f"{workdir} is written; its README.md says what it is and how to load it.")


def check_serving(kind: str, settings: Export) -> None:
    """Raises UserError for a model without classes to predict, and if the package that writes programs is missing."""
    key = "export.int8" if settings.int8 else "export.stablehlo"
    require(kind in serving.CLASSES, key, "a masked LM predicts no classes", "finetune it and export that run")
    if settings.stablehlo:
        found = importlib.util.find_spec("flatbuffers") is not None
        require(
            found, "export.stablehlo", "the package with which jax writes programs is missing", "install flatbuffers"
        )


def write_transformers(folder: pathlib.Path, one: Trained) -> None:
    """Writes config.json, model.safetensors and, if it is a separate file, the head that classifies a text."""
    tokenizer, shape = one.tokenizer, one.model.config
    found = exported(one.model, one.params, one.classes)
    ids = tokenizer_ids(shape, cls=tokenizer.cls_id, sep=tokenizer.sep_id, pad=tokenizer.pad_id)
    write_json(folder / CONFIG, found.config | ids)
    save_file(found.tensors, folder / SINGLE, metadata={"format": "pt"})
    if found.text_head:
        save_file(found.text_head, folder / TEXT_HEADS[one.model.kind], metadata={"format": "pt"})


def is_exported(workdir: pathlib.Path, record: dict[str, Any]) -> bool:
    """Whether the directory holds this very export. Raises UserError when it holds anything else."""
    if not workdir.exists() or not any(workdir.iterdir()):
        return False
    if (workdir / RECORD).is_file():
        old = read_json_object(workdir / RECORD)
        if all(old[key] == value for key, value in record.items()):
            return True
    raise UserError(f"{workdir}: holds something other than this export; choose a new --workdir")


def read_run(source: pathlib.Path, mesh: Mesh) -> Trained:
    """The model of a pretrain, distill, import_model or finetune run, in float32.

    Raises UserError for one that cannot be exported.
    """
    saved = trained.run_config(source, KEY)
    if finetune.domain_folders(source):
        raise UserError(f"config.{KEY}: {source} holds a model for each domain; name one of {source}/domains/")
    prepared = Prepared(saved.prepared)
    if "finetune" in saved:
        one = finetune.load_finetuned(source, prepared, mesh, "float32", KEY)
        classes = {name: getattr(one.maps, name) for name in serving.CLASSES[one.task]}
        prepared = finetune.prepared_for(saved, prepared)
        model, params, seen = one.model, one.params, one.seen
    else:
        encoder = trained.encoder_block(source, KEY)
        prepared = trained.run_prepared(source, prepared, KEY)
        trained.check_tokenizer(source, prepared, KEY)
        model = masked_lm.encoder_model(encoder, prepared, "float32", "student")
        params, classes, seen = trained.trained_params(source, model, mesh), {}, serving.Seen()
    extra = model.config.vocab_size - prepared.tokenizer.vocab_size
    if extra:
        raise UserError(f"config.{KEY}: {extra} rows of the token table of {source} have no token; set vocab_size to 0")
    tokenizer = prepared.tokenizer
    if isinstance(tokenizer, TrimmedTokenizer):
        texts = dict.fromkeys(one.text for one in prepared.utterances if one.partition == "train")
        tokenizer, helpers = standalone(tokenizer, list(texts))
        model, params = with_helpers(model, params, helpers, prepared.tokenizer.unk_id)
    return Trained(model, params, classes, prepared, tokenizer, seen)


def with_helpers(model: Functional, params: Params, count: int, unknown: int | None) -> tuple[Functional, Params]:
    """The model with `count` more tokens, which it reads and predicts like the unknown one."""
    assert unknown is not None, "only a vocabulary with an unknown token is trimmed"

    def widened(rows: Any) -> np.ndarray:
        rows = np.asarray(rows)
        return np.concatenate([rows, np.repeat(rows[unknown : unknown + 1], count, axis=0)])

    embeddings = params["encoder"]["embeddings"]
    embeddings = {**embeddings, "tokens": widened(embeddings["tokens"])}
    params = {**params, "encoder": {**params["encoder"], "embeddings": embeddings}}
    if model.kind == "mlm":
        head = params["mlm_head"]
        params["mlm_head"] = {**head, **{name: widened(head[name]) for name in ("decoder", "bias") if name in head}}
    shape = dataclasses.replace(model.config, vocab_size=model.config.vocab_size + count)
    return dataclasses.replace(model, config=shape), params


if __name__ == "__main__":
    command.main(run, description="Writes a trained model as a folder that `transformers` loads.")
