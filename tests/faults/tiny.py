"""The smallest data and config with which every command runs: a config file, and the text that it reads.

The config's paths are given on the command line:
--config.nlu.path=FOLDER --config.sources.generic.path=FOLDER/{language}.txt
"""

import json
import pathlib
import random

from ml_collections import ConfigDict

from kd_jax.config import base

LANGUAGES = {"en": "en-US", "de": "de-DE"}
_SYLLABLES = ("ka", "lo", "mi", "nu", "re", "sa", "ti", "vo", "we", "zu")


def get_config() -> ConfigDict:
    """Six steps per job, a checkpoint every second step, of which one is kept; early stopping when finetuning."""
    config = base.get_config()
    config.progress = config.tensorboard = False
    config.nlu.update({"format": "massive", "locales": tuple(LANGUAGES.values())})
    config.sources.generic = base.source("generic", "text", tuple(LANGUAGES))
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config = base.smoke(config)
    for name in config.sources:
        config.sources[name].max_texts = 0
    for name in ("teacher", "student"):
        config[name].num_layers = 1
    config.tokenizer.vocab_size = 300
    config.rows.update({"length": 16, "heldout_share": 0.1})
    config.select.update({"share": 0.3, "buckets": 100})
    config.cache.update({"format": "top_k", "k": 8, "steps": 6, "batch_size": 8, "rows_per_part": 16, "batch_rows": 8})
    config.states.update({"rows_per_part": 64, "batch_rows": 32})
    for name in base.JOBS:
        config[name].update({"steps": 6, "checkpoint_every": 2, "evaluate_every": 3})
    config.finetune.update(
        {"epochs": 0, "patience": 2, "evaluate_every": 2, "checkpoint_every": 2, "keep_checkpoints": 1}
    )
    config.study.update({"adapted_sets": (), "tasks": ("dc",), "latency": False})
    config.study.transfer_sets = ConfigDict({"task": 1.0})
    return config


def write_data(folder: pathlib.Path, texts: int = 150, utterances: int = 40, held_out: int = 12, seed: int = 0) -> None:
    """Writes generic text and labeled utterances.

    texts: per language. utterances: per locale in train. held_out: per locale in dev, and in test.
    """
    chance = random.Random(seed)
    folder.mkdir(parents=True)
    for language, locale in LANGUAGES.items():
        lines = [" ".join(_word(chance, language) for _ in range(chance.randint(4, 12))) for _ in range(texts)]
        (folder / f"{language}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        partitions = ["train"] * utterances + ["dev"] * held_out + ["test"] * held_out
        with open(folder / f"{locale}.jsonl", "w", encoding="utf-8") as file:
            for number, partition in enumerate(partitions):
                file.write(json.dumps(_utterance(chance, language, locale, number, partition)) + "\n")


def _word(chance: random.Random, language: str) -> str:
    return language[0] + "".join(chance.choice(_SYLLABLES) for _ in range(chance.randint(1, 3)))


def _utterance(chance: random.Random, language: str, locale: str, number: int, partition: str) -> dict[str, str]:
    domain = ("alarm", "music")[number % 2]
    first, value, last = (_word(chance, language) for _ in range(3))
    return {
        "id": str(number),
        "locale": locale,
        "partition": partition,
        "scenario": domain,
        "intent": f"{domain}_{'set' if number % 3 else 'get'}",
        "utt": f"{first} {domain} {value} {last}",
        "annot_utt": f"{first} {domain} [thing : {value}] {last}",
    }
