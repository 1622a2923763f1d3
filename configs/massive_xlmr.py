"""Compares transfer sets on all 51 languages of MASSIVE, with XLM-R base as the teacher and generic text from the hub.

Command:   python -m kd_jax.main.study --config=configs/massive_xlmr.py --workdir=DIR
           Generic text is Wikipedia; configs/massive_xlmr.py:mc4 streams mC4. --dry-run prints what it would take
Hardware:  one GPU of 24 GB or a TPU host (the largest stage takes 14 GiB on one device, less in bfloat16); 20 GB of
           host memory; some 75 GB of disk, nearly all for cached predictions: at most 250 M generic tokens x 15 %
           masked x 1,536 bytes (--config.study.cache=False instead runs the teacher in each step); network for prepare
           and for the import of the teacher (1.1 GB)
Time:      about 2 hours on one H100 or 1.1 on eight TPU v5e, without prepare, which streams some 500,000 articles. Not
           measured: the 1.2e18 FLOPs of --dry-run at 20 % of the chips' bfloat16 peaks (989 and 197 TFLOP/s)
Result:    not run; --dry-run, the smoke run, and the readers on local copies of the same form are tested
"""

from ml_collections import ConfigDict

from configs import massive_mmbert
from kd_jax.config import base

MODEL = "FacebookAI/xlm-roberta-base"


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    text = {"": "wikipedia", "smoke": "embedded"}.get(argument, argument)
    massive_mmbert.set_data(config, text)
    massive_mmbert.set_study(config, f"MASSIVE, 51 languages, XLM-R base, {text}")
    config.tokenizer.update({"kind": "load", "path": MODEL})
    config.study.teacher_import = MODEL
    config.teacher = base.encoder("xlmr_base", vocab_size=0)
    return massive_mmbert.smoke(config) if argument == "smoke" else config
