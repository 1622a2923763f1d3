"""The whole study on the embedded default, small enough for a laptop.

Command:   bash launch/quickstart.sh
           python -m kd_jax.main.study --config=configs/quickstart.py --workdir=runs/quickstart
Hardware:  two CPU cores, 4 GB of memory
Time:      under 10 minutes
Result:    a table of students and a report; at this size "no winner" is a fair verdict on the downstream tasks,
           while the held-out masked-LM loss already tells the transfer sets apart
"""

from ml_collections import ConfigDict

from configs import base

LANGUAGES = ("en", "de", "es", "fr")
LOCALES = ("en-US", "de-DE", "es-ES", "fr-FR")


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.nlu.update({"format": "embedded", "locales": LOCALES})
    config.sources.generic = base.source("generic", "embedded", LANGUAGES)
    config.sources.task = base.source("task", "utterances", LOCALES)
    config.tokenizer.vocab_size = 4000
    config.rows.length = 64

    config.teacher = base.encoder("teacher_small", hidden_size=192, num_layers=3, num_heads=3, intermediate_size=288)
    config.student = base.encoder("student_small", hidden_size=96, num_heads=3, intermediate_size=144)
    config.pretrain.update({"steps": 900, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 50})
    config.adapt.update({"steps": 200, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 20})
    config.distill.update({"steps": 250, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 20})
    config.finetune.update({"batch_size": 64, "warmup_steps": 20, "checkpoint_every": 10_000})

    config.study.update(
        {
            "name": "Quickstart on the embedded default",
            "adapted_sets": ("task",),
            "mlm_sets": ("task",),
            "seeds": (0, 1, 2),
            "recipe_learning_rates": (1e-3, 3e-3),
            "recipe_epochs": (4,),
        }
    )
    return base.smoke(config) if argument == "smoke" else config
