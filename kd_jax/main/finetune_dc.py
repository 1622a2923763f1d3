"""Finetunes a domain classifier (which domain is this utterance for?).

python -m kd_jax.main.finetune_dc --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR [--config.finetune.init_from=DIR]
"""

import functools

from kd_jax.jobs import finetune
from kd_jax.main import command

keys = finetune.keys
run = functools.partial(finetune.run, task="dc")

if __name__ == "__main__":
    command.main(run, description="Finetunes a domain classifier (which domain is this utterance for?).")
