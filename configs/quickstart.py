"""A complete study on the embedded data with a published teacher, small enough for a laptop.

Command:   bash launch/quickstart.sh
           python -m kd_jax.main.study --config=configs/quickstart.py --workdir=runs/quickstart
Needs:     pip install "kd_jax[demo]"
Hardware:  two CPU cores, 4 GB of memory
Time:      six minutes
Result:    docs/quickstart.md
"""

from ml_collections import ConfigDict

from kd_jax.config import base

LANGUAGES = ("en", "de", "es", "fr")
LOCALES = ("en-US", "de-DE", "es-ES", "fr-FR")


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.nlu.update({"format": "embedded", "locales": LOCALES})
    config.sources.generic = base.source("generic", "embedded", LANGUAGES, spoken_share=0.7)
    config.sources.generic.max_texts = 1500
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.tokenizer.update({"kind": "load", "path": "embedded"})  # multilingual-e5-small in 4 bits, from pip
    config.rows.length = 64
    config.teacher = base.encoder("minilm_l12_h384", vocab_size=0)
    config.student = base.encoder("student_small")
    config.vocabulary.update({"trim": True, "min_count": 2})

    # The recipe of configs/massive_me5.py: states of unmasked text, centered, and the teacher's token table.
    config.distill.update({"steps": 200, "batch_size": 16, "learning_rate": 3e-3, "warmup_steps": 10})
    config.distill.update({"schedule": "cosine", "clean": True, "center": True})
    config.distill.update({"init": "teacher", "init_layers": "none", "table_rate": 1 / 3})
    config.distill.kl.weight = config.distill.mlm.weight = 0.0
    config.distill.hidden.weight = 1.0
    config.distill.hidden.layers = "last"
    config.finetune.update({"batch_size": 32, "warmup_steps": 20, "max_train": 150, "pooling": "mean"})
    config.finetune.update({"encoder_rate": 0.3, "checkpoint_every": 10_000})

    config.study.transfer_sets = ConfigDict({"generic": 0.0, "mix50": 0.5, "task": 1.0})
    config.study.update(
        {
            "name": "Quickstart on the embedded data",
            "teacher_import": "embedded",
            "train_head": False,
            "adapted_sets": (),
            "mlm_sets": ("task",),
            "seeds": (0, 1, 2),
            "recipe_learning_rates": (2e-3,),
            "recipe_epochs": (10,),
        }
    )
    if argument != "smoke":
        return config
    config = base.smoke(config)
    config.teacher = base.encoder("minilm_l12_h384", vocab_size=0)
    return config
