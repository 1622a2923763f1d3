"""How good is the advice? `advise` against simple rules, on cells whose true errors are known from finished studies.

python -m benchmarks.advice --pair PILOTS STUDY [--pair PILOTS STUDY ...] [--by domain] [--output FILE.json]

PILOTS is the workdir of `kd-jax advise` with --config.advise.drop_below=0, which runs the whole grid of pilots; STUDY
that of a finished study of the same text with transfer sets named generic, mix50, ..., task, and other seeds than the
pilots'. Each pair is a condition, such as an amount of task text. A cell is a condition's locale, domain, or domain in
a locale: pilots are scored on its dev utterances, and the truth is its test error. The advisor is replayed on the
recorded pilots, so no cell is trained for. Cells of one condition share students: they are not independent.
"""

import argparse
import itertools
import json
import pathlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from kd_jax.config.commands import Advise
from kd_jax.evaluation.records import read_records
from kd_jax.evaluation.results import RECORDS, RESULTS
from kd_jax.runtime.files import read_json, read_json_lines, write_json
from kd_jax.study.advise import OPEN, Candidate, Outcome, Pilot, believe, decide, outcome, search
from kd_jax.study.report.numbers import HEADLINE
from kd_jax.text_tables import aligned_table
from kd_jax.types import UserError

SCOPES = ("all", "locale", "domain", "locale_domain")
RULES = ("advisor", "single pilot", "always task text", "always half")
Place = tuple[str, str]  # locale, domain


class Cell(NamedTuple):
    """One decision. truth: share of task text -> test error in points; utterances: in its test set; seconds: of each
    pilot; divergence: of its domain's text from generic text, if known.
    """

    name: str
    truth: Mapping[float, float]
    utterances: int
    outcomes: Mapping[Pilot, Outcome]
    seconds: Mapping[Pilot, float]
    full_steps: int
    divergence: float | None


def share_of(transfer_set: str) -> float | None:
    """The share of task text that a transfer set's name says; None for another name."""
    found = re.fullmatch(r"mix([\d.]+)", transfer_set)
    return {"generic": 0.0, "task": 1.0}.get(transfer_set, float(found[1]) / 100 if found else None)


def read_truth(study: pathlib.Path, scope: str) -> dict[Place, tuple[dict[float, float], int]]:
    """(locale, domain) -> errors by share, as means over seeds and tasks, and the number of test utterances."""
    values: dict[tuple, list[float]] = defaultdict(list)
    counts: dict[Place, int] = defaultdict(int)
    for row in read_json_lines(study / RESULTS):
        share, task = share_of(row["transfer_set"]), row["task"]
        ours = (row["student"], row["teacher"], row["test_set"], row["scope"]) == (
            "distilled",
            "generic",
            "test",
            scope,
        )
        if ours and share is not None and task in HEADLINE and row["value"] is not None:
            place = row["locale"], row["domain"]
            if row["metric"] == HEADLINE[task].error:
                values[place, share, task].append(100 * row["value"])
            counts[place] = max(
                counts[place], row["count"] if row["metric"] in ("error_rate", "intent_error_rate") else 0
            )
    found: dict[Place, dict[float, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for (place, share, task), seeds in values.items():
        found[place][share][task] = float(np.mean(seeds))
    means = {
        place: {share: float(np.mean(list(one.values()))) for share, one in at.items()} for place, at in found.items()
    }
    return {place: (errors, counts[place]) for place, errors in means.items()}


def read_cells(pilots: pathlib.Path, study: pathlib.Path, scope: str, least: int) -> list[Cell]:
    """The cells of a condition with at least that many test utterances, on the transfer sets that both have."""
    rows = [
        row for row in read_json_lines(pilots / "pilots.jsonl") if (row["teacher"], row["amount"]) == ("generic", 1)
    ]
    truth = read_truth(study, scope)
    if not rows or not truth:
        raise UserError(f"{pilots if not rows else study}: it has no results to compare; name finished runs")
    advice = read_json(pilots / "advice.json") if (pilots / "advice.json").is_file() else {"data": {"domains": []}}
    divergence = {one["domain"]: one["jsd_matched"] for one in advice["data"]["domains"]}
    known = {row["share"] for row in rows}
    records: dict[Pilot, defaultdict[Place, defaultdict[str, list]]] = {}
    seconds = {}
    for row in rows:
        one = Pilot(Candidate(row["share"]), row["steps"], row["seed"])
        records[one], seconds[one] = defaultdict(lambda: defaultdict(list)), row["seconds"]
        for task, folder in row["scored"].items():
            for record in read_records(pilots / "stages" / folder / RECORDS):
                locale, domain = (record[name] if name in scope else "all" for name in ("locale", "domain"))
                records[one][locale, domain][task].append(record)
    cells = []
    for place, (errors, count) in sorted(truth.items()):
        shared = {share: error for share, error in errors.items() if share in known}
        found = {
            one: outcome(at[place]) for one, at in records.items() if one.candidate.share in shared and place in at
        }
        fine = {one: scored for one, scored in found.items() if scored is not None and len(scored.ids) >= 4}
        if count >= least and len(shared) >= 2 and {one.candidate.share for one in fine} == set(shared):
            name = " ".join((f"{pilots.name}/{study.name}", *(part for part in place if part != "all")))
            cells.append(Cell(name, shared, count, fine, seconds, rows[0]["full_steps"], divergence.get(place[1])))
    return cells


def replayed(cell: Cell, settings: Advise) -> tuple[dict[str, Any], list[Pilot]]:
    """The advisor on a cell's recorded pilots: expected errors, choice, probability, verdict; and which it used."""
    ran: list[Pilot] = []
    pilots = sorted(cell.outcomes)
    seeds = sorted({one.seed for one in pilots})
    steps = sorted({one.steps for one in pilots})
    counts = tuple(len({one.seed for one in pilots if one.steps == level}) for level in steps)
    rungs = tuple(level / cell.full_steps for level in steps)
    grid = replace(settings, shares=tuple(sorted(cell.truth)), steps=rungs, seeds=counts)
    own = replace(grid, amounts=(), adapt=False)

    def run(wanted: Sequence[Pilot]) -> dict[Pilot, Outcome] | None:
        new = [one for one in wanted if one not in ran]
        minutes = sum(cell.seconds[one] for one in (*ran, *new) if one in cell.seconds) / 60
        if not set(wanted) <= cell.outcomes.keys() or (ran and minutes > settings.budget_minutes):
            return None
        ran.extend(new)
        return {one: cell.outcomes[one] for one in wanted}

    evidence = search(own, cell.full_steps, seeds, lambda: False, run)
    belief = believe(evidence.outcomes, cell.full_steps)
    choice, means = decide(own, belief), belief.effects.mean(axis=0).tolist()
    scores = {one.share: mean for one, mean in zip(belief.candidates, means, strict=True)}
    found = {"scores": scores, "chosen": choice.candidate.share, "best": choice.best, "verdict": choice.verdict}
    return found, ran


def single(cell: Cell, seconds: float) -> dict[float, float]:
    """Errors of one pilot of each transfer set, with the most steps whose total cost is at most that many seconds."""
    seed = min(one.seed for one in cell.outcomes)
    levels: dict[int, dict[float, float]] = defaultdict(dict)
    costs: dict[int, float] = defaultdict(float)
    for one, found in cell.outcomes.items():
        if one.seed == seed:
            levels[one.steps][one.candidate.share] = found.error
            costs[one.steps] += cell.seconds[one]
    whole = [steps for steps, errors in levels.items() if errors.keys() == cell.truth.keys()]
    return levels[max((steps for steps in whole if costs[steps] <= seconds), default=min(whole))]


def judged(cell: Cell, settings: Advise) -> dict[str, Any]:
    """The choice of each rule for a cell, and how it compares with the truth."""
    found, ran = replayed(cell, settings)
    cost = sum(cell.seconds[one] for one in ran)
    scores = {
        "advisor": found["scores"],
        "single pilot": single(cell, cost),
        "always task text": {share: -share for share in cell.truth},
        "always half": {share: abs(share - 0.5) for share in cell.truth},
    }
    chosen = {rule: min(one, key=one.__getitem__) for rule, one in scores.items()} | {"advisor": found["chosen"]}
    lowest = min(cell.truth.values())
    loses = 1.0 in cell.truth and cell.truth[1.0] > lowest
    rules = {
        rule: {
            "pairs": ordered(scores[rule], cell.truth),
            "regret": cell.truth[chosen[rule]] - lowest,
            "correlation": correlated(scores[rule], cell.truth),
            "chosen": chosen[rule],
        }
        for rule in RULES
    }
    about = {"cell": cell.name, "utterances": cell.utterances, "truth": dict(cell.truth), "task_loses": loses}
    return {**about, "rules": rules, "best": found["best"], "verdict": found["verdict"], "seconds": cost}


def ordered(scores: Mapping[float, float], truth: Mapping[float, float]) -> list[float]:
    """For each pair whose truth differs: 1 if the scores order it as the truth does, 0.5 if they are equal, else 0."""
    pairs = [(a, b) for a, b in itertools.combinations(sorted(truth), 2) if truth[a] != truth[b]]
    return [0.5 * (1 + float(np.sign((scores[a] - scores[b]) * (truth[a] - truth[b])))) for a, b in pairs]


def correlated(scores: Mapping[float, float], truth: Mapping[float, float]) -> float | None:
    """Spearman's rank correlation; None for two transfer sets or where one side is constant."""
    sides = [[one[share] for share in sorted(truth)] for one in (scores, truth)]
    if len(truth) < 3 or min(np.ptp(side) for side in sides) == 0:
        return None
    return float(stats.spearmanr(*sides).statistic)


def summary(cells: Sequence[Mapping[str, Any]], margin: float) -> dict[str, Any]:
    """The rules over all cells; the advisor against the single pilot with 95 % intervals, by resampling cells; and the
    calibration of its probabilities."""

    def column(rule: str, name: str) -> list[Any]:
        return [one["rules"][rule][name] for one in cells]

    rules = {}
    for rule in RULES:
        pairs = [pair for one in column(rule, "pairs") for pair in one]
        correlations = [one for one in column(rule, "correlation") if one is not None]
        numbers = {"pairs": float(np.mean(pairs)), "regret": float(np.mean(column(rule, "regret")))}
        rules[rule] = {**numbers, "correlation": float(np.mean(correlations)) if correlations else None}
    draws = np.random.default_rng(0).integers(0, len(cells), (2000, len(cells)))
    against = {}
    for name in ("pairs", "regret"):
        ours, theirs = ([np.mean(one) if one != [] else np.nan for one in column(r, name)] for r in RULES[:2])
        change = np.array(ours) - np.array(theirs)
        low, high = np.nanquantile(np.nanmean(change[draws], axis=1), (0.025, 0.975)).tolist()
        against[name] = {"difference": float(np.nanmean(change)), "low": low, "high": high}
    sure = [one for one in cells if one["verdict"] != OPEN]
    lost = [one["rules"]["advisor"]["regret"] for one in cells]
    return {
        "cells": len(cells),
        "pairs": sum(map(len, column("advisor", "pairs"))),
        "task_loses": float(np.mean([one["task_loses"] for one in cells])),
        "rules": rules,
        "advisor_minus_single_pilot": against,
        "claimed_best": float(np.mean([one["best"] for one in cells])),
        "was_best": float(np.mean([one == 0 for one in lost])),
        "sure": len(sure) / len(cells),
        "sure_within_margin": float(np.mean([one["rules"]["advisor"]["regret"] <= margin for one in sure]))
        if sure
        else None,
        "minutes": float(np.mean([one["seconds"] for one in cells])) / 60,
    }


def similarity_adds(cells: Sequence[Cell]) -> dict[str, float] | None:
    """Leave-one-out error, in points, of the gain of task over generic text, predicted from the pilots' gain, without
    and with the domain's divergence from generic text; None if fewer than eight cells have it."""
    rows = []
    for cell in cells:
        if cell.divergence is not None and {0.0, 1.0} <= cell.truth.keys():
            belief = believe(cell.outcomes, cell.full_steps)
            gain = belief.of([Candidate(0.0), Candidate(1.0)]).mean(axis=0) @ np.array([1.0, -1.0])
            rows.append((1.0, float(gain), cell.divergence, cell.truth[0.0] - cell.truth[1.0]))
    if len(rows) < 8:
        return None
    table = np.array(rows)
    found = {"cells": float(len(rows))}
    for name, columns in (("pilots", (0, 1)), ("pilots and similarity", (0, 1, 2)), ("similarity", (0, 2))):
        missed = []
        for left_out in range(len(table)):
            rest = np.delete(table, left_out, axis=0)
            weights = np.linalg.lstsq(rest[:, columns], rest[:, 3], rcond=None)[0]
            missed.append(table[left_out, columns] @ weights - table[left_out, 3])
        found[name] = float(np.sqrt(np.mean(np.square(missed))))
    return found


def text(found: Mapping[str, Any]) -> str:
    """The summary as a table and sentences."""
    rows = [
        (
            rule,
            f"{100 * one['pairs']:.1f} %",
            f"{one['regret']:.2f}",
            "" if (c := one["correlation"]) is None else f"{c:.2f}",
        )
        for rule, one in found["rules"].items()
    ]
    loses = f"task text alone loses in {100 * found['task_loses']:.0f} %"
    lines = [
        f"{found['cells']} decisions, {found['pairs']} pairs; {loses}.",
        aligned_table(("rule", "pairs right", "regret, points", "rank correlation"), rows, rule=True),
    ]
    for name, one in found["advisor_minus_single_pilot"].items():
        ends = f"{one['low']:+.3f} to {one['high']:+.3f}"
        lines.append(f"Advisor minus single pilot, {name}: {one['difference']:+.3f} ({ends}, cells resampled).")
    lines.append(
        f"It says {found['claimed_best']:.2f} on average, and its choice was the best in {found['was_best']:.2f} of "
        f"the cells; it is sure in {found['sure']:.2f} of them. Pilots: {found['minutes']:.1f} min a decision."
    )
    if found.get("similarity"):
        each = ", ".join(f"{name} {value:.2f}" for name, value in found["similarity"].items() if name != "cells")
        lines.append(f"Leave-one-out error of the gain of task text, points, from: {each}.")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pair", nargs=2, action="append", type=pathlib.Path, required=True, metavar=("PILOTS", "STUDY")
    )
    parser.add_argument("--by", choices=SCOPES, default="locale_domain")
    parser.add_argument("--least", type=int, default=50, help="test utterances of a cell")
    parser.add_argument("--minutes", type=float, default=1e9, help="budget of each decision")
    parser.add_argument("--margin", type=float, default=Advise.margin)
    parser.add_argument("--output", type=pathlib.Path)
    given = parser.parse_args(arguments)
    settings = Advise(budget_minutes=given.minutes, margin=given.margin)
    cells = [cell for pilots, study in given.pair for cell in read_cells(pilots, study, given.by, given.least)]
    if not cells:
        parser.error(f"no cell has {given.least} test utterances; lower --least, or choose a coarser --by")
    details = [judged(cell, settings) for cell in cells]
    found = {**summary(details, settings.margin), "similarity": similarity_adds(cells)}
    print(text(found))
    if given.output:
        write_json(given.output, json.loads(json.dumps({**found, "details": details})))


if __name__ == "__main__":
    main()
