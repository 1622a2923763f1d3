"""Measures speed and memory of variants in alternation, and reports nothing unless their losses agree.

python -m benchmarks --config=configs/benchmark.py --workdir=DIR [--config.benchmark.sections="('step',)"]
"""

import functools
import pathlib
import time

from matplotlib import rc_context
from ml_collections import ConfigDict

from benchmarks.figure import draw_finetune, draw_scaling, draw_step
from benchmarks.machine import describe
from benchmarks.sections import measure_finetune, measure_scaling, measure_step
from benchmarks.tables import tables
from kd_jax.config import require, to_dict
from kd_jax.config.data import read_prepare
from kd_jax.data.prepared import Prepared, prepare
from kd_jax.main import command
from kd_jax.runtime.files import write_json
from kd_jax.runtime.progress import counted
from kd_jax.study.report.plotting import STYLE, panel_grid, write_figure
from kd_jax.trainer.run_directory import RunDirectory, mark_done, provenance

# Section -> (what measures it, what draws it, rows and columns of panels, height in inches).
SECTIONS = {
    "step": (measure_step, draw_step, (2, 2), 8.0),
    "finetune": (measure_finetune, draw_finetune, (1, 2), 2.4),
    "scaling": (measure_scaling, draw_scaling, (3, 2), 8.0),
}


def check(config: ConfigDict) -> None:
    """Refuses impossible settings before anything is read."""
    block = config.benchmark
    for name in block.sections:
        require(name in SECTIONS, "benchmark.sections", f"{name!r} is unknown", f"choose from {', '.join(SECTIONS)}")
    for name in ("batches", "rounds", "check_steps", "gemm_size", "gemm_steps"):
        require(block[name] >= 1, f"benchmark.{name}", f"{block[name]} is too few", "give at least 1")
    known = block.check_steps <= block.batches
    require(known, "benchmark.check_steps", f"{block.check_steps} exceeds benchmark.batches", "lower it")
    for name, share in block.texts.items():
        require(0 <= share <= 1, f"benchmark.texts.{name}", f"{share} is outside 0 to 1", "give the share of task text")
    require(len(block.texts) > 0, "benchmark.texts", "it is empty", "name at least one text")


def run(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Measures the sections that are not measured yet; each leaves NAME.json, NAME.png and NAME.svg."""
    check(config)
    values = to_dict(config)
    del values["benchmark"]["sections"]  # the same workdir may be given for one section after the other
    RunDirectory(workdir, "benchmark", values)  # refuses a workdir that another config has used
    watch = functools.partial(counted, unit="texts", shown=config.progress)
    prepare(read_prepare(config), to_dict(config), workdir / "prepared", watch)
    prepared = Prepared(workdir / "prepared")
    for name in config.benchmark.sections:
        measure, draw, panels, height = SECTIONS[name]
        file = workdir / f"{name}.json"
        if file.exists():
            print(f"{name}: is measured already in {file}; choose another --workdir to measure it again")
            continue
        start = time.monotonic()
        result = measure(config, prepared, workdir / "work" / name, functools.partial(print, flush=True))
        about = {**provenance(), "machine": describe(config.benchmark.threads), "seconds": time.monotonic() - start}
        result = {"about": about, **result}
        write_json(file, result)
        with rc_context(STYLE):
            figure, axes = panel_grid(*panels, height)
            draw(axes, result)
            write_figure(figure, workdir, name)
        print(f"\n{tables(result)}\n")
    mark_done(workdir)


if __name__ == "__main__":
    command.main(run, description="Measures speed and memory.")
