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


def get_config(argument: str = "") -> ConfigDict:
    """The study's config; argument is what follows the colon in --config=FILE.py:smoke."""
    config = base.get_config()
    config.nlu.update({"format": "massive", "path": str(DATA / "nlu"), "locales": LOCALES})
    # The two kinds of text that the students' transfer sets mix. Other formats: jsonl, parquet, huggingface, tfds.
    config.sources.generic = base.source("generic", "text", LANGUAGES, path=str(DATA / "texts" / "{language}.txt"))
    config.sources.generic.spoken_share = (
        0.7  # utterances have neither capitals nor punctuation; 0 keeps texts as they are
    )
    # The train partition of config.nlu, in its locales, also where the command line sets those.
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.tokenizer.vocab_size = 4000  # a few hundred for very little text
    config.rows.length = 64  # tokens in a packed row; longer texts are cut into several
    config.rows.heldout_share = 0.05  # of generic text, for the masked-LM loss; 0.02 is enough for a million texts

    # Sizes: tiny, student_small, teacher_small, ... in kd_jax/models/encoder_config.py, with numbers of your own. For a
    # published teacher, set study.teacher_import to its name on the hub (configs/massive_me5.py in the repository).
    config.teacher = base.encoder("teacher_small", hidden_size=160, num_layers=3, num_heads=5, intermediate_size=256)
    config.student = base.encoder("student_small", hidden_size=96, num_heads=3, intermediate_size=144)

    # Steps are what a study costs. These fit some thousand texts and two CPU cores; with more text or an accelerator,
    # take larger models, thousands of steps, and a peak learning rate nearer to 5e-4.
    config.pretrain.update({"steps": 250, "batch_size": 32, "learning_rate": 2e-3, "warmup_steps": 30})
    config.adapt.update({"steps": 60, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 10})
    config.distill.update({"steps": 50, "batch_size": 32, "learning_rate": 3e-3, "warmup_steps": 10})
    config.finetune.update({"batch_size": 32, "warmup_steps": 20})
    config.distill.kl.temperature = 2.0  # softens the teacher's predictions; 1 leaves them as they are
    config.distill.mlm.weight = 1.0  # the masked-LM loss next to the teacher's; 0 leaves it out

    config.study.update(
        {
            "name": "My data",
            # Students to compare, by the share of task text in their transfer set.
            "transfer_sets": ConfigDict({"generic": 0.0, "mix50": 0.5, "task": 1.0}),
            "adapted_sets": ("task",),  # also distilled from a teacher that was first adapted to task text
            "mlm_sets": ("task",),  # also trained without a teacher, as a control
            "seeds": (0, 1, 2),  # more seeds tell smaller differences from chance
            # Finetuning recipes, searched on the dev partition for each student.
            "recipe_learning_rates": (1e-3, 3e-3),
            "recipe_epochs": (4,),  # raise it until labels x epochs / finetune.batch_size is above 100
            # True stops a study whose teacher predicts task text no better than word frequencies do.
            "require_teacher_better_than_unigram": False,
        }
    )
    return base.smoke(config) if argument == "smoke" else config
