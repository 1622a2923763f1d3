"""Compares transfer sets on all 51 languages of MASSIVE, with mmBERT base as the teacher and generic text from the hub.

Command:   KD_JAX_MMBERT=FOLDER python -m kd_jax.main.study --config=configs/massive_mmbert.py --workdir=DIR
           FOLDER holds jhu-clsp/mmBERT-base as safetensors. The hub has only a pickle, so convert it once where PyTorch
           is installed: python -c "from transformers import AutoModelForMaskedLM as M, AutoTokenizer as T;
           [one.from_pretrained('jhu-clsp/mmBERT-base').save_pretrained('FOLDER') for one in (M, T)]"
           Generic text is Wikipedia; configs/massive_mmbert.py:mc4 streams mC4. --dry-run prints what it would take
Hardware:  one GPU of 24 GB or a TPU host (the largest stage takes 17 GiB on one device, less in bfloat16); 20 GB of
           host memory; some 75 GB of disk, nearly all for cached predictions: at most 250 M generic tokens x 15 %
           masked x 1,536 bytes (--config.study.cache=False instead runs the teacher in each step); network for prepare
Time:      about 2 hours on one H100 or 1.2 on eight TPU v5e, without prepare, which streams some 500,000 articles. Not
           measured: the 1.3e18 FLOPs of --dry-run at 20 % of the chips' bfloat16 peaks (989 and 197 TFLOP/s)
Result:    not run; --dry-run, the smoke run, and the readers on local copies of the same form are tested
"""

from ml_collections import ConfigDict

from kd_jax.config import base
from kd_jax.types import UserError

# MASSIVE 1.0 (FitzGerald et al., arXiv 2204.08582).
LOCALES = (
    *("af-ZA", "am-ET", "ar-SA", "az-AZ", "bn-BD", "cy-GB", "da-DK", "de-DE", "el-GR", "en-US", "es-ES", "fa-IR"),
    *("fi-FI", "fr-FR", "he-IL", "hi-IN", "hu-HU", "hy-AM", "id-ID", "is-IS", "it-IT", "ja-JP", "jv-ID", "ka-GE"),
    *("km-KH", "kn-IN", "ko-KR", "lv-LV", "ml-IN", "mn-MN", "ms-MY", "my-MM", "nb-NO", "nl-NL", "pl-PL", "pt-PT"),
    *("ro-RO", "ru-RU", "sl-SL", "sq-AL", "sv-SE", "sw-KE", "ta-IN", "te-IN", "th-TH", "tl-PH", "tr-TR", "ur-PK"),
    *("vi-VN", "zh-CN", "zh-TW"),
)
LANGUAGES = tuple(dict.fromkeys(locale.split("-")[0] for locale in LOCALES))
# Data set and configuration on the hub, and the languages whose code differs there.
GENERIC = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.{language}", {"nb": "no"}),
    "mc4": ("allenai/c4", "{language}", {"nb": "no", "tl": "fil", "he": "iw"}),
}
# The hub's automatic export to Parquet, since `datasets` no longer runs a data set's own loading script.
MASSIVE = "AmazonScience/massive@refs/convert/parquet"
EMBEDDED = ("de-DE", "en-US", "es-ES", "fr-FR")


def set_data(config: ConfigDict, text: str) -> None:
    """Sets MASSIVE and generic text from the hub, in all its languages; text is a key of GENERIC, or "embedded"."""
    if text == "embedded":  # for a smoke run, which must not need the network
        config.nlu.update({"format": "embedded", "locales": EMBEDDED})
        for name in ("generic", "generic_nb"):
            config.sources[name] = base.source("generic", "embedded", tuple(one[:2] for one in EMBEDDED))
        config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
        return
    if text not in GENERIC:
        raise UserError(f"--config: the argument {text!r} is unknown; use one of {', '.join(GENERIC)} or smoke")
    config.nlu.update({"format": "huggingface", "name": MASSIVE, "locales": LOCALES})
    name, subset, other_codes = GENERIC[text]
    more = {"name": name, "streaming": True, "max_texts": 10_000, "spoken_share": 0.7}
    usual = tuple(language for language in LANGUAGES if language not in other_codes)
    config.sources.generic = base.source("generic", "huggingface", usual, subset=subset, **more)
    for language, code in other_codes.items():
        config.sources[f"generic_{language}"] = base.source(
            "generic", "huggingface", (language,), subset=subset.replace("{language}", code), **more
        )
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))


def set_study(config: ConfigDict, name: str) -> None:
    """Sets sizes and steps for students of 17 M parameters without embeddings, and the transfer sets to compare."""
    config.rows.length = 128
    config.student = base.encoder("student_17m")
    # Tokens: 33 M for the adapted teacher, 131 M for each student; MASSIVE has some 8 M in its train partition.
    config.adapt.update(
        {"steps": 1000, "batch_size": 256, "accumulation": 4, "learning_rate": 5e-5, "warmup_steps": 100}
    )
    config.distill.update({"steps": 4000, "batch_size": 256, "learning_rate": 1e-3, "warmup_steps": 400})
    config.finetune.update({"batch_size": 256, "warmup_steps": 500, "checkpoint_every": 2000})
    config.study.transfer_sets = ConfigDict({"generic": 0.0, "mix30": 0.3, "mix70": 0.7, "task": 1.0})
    config.study.update(
        {
            "name": name,
            "train_head": False,  # the model has its own
            "seeds": (0, 1, 2),
            "recipe_learning_rates": (3e-4, 1e-3),
            "recipe_epochs": (5,),
        }
    )


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    text = {"": "wikipedia", "smoke": "embedded"}.get(argument, argument)
    set_data(config, text)
    set_study(config, f"MASSIVE, 51 languages, mmBERT base, {text}")
    config.tokenizer.update({"kind": "load", "path": "${KD_JAX_MMBERT}"})
    config.study.teacher_import = "${KD_JAX_MMBERT}"
    config.teacher = base.encoder("mmbert_base", vocab_size=0)
    return smoke(config) if argument == "smoke" else config


def smoke(config: ConfigDict) -> ConfigDict:
    """Two steps per job, with a teacher and a tokenizer of our own, so that no model is downloaded."""
    config.tokenizer.update({"kind": "train", "path": ""})
    config.study.teacher_import = ""
    return base.smoke(config)
