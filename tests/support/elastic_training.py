"""The toy of toy_training.py by the processes of a job: elastic_training.py '{"workdir": ...}' [--process=I ...].

Each process notes the rows that it read in rows-<process>.jsonl and how many it wrote of the metrics in
written-<process>.txt, and all stop with an error where "stop_at" says so.
"""

import argparse
import json
import pathlib

import jax

from kd_jax.config.execution import Mesh
from kd_jax.main.command import outcome
from kd_jax.runtime import cluster, distributed
from kd_jax.trainer.mesh import make_mesh, process_share
from kd_jax.trainer.metrics import MetricsWriter
from kd_jax.types import UserError
from tests.support.toy_training import batch_at, toy_job, train

STEPS, SAVED_AT = 30, 10


def job():
    return toy_job(steps=STEPS, log_every=1, checkpoint_every=SAVED_AT)


def goes_on(workdir: pathlib.Path, mesh, stop_at: int | None = None):
    """Trains in `workdir` on a mesh up to the end, or to the step of an error."""
    number, count = process_share(mesh)
    notes = workdir / f"rows-{jax.process_index()}.jsonl"
    workdir.mkdir(exist_ok=True)

    def batches(step):
        if step == stop_at:
            raise UserError(f"step {step}: stopped here")
        batch = batch_at(step)
        each = len(batch["weights"]) // count
        with notes.open("a") as file:
            file.write(json.dumps([step, number * each, (number + 1) * each]) + "\n")
        return {name: values[number * each : (number + 1) * each] for name, values in batch.items()}

    writer = MetricsWriter(workdir, tensorboard=False)
    try:
        return train(workdir, job(), mesh=mesh, batches=batches, writer=writer)
    finally:
        writer.close()
        (workdir / f"written-{jax.process_index()}.txt").write_text(str(writer.rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("options", type=json.loads)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given = parser.parse_args()
    with distributed.joined(cluster.from_flags(given.coordinator, given.processes, given.process), outcome, 120.0):
        mesh = make_mesh(Mesh(**given.options["mesh"]))
        goes_on(pathlib.Path(given.options["workdir"]), mesh, given.options["stop_at"])
