"""The config of docs/own-data.md: compares transfer sets on your utterances and text, on two cores within minutes.

Command:   python -m kd_jax.main.study --config=docs/examples/own_data/config.py --workdir=runs/own_study
Needs:     pip install "kd_jax[demo]"
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
    config.rows.update({"length": 32, "heldout_share": 0.05})

    # A published teacher: multilingual-e5-small in 4 bits, from pip. A name on the hub, or a folder, works too.
    base.distill_states(config, "embedded", "minilm_l12_h384")
    config.student = base.encoder("student_small")
    config.distill.update({"steps": 150, "batch_size": 32, "warmup_steps": 10})
    # As if only 20 utterances of each locale had labels; all of them are task text. 0 takes all labels.
    config.finetune.update({"batch_size": 16, "warmup_steps": 5, "max_train": 20})

    config.study.update(
        {
            "name": "A kitchen assistant",
            "seeds": (0, 1, 2),
            "mlm_random": False,
            "recipe_epochs": (30,),
        }
    )
    return base.smoke(config) if argument == "smoke" else config
