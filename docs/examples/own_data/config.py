"""The config of docs/own-data.md: compares transfer sets on your utterances and text, on two cores within minutes.

Command:   python -m kd_jax.main.study --config=docs/examples/own_data/config.py --workdir=runs/own_study
Hardware:  two CPU cores, 4 GB of memory
Time:      about five minutes
Result:    the report runs/own_study/report.html
"""

from ml_collections import ConfigDict

from kd_jax.config import base

LOCALES = ("en-US", "de-DE")  # of the labeled utterances: nlu/en-US.jsonl, ...
LANGUAGES = ("en", "de")  # of the generic text: texts/en.txt, ...


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.nlu.update({"format": "massive", "path": "runs/own_data/nlu", "locales": LOCALES})
    config.sources.generic = base.source("generic", "text", LANGUAGES, path="runs/own_data/texts/{language}.txt")
    config.sources.generic.spoken_share = 0.7  # utterances have neither capitals nor punctuation
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.tokenizer.vocab_size = 600
    config.rows.update({"length": 32, "heldout_share": 0.05})

    config.teacher = base.encoder("teacher_small", hidden_size=96, num_layers=3, num_heads=3, intermediate_size=192)
    config.student = base.encoder("student_small", hidden_size=48, num_heads=3, intermediate_size=96)
    config.pretrain.update({"steps": 200, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 20})
    config.adapt.update({"steps": 60, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 5})
    config.distill.update({"steps": 60, "batch_size": 32, "learning_rate": 5e-3, "warmup_steps": 10})
    config.finetune.update({"batch_size": 32, "warmup_steps": 10})

    config.study.update(
        {
            "name": "A kitchen assistant",
            "seeds": (0, 1, 2),
            "recipe_learning_rates": (3e-3,),
            "recipe_epochs": (3,),
            # So little generic text teaches the teacher nothing about the task; run the study anyway.
            "require_teacher_better_than_unigram": False,
        }
    )
    return base.smoke(config) if argument == "smoke" else config
