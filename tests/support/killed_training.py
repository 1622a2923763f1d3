"""Kills the toy of toy_training.py again and again: killed_training.py FOLDER PROCESSES TIMES SEED.

Each time the run goes on in a fork of this program, in which JAX is imported but no backend exists yet, and which is
killed at a random moment, every other time as soon as a checkpoint begins to be written. FOLDER/kills.json tells of
each kill what was on the disk, and FOLDER/starts.jsonl what each start read. At the end the run goes on to a step
behind all others, and a run of the same steps that nobody kills notes in FOLDER/reference.json what there is at each.
"""

import dataclasses
import json
import os
import pathlib
import random
import signal
import sys
import time

import jax

from kd_jax.config.execution import Mesh
from kd_jax.main.command import outcome
from kd_jax.runtime import distributed
from kd_jax.runtime.cluster import Place
from kd_jax.trainer.checkpoint import FOLDER
from kd_jax.trainer.mesh import make_mesh, process_share
from kd_jax.trainer.optimizer import make_optimizer
from kd_jax.trainer.state import params_fingerprint
from tests.support.several_processes import free_port
from tests.support.toy_training import batch_at, make_step, toy_job, train

EVERY = 3  # steps between two checkpoints
TEMPORARY = "*orbax-checkpoint-tmp*"


def job(steps: int):
    return toy_job(steps=steps, schedule="constant", warmup_steps=0, log_every=1, checkpoint_every=EVERY)


def goes_on(workdir: pathlib.Path, steps: int, digests: dict[int, str] | None = None, every: int = EVERY) -> None:
    """Trains up to `steps`; digests: takes in what there is after each step."""
    settings = dataclasses.replace(job(steps), checkpoint_every=every)
    number, count = process_share(make_mesh(Mesh(-1, 1, 1)))
    jitted = jax.jit(make_step(make_optimizer(settings)))
    begun = False

    def step(state, frozen, batch):
        nonlocal begun
        if not begun:
            begun = True
            if int(state["step"]) > 0 and digests is None:
                note(
                    workdir / "starts.jsonl",
                    {"step": int(state["step"]), "digest": params_fingerprint(state["params"])},
                )
        state, metrics = jitted(state, frozen, batch)
        if digests is not None:
            digests[int(state["step"])] = params_fingerprint(state["params"])
        return state, metrics

    def batches(at):
        batch = batch_at(at)
        each = len(batch["weights"]) // count
        return {name: values[number * each : (number + 1) * each] for name, values in batch.items()}

    phases = ((0, step, lambda: {"scale": 1.0}),)
    train(workdir, settings, batches=batches, phases=phases)


def note(file: pathlib.Path, values: dict) -> None:
    if jax.process_index() == 0:
        with file.open("a") as opened:
            opened.write(json.dumps(values) + "\n")


def forked(processes: int, output: pathlib.Path, work) -> list[int]:
    """Runs work() in `processes` forks, as the members of a job; returns their numbers."""
    port, found = free_port(), []
    for process in range(processes):
        child = os.fork()
        if child:
            found.append(child)
            continue
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        place = Place(f"localhost:{port}", processes, process) if processes > 1 else None
        code = 1
        try:
            with distributed.joined(place, outcome, 60.0):
                work()
            code = 0
        except BaseException as error:
            print(outcome(error)[1], file=sys.stderr)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return found


def steps_in(checkpoints: pathlib.Path) -> list[int]:
    return sorted(int(one.name) for one in checkpoints.glob("[0-9]*") if one.name.isdigit())


def killed(workdir: pathlib.Path, processes: int, turn: int, chance: random.Random) -> dict:
    """One start and its end by force."""
    checkpoints = workdir / FOLDER
    before = steps_in(checkpoints)
    children = forked(processes, workdir / "output.txt", lambda: goes_on(workdir, 10**6))
    while steps_in(checkpoints)[-1:] == before[-1:]:  # it saves something, so every start gets further
        time.sleep(0.0005)
    if turn % 2:
        time.sleep(chance.random() * 0.3)
    else:
        while list(checkpoints.glob(TEMPORARY)):
            time.sleep(0.0005)
        while not list(checkpoints.glob(TEMPORARY)):
            time.sleep(0.0005)
        time.sleep(chance.random() * 0.02)
    seen = steps_in(checkpoints)[-1]
    victims = children if turn % 4 < 2 else [chance.choice(children)]
    for child in victims:
        os.kill(child, signal.SIGKILL)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    half = [one.name for one in checkpoints.glob(TEMPORARY)]
    return {"seen": seen, "codes": codes, "victims": len(victims), "half written": half}


def main(folder: pathlib.Path, processes: int, times: int, seed: int) -> None:
    chance = random.Random(seed)
    workdir = folder / "run"
    workdir.mkdir()
    kills = [killed(workdir, processes, turn, chance) for turn in range(times)]
    (folder / "kills.json").write_text(json.dumps(kills))
    steps = steps_in(workdir / FOLDER)[-1] + 5

    def reference() -> None:
        digests: dict[int, str] = {}
        (folder / "straight").mkdir(exist_ok=True)
        goes_on(folder / "straight", steps, digests, every=10**6)
        if jax.process_index() == 0:
            (folder / "reference.json").write_text(json.dumps(digests))

    for work in (lambda: goes_on(workdir, steps), reference):
        for child in forked(processes, folder / "output.txt", work):
            if os.waitpid(child, 0)[1]:
                sys.exit((folder / "output.txt").read_text())


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:]))
