"""What `evaluate` measured of a model, for its card."""

import pathlib
from collections.abc import Iterator
from typing import Any

from kd_jax.evaluation.results import RESULTS
from kd_jax.runtime.files import read_json, read_json_lines
from kd_jax.runtime.paths import as_path
from kd_jax.trainer.run_directory import is_done
from kd_jax.types import UserError

KEY = "export.results"


def results_of(workdir: pathlib.Path, named: str) -> tuple[pathlib.Path, list[dict[str, Any]]] | None:
    """(folder, results over all locales and domains) of the run that `named` names or that lies beside `workdir` and
    scored the model that was trained there; None where there is none beside it.

    Raises UserError when the named one is no finished evaluate run of this model.
    """
    if named:
        folder = as_path(named)
        if not is_done(folder) or not (folder / RESULTS).is_file():
            raise UserError(f"config.{KEY}: {named} is no finished evaluate run; give the workdir of one")
        scored = _scored(folder)
        if not _same(scored, workdir):
            raise UserError(
                f"config.{KEY}: {named} scored {scored}, not {workdir}; give the run that scored this model"
            )
        return folder, list(_whole(folder))
    for folder in sorted(workdir.absolute().parent.iterdir()):
        if (folder / RESULTS).is_file() and is_done(folder) and _same(_scored(folder), workdir):
            return folder, list(_whole(folder))
    return None


def _scored(folder: pathlib.Path) -> str:
    config = read_json(folder / "config.json")["config"]
    return config["evaluate"]["checkpoint"] if "evaluate" in config else ""


def _same(scored: str, workdir: pathlib.Path) -> bool:
    return bool(scored) and as_path(scored).resolve() == workdir.resolve()


def _whole(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    for row in read_json_lines(folder / RESULTS):
        if row["scope"] == "all" and row["value"] is not None:
            yield row


def results_table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a row for each metric and a column for each test set, the whole partition first."""
    sets = list(
        dict.fromkeys(row["test_set"] for row in sorted(rows, key=lambda row: row["test_set"] not in ("test", "dev")))
    )
    values = {(row["metric"], row["test_set"]): f"{row['value']:.4f}" for row in rows}
    lines = [f"| | {' | '.join(sets)} |", "|---" * (len(sets) + 1) + "|"]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells = (values.get((metric, name), "") for name in sets)
        lines.append(f"| {metric.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)
