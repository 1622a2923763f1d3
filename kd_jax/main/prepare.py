"""Text in, rows out: reads, decontaminates, tokenizes and packs every source once.

python -m kd_jax.main.prepare --config=configs/FILE.py --workdir=DIR
"""

import pathlib

from ml_collections import ConfigDict

from kd_jax.data.prepared import prepare
from kd_jax.main import command
from kd_jax.trainer.run_directory import mark_done


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return ("nlu", "sources", "tokenizer", "rows", "select")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes tokenizer, utterances and row stores under workdir; a finished folder is left as it is."""
    prepare(config, workdir, progress=config.progress)
    mark_done(workdir)


if __name__ == "__main__":
    command.main(run, description="Reads, tokenizes and packs the text of all sources.")
