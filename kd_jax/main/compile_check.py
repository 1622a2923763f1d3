"""Compiles the real train step for a machine that is not here: does it fit, what does it communicate, how fast at best?

python -m kd_jax.main.compile_check --config=configs/FILE.py --topology=v5e:4x4 [--workdir=DIR]
"""

import pathlib
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from kd_jax.compile_check import topology as topologies
from kd_jax.compile_check.measurement import Measurement, lines_of, measure
from kd_jax.compile_check.search import largest_batch
from kd_jax.config import require
from kd_jax.jobs.abstract_job import abstract_job
from kd_jax.main import command
from kd_jax.runtime.files import write_json
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError

RESULT = "compile_check.json"


def check(config: ConfigDict, name: str) -> tuple[list[str], dict[str, Any]]:
    """(the report, the same as JSON values) of config.compile_check.command on the topology of that name."""
    kind, _ = topologies.parse(name)
    config = config.copy_and_resolve_references()
    if config.compute_dtype == "auto":  # what it would be there, not here
        config.compute_dtype = "float32" if kind == "cpu" else "bfloat16"
    tries = config.compile_check.tries
    require(tries >= 0, "compile_check.tries", f"{tries} is negative", "give the compilations to spend on the search")
    found = topologies.find_topology(name, max(config.mesh.slices, 1))
    mesh = make_mesh(config.mesh, found.devices)
    job = abstract_job(config, mesh)
    devices = len(found.devices)
    slice_size = min(found.chip.node or devices // max(config.mesh.slices, 1), devices)
    rows = config.compile_check.rows or job.settings.batch_size
    fits = rows % job.multiple == 0
    wanted = f"data x fsdp x accumulation = {job.multiple}"
    require(fits, "compile_check.rows", f"{rows} rows are no multiple of {wanted}", "change it, or the mesh")

    def measured(rows: int) -> Measurement:
        one = measure(job.lower(rows), rows, job.flops(rows), found, slice_size)
        print(f"  {rows} rows: {'fit' if one.fits else 'do not fit'} ({one.seconds:.0f} s)", flush=True)
        return one

    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    head = f"{config.compile_check.command} on {name}: mesh {shape}, accumulation {job.settings.accumulation}"
    print("\n".join([head, *job.tables]), flush=True)
    every = [measured(rows)]
    if tries:
        every = largest_batch(every[0], job.multiple, found.chip.usable, measured, tries)
    price = float(config.compile_check.price)
    lines: list[str] = []
    largest = max((one for one in every if one.fits), key=lambda one: one.rows, default=None)
    for one in every:
        if one.rows == rows or one is largest:
            lines += ["", *lines_of(one, found, job.length, price)]
    too_many = min((one.rows for one in every if not one.fits), default=None)
    if largest is None:
        lines += ["", f"no batch that was tried fits; the smallest had {every[0].rows} rows"]
    else:
        beyond = f", and {too_many} do not" if too_many else ""
        lines += ["", f"largest batch without more accumulation: {largest.rows} rows fit{beyond}"]
    values = {
        "command": config.compile_check.command,
        "topology": name,
        "devices": devices,
        "mesh": dict(mesh.shape),
        "accumulation": job.settings.accumulation,
        "length": job.length,
        "usable": found.chip.usable,
        "measurements": [one.to_json() for one in every],
        "largest": largest.rows if largest else 0,
        "too_many": too_many,
    }
    return lines, values


def run(config: ConfigDict, workdir: pathlib.Path | None) -> None:
    """Prints the report, and writes it to the directory if there is one."""
    name = flags.FLAGS.topology
    if not name:
        raise UserError(f"--topology is missing; name one of the form {topologies.FORMS}")
    lines, values = check(config, name)
    print("\n".join(lines))
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / RESULT, values)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is executed, so nothing else is looked for
    flags.DEFINE_string("topology", None, f"Devices to compile for: {topologies.FORMS}.")
    command.main(run, description="Compiles the train step for a machine that is not here.", needs_workdir=False)
