"""Directories of finished runs without training: parameters as they were drawn, and what the commands write beside."""

import jax
import jax.numpy as jnp
import numpy as np

from kd_jax.config import to_dict
from kd_jax.config.data import read_prepare
from kd_jax.data.prepared import Prepared, prepare
from kd_jax.data.text.utterances import LabelMaps
from kd_jax.jobs import finetune, masked_lm, serving
from kd_jax.models.functional import Functional
from kd_jax.runtime.files import write_json
from kd_jax.trainer.checkpoint import FOLDER, Checkpoints
from kd_jax.trainer.run_directory import RunDirectory, mark_done
from kd_jax.trainer.state import params_fingerprint
from tests.support import pretrained


def small_config():
    """A study with its own teacher at a size that takes seconds."""
    config = pretrained.get_config("smoke")
    config.progress = config.tensorboard = False
    config.nlu.max_train = 20
    config.rows.heldout_share = 0.2
    for name in config.sources:
        config.sources[name].max_texts = 40
    return config


def smoke_config(folder):
    """(config, prepared folder) of the default data at that size."""
    config = small_config()
    config.prepared = str(folder)
    prepare(read_prepare(config), to_dict(config), folder)
    return config, Prepared(folder)


def random_params(model):
    """Parameters drawn with NumPy, which compiles nothing; norms and biases are away from ones and zeros."""
    rng = np.random.default_rng(0)
    unread = ["encoder", "layers", "attention_norm"]  # layer 0's in ModernBERT, which stays as it began

    def draw(path, leaf):
        center = 1.0 if path[-1].key == "scale" else 0.0
        values = center + 0.1 * rng.normal(size=leaf.shape)
        if model.config.skip_first_attention_norm and [key.key for key in path[:3]] == unread:
            values[0] = center
        return jnp.asarray(values, jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, model.abstract())


def write_run(workdir, config, prepared, command, keys, model, **notes):
    """A finished run of a command with random parameters, which it returns."""
    params = random_params(model)
    values = to_dict(config)
    directory = RunDirectory(workdir, command, {key: values[key] for key in keys})
    directory.start(tokenizer_fingerprint=prepared.tokenizer.fingerprint, **notes)
    with Checkpoints(workdir / FOLDER, keep=1) as checkpoints:
        checkpoints.save(1, {"step": jnp.int32(1), "params": params}, {"identity": {}})
        checkpoints.wait()
    mark_done(workdir, parameters_fingerprint=params_fingerprint(params))
    return params


def write_student(workdir, config, prepared, command="distill"):
    """(model, parameters) of a distilled student, or of one that learned by the masked-LM loss ("pretrain")."""
    model = masked_lm.encoder_model(config.student, prepared, "float32", "student")
    keys = ("prepared", "seed", "transfer", "student", "vocabulary", "teacher_checkpoint", "teacher_cache", command)
    params = write_run(workdir, config, prepared, command, keys, model, terms={"kl": [1.0, 1.0]})
    rows = [{"store": "task-en-US", "kind": "task", "language": "en-US", "loss": 2.5, "accuracy": 0.5, "count": 10}]
    write_json(workdir / masked_lm.HELDOUT, rows)
    return model, params


def write_finetuned(workdir, config, prepared, task, domain=""):
    """(model, parameters, label maps) of a finetuning run from scratch, of all domains or of one."""
    known = prepared.utterances
    maps = LabelMaps.for_domain(known, domain) if domain else LabelMaps.from_train(known)
    sizes = finetune.class_counts(task, maps)
    model: Functional = finetune.classifier(
        config.student,
        prepared,
        config.finetune.dropout,
        config.finetune.pooling,
        config.compute_dtype,
        task,
        sizes,
    )
    keys = ("prepared", "seed", "finetune", "compute_dtype", "student", "vocabulary")
    train = finetune.of_domain(known, "train", domain)
    notes = {
        "train_utterances": 20,
        "classes": sizes,
        "labels": maps.to_json(),
        "seen": serving.Seen.of(train, prepared.settings.nlu.character_locales).to_json(),
    }
    params = write_run(workdir, config, prepared, f"finetune_{task}", keys, model, **notes)
    write_json(workdir / finetune.DEV, {"score": 0.5, "accuracy": 0.75, "error_rate": 0.25, "count": 7})
    return model, params, maps
