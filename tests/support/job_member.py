"""A member of a job for the tests of kd_jax/runtime/distributed.py: job_member.py WHAT FOLDER [--process=I ...]."""

import argparse
import itertools
import json
import os
import pathlib
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd_jax.main.command import outcome
from kd_jax.runtime import cluster, distributed
from kd_jax.runtime.preemption import Preempted, Preemption, interruptible
from kd_jax.types import UserError


def exchange(folder: pathlib.Path) -> None:
    me = jax.process_index()
    file = folder / "written.txt"
    with distributed.first_goes_ahead():
        if me == 0:
            file.write_text("by 0")
        seen = file.read_text()
    for _ in range(3):  # the same place again and again
        distributed.barrier()
    found = {
        "first": [distributed.from_first({"from": me, "turn": turn}) for turn in range(2)],
        "all": [value.decode() for value in distributed.from_all((f"{me}" * (me + 1) * 100_000).encode())],
        "seen": seen,
    }
    found["all"] = [[value[0], len(value)] for value in found["all"]]
    print(json.dumps(found))


def compute(steps: float = float("inf")) -> None:
    """Sums over the devices of all processes, one after the other."""
    mesh = Mesh(np.array(jax.devices()), "all")
    ones = jax.device_put(np.ones(len(jax.devices()), np.float32), NamedSharding(mesh, PartitionSpec("all")))
    step = jax.jit(lambda values: values * 0.5 + jnp.sum(values) * 0.1)
    while steps > 0:
        ones = step(ones)
        float(jnp.sum(ones))
        steps -= 1


def member(what: str, folder: pathlib.Path) -> None:
    last = jax.process_index() == jax.process_count() - 1
    if what == "exchange":
        exchange(folder)
    elif what == "mistake" and last:
        raise UserError("config.nothing: is empty; fill it")
    elif what == "mistake in a collective":
        if last:
            raise UserError("config.nothing: is empty; fill it")
        compute()
    elif what == "crash of the first":
        if not last:
            raise ValueError("this cannot be")
        compute()
    elif what == "kill":
        compute(10 if last else float("inf"))
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "kill of the first" and jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "preemption of the first" and jax.process_index() == 0:
        raise Preempted("half of it is saved")
    elif what == "signal to one that waits":
        if jax.process_index() == 0:
            for _ in interruptible(itertools.repeat("text"), "texts", alone=True):
                time.sleep(0.01)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    distributed.barrier()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--timeout", type=float, default=60.0)
    options = parser.parse_args()
    place = cluster.from_flags(options.coordinator, options.processes, options.process)
    with distributed.joined(place, outcome, options.timeout), Preemption():
        member(options.what, options.folder)
