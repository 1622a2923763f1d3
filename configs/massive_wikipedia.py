"""Compares transfer sets on the official MASSIVE release, with Wikipedia from the hub as generic text.

Command:   KD_JAX_MASSIVE=FILE python -m kd_jax.main.study --config=configs/massive_wikipedia.py --workdir=DIR
           FILE is MASSIVE's official tarball (amazon-massive-dataset-1.1.tar.gz, see github.com/alexa/massive) or a
           folder of its <locale>.jsonl files. For mC4 instead of Wikipedia add
           --config.sources.generic.name=allenai/c4 --config.sources.generic.subset={language}
Hardware:  one GPU of 40 GB or a TPU host (the largest stage takes 30 GiB on one device, half in bfloat16); 30 GB of
           host memory; 30 GB of disk; network for prepare
Time:      about 3.4 hours on one H100 or 2.1 on eight TPU v5e, without prepare, which streams 3.5 M articles. Not
           measured: the 1.2e18 FLOPs of --dry-run at 10 % of the chips' bfloat16 peaks (989 and 197 TFLOP/s), since
           the models are narrow
Result:    not run; the readers of the tarball and of a streamed data set are tested on local copies of the same form
"""

from ml_collections import ConfigDict

from kd_jax.config import base

LANGUAGES = ("de", "en", "es", "fr", "hi", "it", "pt")
LOCALES = ("de-DE", "en-US", "es-ES", "fr-FR", "hi-IN", "it-IT", "pt-PT")


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    config.nlu.update({"format": "massive", "path": "${KD_JAX_MASSIVE}", "locales": LOCALES})
    config.sources.generic = base.source(
        "generic",
        "huggingface",
        LANGUAGES,
        name="wikimedia/wikipedia",
        subset="20231101.{language}",
        streaming=True,
        max_texts=500_000,
        spoken_share=0.7,
    )
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.tokenizer.update({"vocab_size": 64_000, "texts_per_store": 100_000})
    config.rows.length = 128
    config.transfer.language_temperature = 0.5

    config.teacher = base.encoder("teacher_medium")
    config.student = base.encoder("student_base")
    config.pretrain.update({"steps": 100_000, "batch_size": 1024, "learning_rate": 1e-3, "warmup_steps": 5000})
    config.adapt.update({"steps": 2000, "batch_size": 1024, "learning_rate": 3e-4, "warmup_steps": 200})
    # 131 M tokens: 125 times the task text of seven locales.
    config.distill.update({"steps": 2000, "batch_size": 512, "learning_rate": 1e-3, "warmup_steps": 200})
    config.finetune.update({"batch_size": 128, "warmup_steps": 300})

    config.study.transfer_sets = ConfigDict({"generic": 0.0, "mix30": 0.3, "mix70": 0.7, "task": 1.0})
    config.study.update(
        {
            "name": "MASSIVE, seven locales, Wikipedia as generic text",
            "cache": False,  # the teacher is small, and its predictions for a billion generic tokens would take 150 GB
            "seeds": (0, 1, 2, 3, 4),
            "recipe_learning_rates": (1e-4, 3e-4, 1e-3),
            "recipe_epochs": (10, 25),
        }
    )
    if argument != "smoke":
        return config
    # A smoke run must not need the network, so it uses the embedded data.
    config.nlu.update({"format": "embedded", "path": "", "locales": LOCALES[:4]})
    config.sources.generic = base.source("generic", "embedded", LANGUAGES[:4])
    return base.smoke(config)
