"""Markdown tables from the JSON that the benchmark wrote, for docs/performance.md.

python -m benchmarks.tables FILE.json [FILE.json ...]
"""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MIB = 2**20
QUIET = 0.2  # cores that other programs may keep busy


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the first column is text, the others are figures."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, ruler, *rows))


def amount(value: float) -> str:
    """Three figures, thousands with separators."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def spread(values: Mapping[str, float], unit: float = 1.0) -> str:
    """The median and, in brackets, the range of the rounds."""
    low, middle, high = (amount(values[name] / unit) for name in ("min", "median", "max"))
    return middle if low == high else f"{middle} ({low}–{high})"


def step_tables(result: Mapping[str, Any]) -> str:
    """A table for each text, and one of the ratios."""
    parts = [f"Measured GEMM peak: {result['gemm_peak'] / 1e9:.0f} GFLOP/s ({result.get('dtype', 'float32')})."]
    for name, text in result["texts"].items():
        held = text["held"]
        per_step = {key: held[key] / held["batches"] for key in ("texts", "tokens", "masked")}
        parts.append(
            f"**{name}** ({100 * text['task_share']:.0f} % task text): a step has {amount(per_step['texts'])} texts, "
            f"{amount(per_step['tokens'])} real tokens, {amount(per_step['masked'])} masked ones."
        )
        header = ("variant", "rows", "tokens/s", "% of peak", "useful %", "memory, MiB", "compile, s")
        rows = [
            (
                result["labels"][key],
                f"{one['rows']} × {one['length']}",
                spread(one["tokens_per_second"]),
                f"{100 * one['gemm_share']:.0f}",
                f"{100 * one['useful_share']:.0f}",
                amount(one["memory"] / MIB),
                f"{one['compile_seconds']:.1f}",
            )
            for key, one in text["variants"].items()
        ]
        parts.append(markdown(header, rows))
    pairs = list(dict.fromkeys(pair for text in result["texts"].values() for pair in text["ratios"]))
    number = {name: label.split()[0] for name, label in result["labels"].items()}
    rows = []
    for pair in pairs:
        fast, slow = (number[name] for name in pair.split("/"))
        cells = [spread(text["ratios"][pair]) for text in result["texts"].values()]
        rows.append((f"{fast} against {slow}", *cells))
    parts.append("How many times faster, compared round by round:")
    parts.append(markdown(("", *result["texts"]), rows))
    return "\n\n".join(parts)


def finetune_tables(result: Mapping[str, Any]) -> str:
    """A table for each job."""
    parts = []
    for job, found in result["jobs"].items():
        header = (job, "rows", "utterances/s", "packed is faster", "memory, MiB", "compile, s")
        rows = [
            (
                result["labels"][name],
                f"{one['rows']} × {one['length']}",
                spread(one["utterances_per_second"]),
                spread(found["ratios"][f"packed/{name}"]) if f"packed/{name}" in found["ratios"] else "",
                amount(one["memory"] / MIB),
                f"{one['compile_seconds']:.1f}",
            )
            for name, one in found["variants"].items()
        ]
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def scaling_tables(result: Mapping[str, Any]) -> str:
    """A table for each axis; "growth" is against the point before, of time and of FLOPs."""
    parts = []
    for axis, found in result["axes"].items():
        rows, before = [], None
        for point in found["points"]:
            now = (point["seconds_per_step"]["median"], point["flops"])
            growth = ("", "") if before is None else tuple(f"{a / b:.2f}" for a, b in zip(now, before))
            milliseconds = spread(point["seconds_per_step"], 1e-3)
            rate, memory = amount(point["flops_per_second"] / 1e9), amount(point["memory"] / MIB)
            rows.append((f"{point['value']:,}", milliseconds, *growth, rate, memory))
            before = now
        header = (f"{axis} ({found['counts']})", "ms a step", "growth", "of FLOPs", "GFLOP/s", "memory, MiB")
        parts.append(markdown(header, rows))
    return "\n\n".join(parts)


def tables(result: Mapping[str, Any]) -> str:
    """The tables of whichever section the result is of, with a line about the machine."""
    kinds: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "texts": step_tables,
        "jobs": finetune_tables,
        "axes": scaling_tables,
    }
    kind = next(name for name in kinds if name in result)
    about = result["about"]
    line = f"{about['machine']['cpu']}, {about['machine']['threads']} cores a worker, commit {about['commit']}."
    busy = [cores for part in result[kind].values() for cores in part.get("others_busy", ())]
    if busy and max(busy) > QUIET:
        line += f" **Other programs kept up to {max(busy):.1f} cores busy: measure again on a quiet machine.**"
    return f"{line}\n\n{kinds[kind](result)}"


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(tables(json.loads(pathlib.Path(path).read_text(encoding="utf-8"))), end="\n\n")
