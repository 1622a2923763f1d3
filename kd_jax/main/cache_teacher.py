"""Writes a teacher's predictions once, so that all students that share the teacher train without it.

python -m kd_jax.main.cache_teacher --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.teacher_checkpoint=DIR
"""

import dataclasses
import pathlib

import jax
from ml_collections import ConfigDict

from kd_jax.config import require
from kd_jax.config.data import Cache, Masking, Transfer, Vocabulary
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import block, read
from kd_jax.config.training import Distill
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import cache as caches
from kd_jax.jobs.teachers import KEY, check_heads, find_teachers
from kd_jax.main import command
from kd_jax.models.attention_kernels import find_kernel
from kd_jax.runtime.files import read_json_object
from kd_jax.runtime.paths import is_there
from kd_jax.trainer.mesh import make_mesh


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return ("prepared", "seed", "transfer", "masking", "vocabulary", KEY, "cache", "compute_dtype")


def resolve(config: ConfigDict) -> ConfigDict:
    """The config with what config.cache takes from config.distill filled in."""
    cache = read(Cache, config.cache, "cache")
    if cache.steps and cache.batch_size and cache.temperature:
        return config
    distill = read(Distill, config.distill, "distill")
    caches.check_temperature(cache, distill)
    config = config.copy_and_resolve_references()
    filled = dataclasses.replace(
        cache,
        steps=cache.steps or distill.steps,
        batch_size=cache.batch_size or distill.batch_size,
        temperature=cache.temperature or distill.kl.temperature,
    )
    config.cache = block(Cache, **vars(filled))
    return config


def work(config: ConfigDict, workdir: pathlib.Path) -> command.Work:
    """Writes the parts that are missing, and DONE when every part is there."""
    del workdir
    execution = read_execution(config)
    vocabulary, cache = read(Vocabulary, config.vocabulary, "vocabulary"), read(Cache, config.cache, "cache")
    prepared = seen_by_student(Prepared(config.prepared), vocabulary)
    caches.check_tokens(cache, prepared.tokenizer.vocab_size)
    rules, mesh = execution.sharding.teacher, make_mesh(execution.mesh)
    kernel = find_kernel(execution.attention, mesh)
    teachers = find_teachers(config[KEY], prepared, config.compute_dtype, rules, attention=kernel)
    check_heads(teachers, KEY)
    require(len(teachers) == 1, KEY, f"a cache holds one teacher's predictions, not {len(teachers)}", "name one")
    transfer, masking = read(Transfer, config.transfer, "transfer"), read(Masking, config.masking, "masking")
    return lambda directory: caches.write_cache(
        directory,
        cache,
        transfer,
        masking,
        vocabulary,
        config.seed,
        teachers[0],
        prepared,
        mesh,
        execution,
    )


def show(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Prints what the cache holds."""
    del config
    if jax.process_index() == 0 and is_there(workdir / caches.SUMMARY):
        found = read_json_object(workdir / caches.SUMMARY)
        print(
            f"{found['rows']:,} rows, {found['positions']:,.0f} masked positions, {found['bytes'] / 2**20:.1f} MiB "
            f"({found['bytes_per_position']:.0f} bytes per position), {found['mass_kept']:.1%} of the teacher's mass"
        )
        for one in found["runs"]:
            print(
                f"  task share {one['task_share']:g}, seed {one['seed']}, {one['store']}: {one['rows']:,} rows, "
                f"each mask {one['masks_repeat']:.2f} times"
            )


COMMAND = command.Command(
    "cache_teacher", "Writes a teacher's predictions for its students.", keys, work, resolve=resolve, show=show
)
run = COMMAND.run

if __name__ == "__main__":
    COMMAND.main()
