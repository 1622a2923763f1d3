"""The whole config with its defaults; `kd_jax/config/*.py` documents every key with its unit or range.

An experiment's file calls `get_config()`, changes what it needs, and returns the result. Code never asks for a key that
is not declared here, and an override of an unknown key is an error.
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

from kd_jax.config.commands import Advise, Baseline, CompileCheck, Evaluate, Export, ImportModel, Latency, Study
from kd_jax.config.data import (
    Cache,
    Masking,
    Nlu,
    Rows,
    Select,
    Source,
    States,
    TokenizerSettings,
    Transfer,
    Vocabulary,
)
from kd_jax.config.execution import Execution
from kd_jax.config.settings import block
from kd_jax.config.training import Distill, Finetune, Pretrain, Training
from kd_jax.models.encoder_config import PRESETS


def source(kind: str, format: str, languages: tuple[str, ...] | FieldReference, **changes: Any) -> ConfigDict:
    """One source of text: a value of config.sources; see config.data.Source.

    With config.nlu.get_oneway_ref("locales") as languages, they follow config.nlu.locales, also on the command line.
    """
    languages = languages if isinstance(languages, FieldReference) else tuple(languages)
    return block(Source, kind=kind, format=format, languages=languages, **changes)


def encoder(preset: str, **changes: Any) -> ConfigDict:
    """The encoder keys of a named size (kd_jax/models/encoder_config.py); vocab_size 0 means the tokenizer's."""
    keys = ConfigDict(dict(PRESETS[preset]))
    keys.update(changes)
    return keys


def get_config() -> ConfigDict:
    """Every key with its default."""
    config = block(Execution)  # mesh, sharding, storage, attention, logits, watchdog, ...: how a run is executed
    config.seed = 0  # student init, data order, dropout and finetuning
    config.compute_dtype = "auto"  # auto (float32 on CPU, bfloat16 elsewhere) | float32 | bfloat16

    # Text.
    config.prepared = ""  # folder that `prepare` wrote; every other command reads it
    config.nlu = block(Nlu)
    config.sources = ConfigDict()  # name -> source(...)
    config.tokenizer = block(TokenizerSettings)
    config.rows = block(Rows)
    config.select = block(Select)
    config.transfer = block(Transfer)
    config.masking = block(Masking)
    config.vocabulary = block(Vocabulary)

    # Models.
    config.teacher = encoder("teacher_small")
    config.student = encoder("student_small")
    config.intermediate = encoder("student_base")  # the study's chains: distilled from the teacher, then a teacher
    # distill, baseline: workdir of a pretrain, import_model or distill run; several are joined by commas
    config.teacher_checkpoint = ""
    config.teacher_cache = ""  # distill: workdir of a cache_teacher or cache_states run; the teacher is then not loaded
    config.import_model = block(ImportModel)
    config.cache = block(Cache)
    config.states = block(States)

    # Jobs.
    config.pretrain = block(Pretrain)
    config.train_body = True  # pretrain: False freezes the encoder and trains the masked-LM head alone, no weight decay
    config.adapt = block(Training)  # the study's adapted teacher: the generic one, trained on with task text
    config.distill = block(Distill)
    config.chain = block(Training)  # the study's chains: the job of the intermediate, with config.distill's terms
    config.finetune = block(Finetune)
    config.baseline = block(Baseline)
    config.evaluate = block(Evaluate)
    config.export = block(Export)
    config.latency = block(Latency)
    config.compile_check = block(CompileCheck)
    config.study = block(Study)
    config.advise = block(Advise)
    return config


def distill_states(config: ConfigDict, model: str, preset: str) -> None:
    """Sets the recipe of docs/results/massive_me5.md: students learn the states of a published sentence encoder.

    model: of `transformers`, by its name on the hub or its folder, or "embedded". preset: its shape (PRESETS).
    """
    config.tokenizer.update({"kind": "load", "path": model})
    config.vocabulary.update({"trim": True, "min_count": 2})  # it covers a hundred languages
    config.teacher = encoder(preset, vocab_size=0)
    config.study.update({"teacher_import": model, "train_head": False, "adapted_sets": ()})
    # States of unmasked text, which the teacher computes once for all students, and a token table that starts from the
    # principal components of the teacher's. Heads read the mean of the states, as such models were trained. The states
    # of e5 have a cosine of 0.84 with their common mean; uncentered, a student learned nothing else in 400 steps.
    config.distill.update({"clean": True, "center": True, "schedule": "cosine", "learning_rate": 3e-3})
    config.distill.update({"init": "teacher", "init_layers": "none", "table_rate": 1 / 3})
    config.distill.kl.weight = config.distill.mlm.weight = 0.0
    config.distill.hidden.weight = 1.0
    config.distill.hidden.layers = "last"
    config.finetune.update({"pooling": "mean", "learning_rate": 2e-3})
    # Distilled students finetune better with a slow encoder, students from scratch do not, so both rates are searched.
    config.study.update({"recipe_learning_rates": (2e-3,), "recipe_encoder_rates": (1.0, 0.3)})


JOBS = ("pretrain", "adapt", "distill", "chain", "finetune")


def smoke(config: ConfigDict) -> ConfigDict:
    """The same experiment with two steps per job, one seed and tiny models (but an imported teacher): does it run?"""
    config.nlu.max_train = 200
    for name in config.sources:
        config.sources[name].max_texts = 200
    config.tokenizer.vocab_size = min(config.tokenizer.vocab_size, 600)
    config.rows.length = min(config.rows.length, 32)
    if not config.study.teacher_import:
        config.teacher = encoder("tiny")
    config.student = encoder("tiny")
    config.intermediate = encoder("tiny")
    for name in JOBS:
        config[name].update({"steps": 2, "batch_size": 8, "warmup_steps": 1, "log_every": 1, "evaluate_rows": 8})
    config.study.update(
        {
            "seeds": (0,),
            "recipe_learning_rates": (1e-3,),
            "recipe_epochs": (0,),
            "workers": 1,
            "recipe_encoder_rates": (),
        }
    )
    config.study.require_teacher_better_than_unigram = False
    config.latency.calls = 5
    return config
