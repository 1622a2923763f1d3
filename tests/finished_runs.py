"""Directories of finished runs without training: parameters as they were drawn, and what the commands write beside."""

import jax
import jax.numpy as jnp

from configs import quickstart
from kd_jax.config import to_dict
from kd_jax.data.prepared import Prepared, prepare
from kd_jax.data.utterances import LabelMaps
from kd_jax.main import finetune, masked_lm
from kd_jax.models.functional import Functional
from kd_jax.trainer.checkpoint import FOLDER, Checkpoints
from kd_jax.trainer.disk import write_json
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.trainer.state import params_fingerprint


def smoke_config(folder):
    """(config, prepared folder) of the default data at a size that takes seconds."""
    config = quickstart.get_config("smoke")
    config.progress = config.tensorboard = False
    config.nlu.max_train = 20
    config.rows.heldout_share = 0.2
    for name in config.sources:
        config.sources[name].max_texts = 40
    config.prepared = str(folder)
    prepare(config, folder)
    return config, Prepared(folder)


def write_run(workdir, config, prepared, command, keys, model, **notes):
    """A finished run of a command with fresh parameters, which it returns."""
    params = jax.jit(model.init)(jax.random.key(5))
    values = to_dict(config)
    directory = RunDirectory(workdir, command, {key: values[key] for key in keys})
    directory.start(tokenizer_fingerprint=prepared.tokenizer.fingerprint, **notes)
    with Checkpoints(workdir / FOLDER, keep=1) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1), "params": params}, {"identity": {}})
        checkpoints.wait()
    directory.finish(parameters_fingerprint=params_fingerprint(params))
    return params


def write_student(workdir, config, prepared, command="distill"):
    """(model, parameters) of a distilled student, or of one that learned by the masked-LM loss ("pretrain")."""
    model = masked_lm.encoder_model(config.student, prepared, "float32", "student")
    keys = ("prepared", "seed", "transfer", "student", "vocabulary", "teacher_checkpoint", "teacher_cache", command)
    params = write_run(workdir, config, prepared, command, keys, model, terms={"kl": [1.0, 1.0]})
    rows = [{"store": "task-en-US", "kind": "task", "language": "en-US", "loss": 2.5, "accuracy": 0.5, "count": 10}]
    write_json(workdir / masked_lm.HELDOUT, rows)
    return model, params


def write_finetuned(workdir, config, prepared, task):
    """(model, parameters, label maps) of a finetuning run from scratch."""
    maps = LabelMaps.from_train(prepared.utterances)
    sizes = finetune.class_counts(task, maps)
    model: Functional = finetune.classifier(config.student, prepared, config, task, sizes)
    keys = ("prepared", "seed", "finetune", "compute_dtype", "student", "vocabulary")
    notes = {"train_utterances": 20, "classes": sizes, "labels": maps.to_json()}
    params = write_run(workdir, config, prepared, f"finetune_{task}", keys, model, **notes)
    write_json(workdir / finetune.DEV, {"score": 0.5, "accuracy": 0.5, "count": 7})
    return model, params, maps
