"""Compiles the real train step without the hardware: does it fit, what does it communicate, how fast is it at best?

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
from kd_jax.compile_check.table import RESULT
from kd_jax.config import require
from kd_jax.config.commands import CompileCheck
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.jobs.abstract_job import abstract_job
from kd_jax.main import command
from kd_jax.runtime.files import write_json
from kd_jax.trainer.mesh import make_mesh
from kd_jax.types import UserError


def check(config: ConfigDict, name: str) -> tuple[list[str], dict[str, Any]]:
    """(the report, the same as JSON values) of config.compile_check.command on the topology of that name."""
    settings, sizes = read(CompileCheck, config.compile_check, "compile_check"), read_execution(config).mesh
    kind, _ = topologies.parse(name)
    config = config.copy_and_resolve_references()
    if config.compute_dtype == "auto":  # what it means on that hardware, not on this one
        config.compute_dtype = "float32" if kind == "cpu" else "bfloat16"
    slices = max(sizes.slices, 1)
    found = topologies.find_topology(name, slices)
    mesh, devices = make_mesh(sizes, found.devices), len(found.devices)
    job = abstract_job(config, mesh)
    slice_size = min(found.chip.node or devices // slices, devices)
    rows = settings.rows or job.settings.batch_size
    wanted = f"data x fsdp x accumulation = {job.multiple}"
    fits = rows % job.multiple == 0
    require(fits, "compile_check.rows", f"{rows} rows are not a multiple of {wanted}", "change it, or the mesh")

    def measured(rows: int) -> Measurement:
        one = measure(job.lower(rows), rows, job.flops(rows), found, slice_size)
        print(f"  {rows} rows: {'fit' if one.fits else 'do not fit'} ({one.seconds:.0f} s)", flush=True)
        return one

    shape = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    head = f"{settings.command} on {name}: mesh {shape}, accumulation {job.settings.accumulation}"
    print("\n".join([head, *job.tables]), flush=True)
    every = [measured(rows)]
    if settings.tries:
        every = largest_batch(every[0], job.multiple, found.chip.usable, measured, settings.tries)
    largest = max((one for one in every if one.fits), key=lambda one: one.rows, default=None)
    too_many = min((one.rows for one in every if not one.fits), default=None)
    lines: list[str] = []
    for one in every:
        if one.rows == rows or one is largest:
            lines += ["", *lines_of(one, found, job.length, settings.price)]
    if largest is None:
        lines += ["", f"no batch that was tried fits; the smallest had {every[0].rows} rows"]
    else:
        beyond = f", and {too_many} do not" if too_many else ""
        lines += ["", f"largest batch without more accumulation: {largest.rows} rows fit{beyond}"]
    values = {
        "command": settings.command,
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
        raise UserError(f"--topology is missing; use a form like {topologies.FORMS}")
    lines, values = check(config, name)
    print("\n".join(lines))
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / RESULT, values)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing is executed, and looking for other devices takes time
    flags.DEFINE_string("topology", None, f"Devices to compile for: {topologies.FORMS}.")
    command.main(run, description="Compiles the train step without the hardware.", needs_workdir=False)
