"""Compares transfer sets on four locales of MASSIVE, with a small teacher of our own.

Command:   KD_JAX_DATA=DIR python -m kd_jax.main.study --config=configs/massive.py --workdir=runs/massive
           DIR holds nlu/massive/<locale>.jsonl (MASSIVE's files) and generic/<language>.txt.gz (one text per line);
           for other paths: --config.nlu.path=DIR --config.sources.generic.path=DIR/{language}.txt.gz
Hardware:  two CPU cores, 8 GB of memory
Time:      3,490 s for all stages, on a machine with other work
Result:    docs/results/massive.md: no winner, and no distilled student beats training from scratch
"""

from ml_collections import ConfigDict

from kd_jax.config import base

LANGUAGES = ("de", "en", "es", "fr")
LOCALES = ("de-DE", "en-US", "es-ES", "fr-FR")


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.nlu.update({"format": "massive", "path": "${KD_JAX_DATA}/nlu/massive", "locales": LOCALES})
    config.sources.generic = base.source(
        "generic", "text", LANGUAGES, path="${KD_JAX_DATA}/generic/{language}.txt.gz", spoken_share=0.7
    )
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.tokenizer.vocab_size = 8000
    config.rows.length = 64

    config.teacher = base.encoder("teacher_small")
    config.student = base.encoder("student_small")
    # Tokens: 4.9 M for the teacher, another 0.4 M of task text for the adapted one, 0.33 M for each student.
    config.pretrain.update({"steps": 1200, "batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 100})
    config.adapt.update({"steps": 100, "batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 10})
    config.distill.update({"steps": 80, "batch_size": 64, "learning_rate": 3e-3, "warmup_steps": 10})
    # A tenth of the labels, since labels are scarce in practice and unlabeled task text is plentiful.
    config.finetune.update({"batch_size": 32, "warmup_steps": 50, "max_train": 1151})

    config.study.transfer_sets = ConfigDict({"generic": 0.0, "mix50": 0.5, "task": 1.0})
    config.study.update(
        {
            "name": "MASSIVE, four locales, a small teacher",
            "seeds": (0, 1, 2),
            "recipe_learning_rates": (1e-3, 3e-3),
            "recipe_epochs": (5,),
        }
    )
    return base.smoke(config) if argument == "smoke" else config
