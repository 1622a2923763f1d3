"""The table of docs/scaling.md from results of compile_check: python -m kd_jax.compile_check.table DIR..."""

import json
import pathlib
import sys
from collections import Counter
from typing import Any

RESULT = "compile_check.json"
HEAD = (
    "| run | mesh | largest batch | GiB per device | sent per step, GB | bound by | tokens/s at best | device-hours |\n"
    "|---|---|---|---:|---|---|---:|---:|"
)


def row(name: str, values: dict[str, Any]) -> str:
    """One line of the table, for the largest batch that fits; hours are for 100 billion tokens."""
    fitting = [one for one in values["measurements"] if one["fits"]]
    mesh = " × ".join(str(size) for size in values["mesh"].values())
    if not fitting:
        return f"| {name} | {mesh} | none of those tried | | | | | |"
    best = max(fitting, key=lambda one: one["rows"])
    roof, devices = best["roofline"], values["devices"]
    tokens = best["rows"] * values["length"] / roof["step"]
    sent: Counter[str] = Counter()
    for one in best["collectives"]:
        sent[one["kind"]] += one["sent"] / 1e9
    moved = ", ".join(f"{kind} {amount:.1f}" for kind, amount in sorted(sent.items()) if amount >= 0.05)
    beyond = f", not {values['too_many']:,}" if values["too_many"] else ", more untried"
    share = roof["compute"] / roof["step"]
    memory = f"{best['total'] / 2**30:.1f} of {values['usable'] / 2**30:.1f}"
    cells = [
        *(name, mesh, f"{best['rows']:,}{beyond}", memory, moved or "less than 0.1"),
        *(f"{roof['bound']} ({share:.0%} of peak)", f"{tokens:,.0f}", f"{1e11 / tokens / 3600 * devices:,.0f}"),
    ]
    return f"| {' | '.join(cells)} |"


def table(folders: list[pathlib.Path]) -> str:
    """The table, with a line for each folder, named after it."""
    rows = [row(folder.name, json.loads((folder / RESULT).read_text(encoding="utf-8"))) for folder in folders]
    return "\n".join([HEAD, *rows])


if __name__ == "__main__":
    print(table([pathlib.Path(name) for name in sys.argv[1:]]))
