"""What `study` does in place of running: its state, what it would take, and its plan as jobs."""

import pathlib
import sys
import time
from collections.abc import Sequence

from kd_jax.study import estimate, job_plan
from kd_jax.study.attempts import FAILED
from kd_jax.study.estimate import Estimate
from kd_jax.study.plan import Stage
from kd_jax.study.run import Study
from kd_jax.study.status import line, status_of
from kd_jax.types import UserError

NOWHERE = pathlib.Path("WORKDIR")
SECONDS_BETWEEN_LOOKS = 5.0
_SWITCHES = ("--plan", "--dry-run", "--status", "--stage")


def place(workdir: pathlib.Path | None) -> pathlib.Path:
    """The workdir that --status and --plan need."""
    if workdir is None:
        raise UserError("--workdir is missing; name the directory of the study")
    return workdir


def arguments(argv: Sequence[str] | None = None) -> list[str]:
    """This command line as one that another process can add to: without the program's path and these switches."""
    given = list(sys.argv[1:] if argv is None else argv)
    kept = [word for word in given if word.split("=")[0] not in _SWITCHES]
    if not any(word.split("=")[0] in ("--workdir", "-workdir") for word in kept):
        kept.append(f"--workdir={NOWHERE}")
    return ["python", "-m", "kd_jax.main.study", *kept]


def show_status(study: Study) -> None:
    """Prints the state in one line; on a terminal again and again, until the study is finished or Ctrl-C."""
    if not sys.stdout.isatty():
        print(line(status_of(study)))
        return
    try:
        while True:
            status = status_of(study)
            print(f"\r\033[K{line(status)}", end="", flush=True)
            over = status.finished or (not status.running and sum(one[FAILED] for one in status.counts.values()))
            if over:
                break
            time.sleep(SECONDS_BETWEEN_LOOKS)
    except KeyboardInterrupt:
        pass
    print()


def stage_estimates(study: Study) -> tuple[dict[str, Estimate], estimate.Sizes]:
    """The estimate of each stage by its folder, and what was taken the data to be."""
    stages = {one.stage.folder: one.stage for one in job_plan.planned(study) if one.stage}
    sizes = estimate.sizes_of(study.config, study.folder(study.planner.prepare()))
    return estimate.estimates(study.config, stages, sizes), sizes


def make_plan(study: Study) -> None:
    """Writes the plan and says what is in it."""
    found, _ = stage_estimates(study)

    def resources(stage: Stage) -> dict:
        return found[stage.folder].describe()

    values = job_plan.plan(study, arguments(), resources)
    file = job_plan.write_plan(study.workdir, values)
    done = sum(one["done"] for one in values["stages"])
    print(f"{file}: {len(values['stages'])} stages, {done} of them done; those left as {len(values['arrays'])} arrays:")
    for one in values["arrays"]:
        after = f", after {', '.join(one['needs'])}" if one["needs"] else ""
        print(f"  {one['name']}: {len(one['stages'])}{after}")
    if not values["recipes_chosen"]:
        print("Stages after the search for recipes have their names as keys; each chooses its recipe when it starts.")


def show_dry_run(study: Study) -> None:
    """Prints every stage with what it takes, the totals, and the commands that run the stages one by one."""
    found, sizes = stage_estimates(study)
    stages = job_plan.planned(study)
    rows = [("stage", "command", "tokens", "FLOPs", "memory", "of which")]
    totals: dict[str, tuple[int, float, float]] = dict.fromkeys(job_plan.PHASES, (0, 0.0, 0.0))
    for one in stages:
        if one.stage is None:
            continue
        taken = found[one.stage.folder]
        mark = " (done)" if job_plan.is_done(study, one) else ""
        parts = ", ".join(f"{name} {amount(value, BYTES)}" for name, value in taken.memory.items())
        cells = (amount(taken.tokens), amount(taken.flops), amount(taken.bytes, BYTES) if taken.memory else "")
        rows.append((f"{one.name}{mark}", one.command, *cells, parts))
        count, tokens, flops = totals[one.phase]
        totals[one.phase] = (count + 1, tokens + taken.tokens, flops + taken.flops)
    print(
        f"{study.config.study.name}: {len(rows) - 1} stages and the report. Nothing is run; all numbers are estimates."
    )
    print("\n".join([*estimate.assumptions(sizes), ""]))
    print(table(rows))
    print()
    largest = max(found.values(), key=lambda one: one.bytes)
    summary = [("phase", "stages", "tokens", "FLOPs")]
    summary += [(name, str(one[0]), amount(one[1]), amount(one[2])) for name, one in totals.items() if one[0]]
    whole = [sum(one[column] for one in totals.values()) for column in range(3)]
    summary.append(("all", str(round(whole[0])), amount(whole[1]), amount(whole[2])))
    print(table(summary))
    print(f"\nThe largest stage takes {amount(largest.bytes, BYTES)} on one device.")
    for remark in estimate.remarks(study.config, sizes):
        print(remark)
    given = arguments()
    print(f"\nAll of it:\n  {job_plan.whole_command(given)}")
    print("Stage by stage, each when those it needs are finished:")
    for one in stages:
        print(f"  {job_plan.command_line(given, one.key)}")


UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
BYTES = ((2.0**40, " TiB"), (2.0**30, " GiB"), (2.0**20, " MiB"), (2.0**10, " KiB"))


def amount(number: float, units: Sequence[tuple[float, str]] = UNITS) -> str:
    """12,300 as 12.3k, or in other units; nothing as an empty cell."""
    for size, letter in units:
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}" if number else ""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as columns of equal width, the last one as wide as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths)), row[-1]]).rstrip() for row in rows
    )
