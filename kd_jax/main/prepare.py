"""Text in, rows out: reads, decontaminates, tokenizes and packs every source once.

python -m kd_jax.main.prepare --config=configs/FILE.py --workdir=DIR
python -m kd_jax.main.prepare --config=configs/FILE.py --check   # looks at all of the data and writes nothing
"""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator

import jax
from ml_collections import ConfigDict

from kd_jax.config import to_dict
from kd_jax.config.data import Transfer, read_prepare
from kd_jax.config.settings import read
from kd_jax.config.training import Finetune
from kd_jax.data.prepared import PARTS, prepare
from kd_jax.data.rows import read_manifest
from kd_jax.data.text.check import check
from kd_jax.main import command
from kd_jax.runtime.lock import owned, tidy
from kd_jax.runtime.preemption import Item, interruptible
from kd_jax.runtime.progress import counted
from kd_jax.trainer.run_directory import mark_done
from kd_jax.types import UserError


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return PARTS


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Writes tokenizer, utterances and row stores under workdir; a finished folder is left as it is."""
    settings = read_prepare(config)

    def watch(texts: Iterable[Item], doing: str) -> Iterator[Item]:
        return counted(interruptible(texts, doing, alone=True), doing, unit="texts", shown=config.progress)

    if jax.process_index() == 0:
        tidy(workdir)
        finished = read_manifest(workdir) is not None  # then it is only read, and may be on a read-only disk
        with contextlib.nullcontext() if finished else owned(workdir):
            prepare(settings, to_dict(config), workdir, watch=watch)
    mark_done(workdir)  # the other processes wait here


def run_check(config: ConfigDict, workdir: pathlib.Path | None) -> None:
    """Prints what the data hold and what is wrong with them; raises UserError at the end if anything is."""
    del workdir  # nothing is written
    transfer = read(Transfer, config.transfer, "transfer")
    findings = check(read_prepare(config), transfer, read(Finetune, config.finetune, "finetune").max_train)
    print("\n".join(findings.lines), flush=True)
    if findings.errors:
        count = f"{findings.errors:,} error{'s'[: findings.errors != 1]}"
        raise UserError(f"the data have {count}, see above; fix them before you run prepare")


if __name__ == "__main__":
    command.main(
        run,
        description="Reads, tokenizes and packs the text of all sources.",
        instead={"check": (run_check, "Looks at all of the data, prints counts and errors, and writes nothing.")},
    )
