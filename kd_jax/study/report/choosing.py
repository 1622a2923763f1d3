"""The report's section on size and latency: what a user chooses a student by, beside its errors."""

from collections.abc import Mapping, Sequence
from typing import Any

from kd_jax.study.report.document import Section, Table, Text

TITLE = "Size and latency"
NONE = "–"


def choosing_section(latency: Mapping[str, Any] | None) -> Section:
    """What latency.json holds as a table; a sentence where it was not measured."""
    if not latency or not latency["models"]:
        return Section(TITLE, [Text("Size and latency were not measured (config.study.latency).")])
    return Section(TITLE, [latency_table(latency), Text(_how(latency))])


def latency_table(latency: Mapping[str, Any]) -> Table:
    """A row for each encoder of the study; the fastest way to see what a student saves is its last columns."""
    models = latency["models"]
    counts = sorted({batch["utterances"] for one in models for batch in one["batches"]})
    first = models[0]
    rows = []
    for one in models:
        times = {batch["utterances"]: batch for batch in one["batches"]}
        rows.append(
            [
                one["name"],
                f"{one['layers']} × {one['hidden_size']}",
                f"{one['parameters']:,}",
                f"{one['without_embeddings']:,}",
                f"{one['bytes']['float32'] / 1e6:,.2f}",
                f"{one['bytes']['int8'] / 1e6:,.2f}",
                *(_times(times.get(count)) for count in counts),
                *(_gain(first, one, count) for count in counts[-1:]),
            ]
        )
    header = [
        "Encoder",
        "Layers × hidden",
        "Parameters",
        "without embeddings",
        "MB in float32",
        "MB in int8",
        *(f"ms for {utterances(count)}, p50 (p95)" for count in counts),
        *(f"{count} utterances, times as fast as the {first['name']}" for count in counts[-1:]),
    ]
    return Table(header, rows, "What each size of this study takes to store and to run.", 2)


def utterances(count: int) -> str:
    """The number with its noun."""
    return "1 utterance" if count == 1 else f"{count} utterances"


def _times(batch: Mapping[str, Any] | None) -> str:
    return NONE if batch is None else f"{batch['p50_ms']:.2f} ({batch['p95_ms']:.2f})"


def _gain(first: Mapping[str, Any], one: Mapping[str, Any], count: int) -> str:
    """How many times as fast as the first model, by the medians."""
    if one is first:
        return "reference"
    medians = [batch["p50_ms"] for model in (first, one) for batch in model["batches"] if batch["utterances"] == count]
    return f"{medians[0] / medians[1]:.1f}" if len(medians) == 2 else NONE


def _how(latency: Mapping[str, Any]) -> str:
    """How it was measured, in a few sentences."""
    batches: Sequence[Mapping[str, Any]] = next((one["batches"] for one in latency["models"] if one["batches"]), ())
    rows = ", ".join(f"{utterances(batch['utterances'])} in {batch['rows']}" for batch in batches)
    calls = min((batch["calls"] for one in latency["models"] for batch in one["batches"]), default=0)
    task = {"dc": "DC head", "icner": "ICNER heads"}[latency["task"]]
    text = (
        f"Each encoder with the {task}, in {latency['dtype']} on one device ({latency['device']}; the machine has "
        f"{latency['cores']} cores). Times are of one call as `predict` makes it, from rows of {latency['length']} "
        f"tokens ({rows} rows) to classes, without reading and tokenizing; p50 and p95 over {calls} calls or more, the "
        "encoders in turns. Parameters include the token table; bytes in int8 are of the matrices in int8 with their "
        "scales."
    )
    left_out = [one["name"] for one in latency["models"] if not one["batches"]]
    return text + (f" Too large for one device, so not timed: {', '.join(left_out)}." if left_out else "")
