"""What `study` prints with --status, --dry-run and --plan."""

import pathlib
import shlex
import sys
import time
from collections.abc import Sequence

from kd_jax.study import job_plan
from kd_jax.study.attempts import FAILED
from kd_jax.study.estimate import estimates, product_rate, remarks, sizes_of
from kd_jax.study.plan import PHASES, REPORT
from kd_jax.study.run import Study
from kd_jax.study.status import line, status_of
from kd_jax.study.timing import duration
from kd_jax.text_tables import aligned_table
from kd_jax.types import UserError

NOWHERE = pathlib.Path("WORKDIR")  # stands for the workdir of a dry run without one
_SECONDS_BETWEEN_LOOKS = 5.0


def given(workdir: pathlib.Path | None) -> pathlib.Path:
    """The workdir that --status and --plan need. Raises UserError if it is missing."""
    if workdir is None:
        raise UserError("--workdir is missing; name the directory of the study")
    return workdir


def show_status(study: Study) -> None:
    """Prints the state in one line; on a terminal repeatedly, until nothing runs any more or Ctrl-C."""
    if not sys.stdout.isatty():
        print(line(status_of(study)))
        return
    try:
        while True:
            status = status_of(study)
            print(f"\r\033[K{line(status)}", end="", flush=True)
            if status.finished or (not status.running and sum(one[FAILED] for one in status.counts.values())):
                break
            time.sleep(_SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        pass
    print()


def make_plan(study: Study) -> None:
    """Writes the plan and prints its arrays."""
    found = estimates(study.planned(), study.values, sizes_of(study))
    values = job_plan.plan(study, job_plan.arguments(), lambda stage: found[stage.folder].describe())
    file = job_plan.write_plan(study.workdir, values)
    done = sum(one["done"] for one in values["stages"])
    print(f"{file}: {len(values['stages'])} stages, {done} of them done; the others in {len(values['arrays'])} arrays:")
    for one in values["arrays"]:
        after = f", after {', '.join(one['needs'])}" if one["needs"] else ""
        print(f"  {one['name']}: {len(one['stages'])}{after}")
    if not values["recipes_chosen"]:
        print("Stages after the recipe search have their names as keys; each chooses its recipe when it starts.")


def show_dry_run(study: Study) -> None:
    """Prints every stage with its estimated cost, and the totals."""
    sizes = sizes_of(study)
    stages = study.planned()
    found = estimates(stages, study.values, sizes)
    rows, totals = [], {}
    for stage in stages:
        if stage.command == REPORT:
            continue
        cost = found[stage.folder]
        mark = " (done)" if study.done(stage) else ""
        parts = ", ".join(f"{name} {amount(value, BYTES)}" for name, value in cost.memory.items())
        cells = (amount(cost.tokens), amount(cost.flops), amount(cost.bytes, BYTES) if cost.memory else "")
        rows.append((f"{stage.name}{mark}", stage.command, *cells, parts))
        for phase in (stage.phase, "all"):
            count, tokens, flops = totals.get(phase, (0, 0.0, 0.0))
            totals[phase] = (count + 1, tokens + cost.tokens, flops + cost.flops)
    print(f"{study.settings.name}: {len(rows)} stages and the report. Nothing is run; all numbers are estimates.")
    print("\n".join(sizes.notes) + "\n")
    print(aligned_table(("stage", "command", "tokens", "FLOPs", "memory", "by purpose"), rows, left=6) + "\n")
    summary = [
        (name, str(one[0]), amount(one[1]), amount(one[2])) for name in (*PHASES, "all") if (one := totals.get(name))
    ]
    print(aligned_table(("phase", "stages", "tokens", "FLOPs"), summary, left=4))
    largest = max(cost.bytes for cost in found.values())
    print(f"\nThe largest stage takes {amount(largest, BYTES)} on one device.")
    rate, flops = product_rate(), sum(cost.flops for cost in found.values())
    print(
        f"On this machine's CPU it takes {duration(flops / rate)} or more: {amount(flops)} FLOPs at {amount(rate)} a "
        "second,\nthe rate of large matrix products measured just now; a study's steps are slower. No accelerator "
        "is measured."
    )
    print("\n".join(remarks(study)))
    print(f"\nTo run it:\n  {shlex.join(job_plan.arguments())}")
    print("With --plan in place of --dry-run, DIR/plan.json gets the command of every stage, to run them one by one.")


def flops_of(study: Study) -> dict[str, float]:
    """The FLOPs of each stage by its folder, with the recipes that the study has chosen so far."""
    stages = study.planner.plan(study.chosen)  # not planned(), which all processes must call
    return {folder: one.flops for folder, one in estimates(stages, study.values, sizes_of(study)).items()}


UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BYTES = ((2.0**40, " TiB"), (2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"))


def amount(number: float, units: Sequence[tuple[float, str]] = UNITS) -> str:
    """12,300 as 12.3k, or in other units; zero as an empty cell."""
    for size, letter in units:
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}" if number else ""
