"""A study that pretrains its teacher and distills its logits, on the embedded data: the config of most tests."""

from ml_collections import ConfigDict

from kd_jax.config import base

LANGUAGES = ("en", "de", "es", "fr")
LOCALES = ("en-US", "de-DE", "es-ES", "fr-FR")


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.nlu.update({"format": "embedded", "locales": LOCALES})
    config.sources.generic = base.source("generic", "embedded", LANGUAGES, spoken_share=0.7)
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.tokenizer.vocab_size = 4000
    config.rows.length = 64

    config.teacher = base.encoder("teacher_small", hidden_size=160, num_layers=3, num_heads=5, intermediate_size=256)
    config.student = base.encoder("student_small", hidden_size=96, num_heads=3, intermediate_size=144)
    config.pretrain.update({"steps": 250, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 30})
    config.adapt.update({"steps": 60, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 10})
    config.distill.update({"steps": 50, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 10})
    config.finetune.update({"batch_size": 32, "warmup_steps": 20, "max_train": 400, "checkpoint_every": 10_000})

    config.study.update(
        {
            "name": "Quickstart on the embedded default",
            "adapted_sets": ("task",),
            "mlm_sets": ("task",),
            "seeds": (0, 1, 2),
            "recipe_learning_rates": (1e-3, 3e-3),
            "recipe_epochs": (4,),
            # So little generic text teaches little about the task; the report says how much, and the study continues.
            "require_teacher_better_than_unigram": False,
        }
    )
    return base.smoke(config) if argument == "smoke" else config
