"""Writes a teacher's predictions once, so that all students that share the teacher train without it.

python -m kd_jax.main.cache_teacher --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.teacher_checkpoint=DIR
"""

import pathlib

import jax
from ml_collections import ConfigDict

from kd_jax.jobs.cache import SUMMARY, keys, run
from kd_jax.main import command
from kd_jax.runtime.files import read_json

__all__ = ["keys", "run", "run_and_print"]


def run_and_print(config: ConfigDict, workdir: pathlib.Path) -> None:
    """`run`, and then what the cache holds."""
    run(config, workdir)
    if jax.process_index() == 0 and (workdir / SUMMARY).is_file():
        found = read_json(workdir / SUMMARY)
        print(
            f"{found['rows']:,} rows, {found['positions']:,.0f} masked positions, {found['bytes'] / 2**20:.1f} MiB "
            f"({found['bytes_per_position']:.0f} bytes a position), {found['mass_kept']:.1%} of the teacher's mass"
        )
        for one in found["runs"]:
            print(
                f"  task share {one['task_share']:g}, seed {one['seed']}, {one['store']}: {one['rows']:,} rows, "
                f"each mask {one['masks_repeat']:.2f} times"
            )


if __name__ == "__main__":
    command.main(run_and_print, description="Writes a teacher's predictions for its students.")
