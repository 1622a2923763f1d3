"""The smallest study in which every command runs: one distilled student, one by MLM alone, and one from scratch."""

from ml_collections import ConfigDict

from tests.support import pretrained


def get_config() -> ConfigDict:
    config = pretrained.get_config("smoke")
    config.progress = config.tensorboard = False
    config.nlu.update({"max_train": 40, "locales": ("en-US", "de-DE")})
    config.sources.generic.update({"languages": ("en", "de"), "max_texts": 100})
    config.sources.task.update({"languages": ("en-US", "de-DE"), "max_texts": 100})
    config.study.update({"adapted_sets": (), "tasks": ("icner",)})
    config.study.transfer_sets = ConfigDict({"task": 1.0})
    return config
