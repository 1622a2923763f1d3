"""Measures speed and memory in one run and in alternation, and refuses to report what was not computed alike.

python -m benchmarks --config=configs/benchmark.py --workdir=DIR [--config.benchmark.sections="('step',)"]
"""

import functools
import pathlib
import time
from typing import Any

from matplotlib import rc_context
from ml_collections import ConfigDict

from benchmarks import finetune_section, scaling_section, step_section
from benchmarks.figure import draw_finetune, draw_scaling, draw_step
from benchmarks.machine import describe
from benchmarks.tables import tables
from kd_jax.config import require, to_dict
from kd_jax.data.prepared import Prepared, prepare
from kd_jax.main import command
from kd_jax.runtime.files import write_json
from kd_jax.runtime.progress import counted
from kd_jax.study.report.plotting import STYLE, panel_grid, write_figure
from kd_jax.trainer.run_directory import RunDirectory, provenance

# Section -> (what measures it, what draws it, rows and columns of panels, height in inches).
SECTIONS = {
    "step": (step_section.run, draw_step, (2, 2), 8.0),
    "finetune": (finetune_section.run, draw_finetune, (1, 2), 2.4),
    "scaling": (scaling_section.run, draw_scaling, (3, 2), 8.0),
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
    directory = RunDirectory(workdir, "benchmark", {**to_dict(config), "benchmark": without_sections(config)})
    watch = functools.partial(counted, unit="texts", shown=config.progress)
    prepare(config, workdir / "prepared", watch)
    prepared = Prepared(workdir / "prepared")
    for name in config.benchmark.sections:
        measure, draw, panels, height = SECTIONS[name]
        file = workdir / f"{name}.json"
        if file.exists():
            print(f"{name}: is measured already in {file}; choose another --workdir to measure it again")
            continue
        start = time.monotonic()
        result = measure(config, prepared, workdir / "work" / name, say)
        about = {**provenance(), "machine": describe(config.benchmark.threads), "seconds": time.monotonic() - start}
        result = {"about": about, **result}
        write_json(file, result)
        with rc_context(STYLE):
            figure, axes = panel_grid(*panels, height)
            draw(axes, result)
            write_figure(figure, workdir, name)
        print(f"\n{tables(result)}\n")
    directory.finish()


def without_sections(config: ConfigDict) -> dict[str, Any]:
    """config.benchmark but for the choice of sections, which one run may make again and again."""
    return {name: value for name, value in to_dict(config)["benchmark"].items() if name != "sections"}


def say(line: str) -> None:
    """A line of progress, at once."""
    print(line, flush=True)


if __name__ == "__main__":
    command.main(run, description="Measures speed and memory.")
