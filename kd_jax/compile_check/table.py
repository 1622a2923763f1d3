"""The table of docs/scaling.md from what compile_check left: python -m kd_jax.compile_check.table DIR..."""

import json
import pathlib
import sys
from typing import Any

RESULT = "compile_check.json"
HEAD = (
    "| run | mesh | largest batch | GiB a device | sends a step, GB | bound by | tokens/s at best | device-hours |\n"
    "|---|---|---|---:|---|---|---:|---:|"
)


def row(name: str, values: dict[str, Any]) -> str:
    """One line of the table: of the largest batch that fits; hours are those for 100 billion tokens."""
    fitting = [one for one in values["measurements"] if one["fits"]]
    mesh = " × ".join(str(size) for size in values["mesh"].values())
    if not fitting:
        return f"| {name} | {mesh} | none of those tried | | | | | |"
    best = max(fitting, key=lambda one: one["rows"])
    roof, devices = best["roofline"], values["devices"]
    tokens = best["rows"] * values["length"] / roof["step"]
    sent: dict[str, float] = {}
    for one in best["collectives"]:
        sent[one["kind"]] = sent.get(one["kind"], 0.0) + one["sent"] / 1e9
    moved = (
        ", ".join(f"{kind} {amount:.1f}" for kind, amount in sorted(sent.items()) if amount >= 0.05) or "less than 0.1"
    )
    beyond = f", not {values['too_many']:,}" if values["too_many"] else ", more untried"
    share = roof["compute"] / roof["step"]
    return (
        f"| {name} | {mesh} | {best['rows']:,}{beyond} | {best['total'] / 2**30:.1f} of {values['usable'] / 2**30:.1f} "
        f"| {moved} | {roof['bound']} ({share:.0%} of peak) | {tokens:,.0f} | {1e11 / tokens / 3600 * devices:,.0f} |"
    )


def table(folders: list[pathlib.Path]) -> str:
    """The whole table, a line for each folder, named after it."""
    rows = [row(folder.name, json.loads((folder / RESULT).read_text(encoding="utf-8"))) for folder in folders]
    return "\n".join([HEAD, *rows])


if __name__ == "__main__":
    print(table([pathlib.Path(name) for name in sys.argv[1:]]))
