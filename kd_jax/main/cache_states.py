"""Writes a teacher's states of unmasked text once, so that all students that share the teacher train without it.

python -m kd_jax.main.cache_states --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.teacher_checkpoint=DIR
"""

import pathlib

import jax
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.data import States
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.data.prepared import Prepared
from kd_jax.jobs import states
from kd_jax.jobs.cache import SUMMARY
from kd_jax.jobs.teachers import KEY
from kd_jax.main import command
from kd_jax.models.attention_kernels import find_kernel
from kd_jax.runtime.files import read_json_object
from kd_jax.runtime.paths import is_there
from kd_jax.trainer.mesh import make_mesh


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return ("prepared", KEY, "states", "compute_dtype")


def work(config: ConfigDict, workdir: pathlib.Path) -> command.Work:
    """Writes the missing parts, and DONE once every part exists."""
    execution, settings = read_execution(config), read(States, config.states, "states")
    rules, mesh = execution.sharding.teacher, make_mesh(execution.mesh)
    prepared, kernel = Prepared(config.prepared), find_kernel(execution.attention, mesh)
    teacher, seen = states.find_teacher(config[KEY], prepared, settings, config.compute_dtype, rules, kernel)
    width = teacher.model.config.hidden_size
    problem = f"{settings.components} of states that are {width} wide"
    require(settings.components <= width, "states.components", problem, f"give 0 to {width}")
    states.kept_layers(settings, teacher.model.config)
    states.stores_of(settings, prepared)
    states.check_part(settings, execution, workdir)
    return lambda directory: states.write_states(directory, settings, teacher, prepared, seen, mesh, execution)


def show(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints what the cache holds."""
    del config
    if jax.process_index() == 0 and is_there(workdir / SUMMARY):
        found = read_json_object(workdir / SUMMARY)
        kept = "".join(f", {share:.1%} of the variance of {name}" for name, share in found["explained"].items())
        print(
            f"{found['rows']:,} rows, {found['tokens']:,} tokens, {found['texts']:,} texts, "
            f"{found['bytes'] / 2**20:.1f} MiB ({found['bytes_per_token']:.0f} bytes per token){kept}"
        )


COMMAND = command.Command(
    "cache_states", "Writes a teacher's states of unmasked text for its students.", keys, work, show=show
)
run = COMMAND.run

if __name__ == "__main__":
    COMMAND.main()
