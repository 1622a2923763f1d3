"""A complete study on the embedded data with a published teacher, small enough for a laptop.

Command:   bash launch/quickstart.sh
           python -m kd_jax.main.study --config=configs/quickstart.py --workdir=runs/quickstart
Needs:     pip install "kd_jax[demo]"
Hardware:  two CPU cores, 4 GB of memory
Time:      seven minutes
Result:    docs/quickstart.md
"""

from ml_collections import ConfigDict

from kd_jax.config import base

LANGUAGES = ("en", "de", "es", "fr")
LOCALES = ("en-US", "de-DE", "es-ES", "fr-FR")


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.nlu.update({"format": "embedded", "locales": LOCALES, "max_train": 1500})
    config.sources.generic = base.source("generic", "embedded", LANGUAGES, spoken_share=0.7)
    config.sources.generic.max_texts = 1000
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.rows.length = 64

    base.distill_states(config, "embedded", "minilm_l12_h384")  # multilingual-e5-small in 4 bits, from pip
    config.student = base.encoder("student_small")
    config.distill.update({"steps": 150, "batch_size": 16, "warmup_steps": 10})
    # Few labels, as usual, and much unlabeled text; dev is used only for the search.
    config.finetune.update({"batch_size": 32, "warmup_steps": 20, "epochs": 8, "max_train": 150, "max_dev": 100})

    config.study.transfer_sets = ConfigDict({"generic": 0.0, "mix50": 0.5, "task": 1.0})
    config.study.update(
        {
            "name": "Quickstart on the embedded data",
            "mlm_sets": ("task",),
            "mlm_random": False,  # only from the teacher's table, like the distilled students
            "seeds": (0, 1, 2),
            "recipe_epochs": (8,),
            "latency": False,
        }
    )
    return base.smoke(config) if argument == "smoke" else config
