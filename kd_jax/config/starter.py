"""Which text should your student be distilled on? A study of your own utterances and texts.

    kd-jax prepare --config=PATH_OF_THIS_FILE --check         checks the data and writes nothing
    kd-jax study --config=PATH_OF_THIS_FILE:smoke --workdir=DIR   two steps of everything: does it run?
    kd-jax study --config=PATH_OF_THIS_FILE --workdir=DIR     the study; the same command resumes it

`kd-jax study ... --dry-run` says beforehand what a study takes. All keys are declared, with their units and defaults,
in kd_jax/config/base.py; this file changes some of them, and --config.KEY=VALUE changes any for one run.
"""

import pathlib

from ml_collections import ConfigDict

from kd_jax.config import base

DATA = pathlib.Path(__file__).resolve().parent  # the folder of this file; change it where your data are elsewhere

# Labeled utterances of your task, one file for each locale: nlu/en-US.jsonl with one JSON object a line,
#   {"id": "7", "locale": "en-US", "partition": "train", "scenario": "shopping", "intent": "shopping_add",
#    "utt": "put oat milk on my list", "annot_utt": "put [item : oat milk] on my list"}
# "partition" is train, dev or test; "scenario" is the domain; "annot_utt" marks the slots.
LOCALES = ("en-US",)

# Generic text, one file for each language of the locales: texts/en.txt with a sentence or paragraph a line.
LANGUAGES = ("en",)

TEACHER = "intfloat/multilingual-e5-small"


def get_config(argument: str = "") -> ConfigDict:
    """The study's config; argument is what follows the colon in --config=FILE.py:smoke."""
    config = base.get_config()
    config.nlu.update({"format": "massive", "path": str(DATA / "nlu"), "locales": LOCALES})
    # The two kinds of text that the students' transfer sets mix. Other formats: jsonl, parquet, huggingface, tfds.
    config.sources.generic = base.source("generic", "text", LANGUAGES, path=str(DATA / "texts" / "{language}.txt"))
    config.sources.generic.spoken_share = 0.7  # utterances have no capitals or punctuation; 0 keeps texts as they are
    # The train partition of config.nlu; the locales follow config.nlu.locales, also on the command line.
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.rows.length = 64  # tokens in a packed row; longer texts are cut into several
    config.rows.heldout_share = 0.05  # of generic text, for the masked-LM loss; 0.02 is enough for a million texts

    # The teacher, a model on the hub or its folder, and its shape (kd_jax/models/encoder_config.py); "embedded" is the
    # same model in 4 bits, from the extra demo. Students learn its states, as docs/distillation.md explains.
    base.distill_states(config, TEACHER, "minilm_l12_h384")
    config.student = base.encoder("student_small")  # 2 layers of 128

    # Steps are what a study costs. These fit some thousand texts and two CPU cores; with more text or an accelerator,
    # take a larger student, thousands of steps, and a peak learning rate of 1e-3.
    config.distill.update({"steps": 300, "batch_size": 32, "warmup_steps": 20})
    config.finetune.update({"batch_size": 32, "warmup_steps": 20})

    config.study.update(
        {
            "name": "My data",
            # Students to compare, by the share of task text in their transfer set.
            "transfer_sets": ConfigDict({"generic": 0.0, "mix50": 0.5, "task": 1.0}),
            "mlm_sets": ("task",),  # also trained without a teacher, as a control
            "seeds": (0, 1, 2),  # more seeds tell smaller differences from chance
            # Finetuning recipes, searched on the dev partition for each student.
            "recipe_learning_rates": (2e-3,),
            "recipe_epochs": (10,),  # raise it until labels x epochs / finetune.batch_size is above 100
        }
    )
    return base.smoke(config) if argument == "smoke" else config
