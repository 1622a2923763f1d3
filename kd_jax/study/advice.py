"""The advice in words: one screen for a terminal, and Markdown; both from the values of advice.json."""

import textwrap
from collections.abc import Mapping
from typing import Any

from kd_jax.study.advise import BETTER, ENOUGH
from kd_jax.study.report.wording import plural, sentence, signed
from kd_jax.study.timing import duration
from kd_jax.text_tables import aligned_table, markdown_table

WIDTH = 100
HEADER = ("transfer set", "steps", "seeds", "error", "against it", "90 % interval", "P(best)")


def terminal(values: Mapping[str, Any]) -> str:
    """The advice on one screen."""
    said = [textwrap.fill(line, WIDTH) for line in sentences(values)]
    first, *rest = said
    return "\n\n".join([first, aligned_table(HEADER, _rows(values), rule=True, width=WIDTH), *rest])


def markdown(values: Mapping[str, Any]) -> str:
    """The advice as a file, which begins with what to do."""
    (do, *more), data = sentences(values), values["data"]
    tasks = list(values["sets"][0]["tasks"])
    by_task = [[row["set"], *(f"{row['tasks'][task]:.2f}" for task in tasks)] for row in values["sets"]]
    domains = [
        [one["domain"], f"{one['tokens']:,}", *(_number(one[name]) for name in ("jsd", "jsd_matched", "overlap"))]
        for one in data["domains"]
    ]
    jsd, overlap = _number(data["jsd"]), _number(data["overlap"])
    sizes = "; ".join(
        f"{kind} text: {data['texts'][kind]:,} texts, {data['tokens'][kind]:,} tokens" for kind in data["texts"]
    )
    parts = [
        do,
        markdown_table([one.replace("against it", "against the chosen") for one in HEADER], _rows(values)),
        "Errors are means over tasks and seeds on dev, in points, after the steps given. Differences are those after "
        "all steps, as the model of docs/advisor.md expects them.",
        *more,
        "## Errors by task, in points",
        markdown_table(("transfer set", *tasks), by_task),
        "## The text",
        f"{sentence(sizes)}. Jensen-Shannon divergence of the two {jsd} bits, overlap of frequent tokens {overlap}. "
        "Similarity does not enter the advice.",
        markdown_table(("domain", "tokens", "divergence from generic text", "at equal sizes", "overlap"), domains),
    ]
    return "\n\n".join(parts) + "\n"


def sentences(values: Mapping[str, Any]) -> list[str]:
    """What to do; adapting; amount of task text; cost; what next."""
    return [_do(values), _adapting(values), _task_text(values), _cost(values), f"Next: {values['command']}"]


def _do(values: Mapping[str, Any]) -> str:
    choice, margin, count = values["choice"], values["margin"], len(values["sets"])
    best, within = chance(choice["best"]), chance(choice["within"])
    none = f"none of the {count} transfer sets is more than {margin:g} points better"
    if choice["verdict"] == BETTER:
        said = f"Distill on {choice['text']}. It is the best of {count} transfer sets with probability {best}"
    elif choice["verdict"] == ENOUGH:
        said = f"Distill on {choice['text']}. With probability {within}, {none}"
    else:
        said = f"Start with {choice['text']}; these pilots cannot tell which transfer set is best. With probability "
        said += f"{best} it is this one, and with {within} {none}"
    return f"{said}; the expected loss against the best is {choice['regret']:.2f} points."


def _adapting(values: Mapping[str, Any]) -> str:
    found = values["adapting"]
    if "why" in found:
        return f"Whether adapting the teacher pays was not tried: {found['why']}."
    head = {BETTER: "pays", ENOUGH: "does not pay"}.get(found["verdict"], "may or may not pay")
    saved, likely = _points(found["gain"], found["low"], found["high"]), chance(found["pays"])
    return (
        f"Adapting the teacher {head}: for {found['set']} it saves {saved}; the probability of more than "
        f"{values['margin']:g} is {likely}."
    )


def _task_text(values: Mapping[str, Any]) -> str:
    found = values["task_text"]
    if "why" in found:
        return f"How much task text is enough was not tried: {found['why']}."
    (some, low, high), texts = (round(one) for one in found["suffices"]), found["texts"]
    few = f"{_texts(some)} or fewer" if some <= texts[0] else f"About {_texts(some)}"
    return (
        f"{few} of the {texts[-1]:,} task texts come within {values['margin']:g} points of all, on {found['of']} "
        f"(90 % interval {low:,} to {high:,}). Twice as many texts would save {_points(*found['doubling'])}."
    )


def _cost(values: Mapping[str, Any]) -> str:
    cost = values["cost"]
    spent = f"{plural(cost['pilots'], 'pilot')} took {duration(60 * cost['minutes'])} of {cost['budget_minutes']:g} min"
    more = ", which ended the search; a larger budget continues from here" if cost["stopped"] else ""
    more += f". Not tried for lack of budget: {', '.join(cost['untried'])}" if cost["untried"] else ""
    return f"Cost: {spent}{more}. The full study takes about {duration(60 * cost['full_minutes'])} more."


def _rows(values: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for row in values["sets"]:
        chosen = row["set"] == values["choice"]["set"]
        change = "" if chosen else signed(row["difference"], 2)
        interval = "" if chosen else f"{signed(row['low'], 2)} to {signed(row['high'], 2)}"
        marks = " (chosen)" if chosen else " (dropped)" if row["dropped"] else ""
        counts = (str(row["steps"]), str(row["seeds"]), f"{row['error']:.2f}")
        rows.append([f"{row['set']}, task text {100 * row['share']:g} %{marks}", *counts, change, interval])
        rows[-1].append(chance(row["best"]))
    return rows


def chance(value: float) -> str:
    """A probability with two digits, never 0 or 1, which a finite number of draws cannot show."""
    return "< 0.01" if value < 0.01 else "> 0.99" if value > 0.99 else f"{value:.2f}"


def _points(value: float, low: float, high: float) -> str:
    return f"{signed(value, 2)} points ({signed(low, 2)} to {signed(high, 2)})"


def _texts(count: int) -> str:
    return f"{float(f'{count:.2g}'):,.0f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
