"""Which transfer set is best, from small pilots: which to run next, how sure the answer is, and how much text it takes.

A pilot is a student distilled for some steps on one candidate with one seed, finetuned by a fixed recipe, and scored on
the dev partition. Its error is the mean of the tasks' headline errors, in points. One Gaussian model explains it:

    error = level of its steps and seed + effect of its candidate + drift + noise of the pilot + noise of the utterances

All pilots are scored on the same utterances, over which the covariance of their errors is measured, so what is hard for
all of them cancels; so does what pilots of one seed share, such as the order of the labels. Drift is how far a
candidate's effect moves between few steps and all of them, a random walk over halvings of the steps. The standard
deviations of effects (which shrinks them), drift and pilot noise ("luck" in the code) are unknown: the posterior is a
mixture over a grid of them with the priors of `SPREADS`. Everything here is a function of the pilots' records and draws
with a fixed seed.
"""

import csv
import io
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from kd_jax.config.commands import Advise
from kd_jax.evaluation.records import Record
from kd_jax.evaluation.significance import error_counts
from kd_jax.study.report.numbers import HEADLINE

# Log-normal priors of standard deviations, as shares of the mean error: median and spread (a factor). In docs/results,
# seeds of a student differ by 0.5 to 5 % of its error, transfer sets by up to 15 %.
SPREADS = {"luck": (0.02, 2.5), "effect": (0.06, 3.0), "drift": (0.02, 2.5)}
_NODES = 6  # of each grid, two spreads to either side
_DRAWS = 4000
SURE = 0.95  # probability above which the advice states something as a result
INTERVAL = (0.05, 0.95)  # quantiles
MOST_SEEDS = 10  # of a pilot
EXTRA_SEEDS = 3  # for the learning curve and the adapted teacher, if they fit
BETTER, ENOUGH, OPEN = "better", "enough", "open"


class Candidate(NamedTuple):
    """A transfer set: share of task text; teacher, generic or adapted; amount, which share of the task text is used."""

    share: float
    teacher: str = "generic"
    amount: float = 1.0

    @property
    def set_name(self) -> str:
        """Its name as a transfer set of a study."""
        return {0.0: "generic", 1.0: "task"}.get(self.share, f"mix{100 * self.share:g}")

    @property
    def text(self) -> str:
        """What it is distilled on, in words."""
        mixed = f"{100 * self.share:g} % task text, the rest generic"
        return {0.0: "generic text alone", 1.0: "task text alone"}.get(self.share, mixed)

    @property
    def label(self) -> str:
        """Its name, with what differs from a plain transfer set."""
        adapted = ", adapted teacher" if self.teacher == "adapted" else ""
        return self.set_name + adapted + (f", {100 * self.amount:g} % of the task text" if self.amount < 1 else "")


class Pilot(NamedTuple):
    """One short training run; steps: of distillation."""

    candidate: Candidate
    steps: int
    seed: int


class Outcome(NamedTuple):
    """What a pilot scored: errors of each task and their mean, in points; parts [N]: what each utterance adds to the
    mean, so that they sum to 0 (ratios are linearized); ids of the utterances.
    """

    tasks: Mapping[str, float]
    error: float
    parts: np.ndarray
    ids: tuple[str, ...]


def outcome(records: Mapping[str, Sequence[Record]], test_set: str = "dev") -> Outcome | None:
    """The outcome of a pilot from its records by task; None if a task's error is undefined on them."""
    tasks, parts, ids = {}, [], ()
    for task, found in records.items():
        counts = error_counts({None: found}, HEADLINE[task].error, test_set=test_set)
        if counts is None:
            return None
        total, rate = counts.denominator.sum(), counts.rates.item()
        tasks[task] = 100 * rate
        parts.append(100 * (counts.numerator[0] - rate * counts.denominator[0]) / total)
        ids = counts.ids
    return Outcome(tasks, float(np.mean(list(tasks.values()))), np.mean(parts, axis=0), ids)


Outcomes = Mapping[Pilot, Outcome]


class Belief(NamedTuple):
    """Draws [draws, candidates] of the candidates' errors after all steps, up to a constant.

    luck: standard deviation of a pilot's own noise, in points.
    """

    candidates: tuple[Candidate, ...]
    effects: np.ndarray
    luck: float

    def of(self, candidates: Iterable[Candidate]) -> np.ndarray:
        """The draws of some candidates."""
        return self.effects[:, [self.candidates.index(one) for one in candidates]]

    def best(self, candidates: Sequence[Candidate]) -> dict[Candidate, float]:
        """The probability of each that it is the best of them."""
        chances = np.bincount(self.of(candidates).argmin(axis=1), minlength=len(candidates)) / len(self.effects)
        return dict(zip(candidates, chances.tolist(), strict=True))


def believe(outcomes: Outcomes, full_steps: int) -> Belief:
    """The posterior of the candidates' effects. Raises ValueError if pilots answered different utterances."""
    pilots = sorted(outcomes)
    if len({outcomes[one].ids for one in pilots}) != 1:
        raise ValueError("the pilots were scored on different utterances")
    candidates = tuple(sorted({one.candidate for one in pilots}))
    errors = np.array([outcomes[one].error for one in pilots])
    sampling = _sampling([outcomes[one] for one in pilots])
    levels = _members([(one.steps, one.seed) for one in pilots])
    of = _members([one.candidate for one in pilots])
    halvings = np.array([max(math.log2(full_steps / one.steps), 0.0) for one in pilots])
    walk = (of @ of.T) * np.minimum.outer(halvings, halvings)
    scale = max(float(errors.mean()), 1.0)

    nodes = np.linspace(-2, 2, _NODES)
    grid = np.array(list(itertools.product(nodes, repeat=3)))
    luck, effect, drift = (scale * SPREADS[name][0] * SPREADS[name][1] ** grid[:, i] for i, name in enumerate(SPREADS))
    wide = (slice(None), None, None)
    covariance = sampling + luck[wide] ** 2 * np.eye(len(pilots)) + drift[wide] ** 2 * walk
    # The levels have flat priors, so they are projected out, as in restricted maximum likelihood.
    inverse = np.linalg.inv(covariance + effect[wide] ** 2 * (of @ of.T))
    weighed = inverse @ levels
    normal = levels.T @ weighed
    projected = inverse - weighed @ np.linalg.inv(normal) @ np.swapaxes(weighed, 1, 2)
    fit = np.einsum("p,gpq,q->g", errors, projected, errors)
    likelihood = 0.5 * (np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(normal)[1] - fit)
    weights = special.softmax(likelihood - 0.5 * (grid**2).sum(axis=1))

    means = effect[:, None] ** 2 * (of.T @ (projected @ errors)[..., None])[..., 0]
    spreads = effect[wide] ** 2 * np.eye(len(candidates)) - effect[wide] ** 4 * (of.T @ projected @ of)
    rng, draws = np.random.default_rng(0), []
    for node, count in enumerate(rng.multinomial(_DRAWS, weights)):
        if count:
            values, vectors = np.linalg.eigh(spreads[node])
            root = vectors * np.sqrt(np.maximum(values, 0))
            draws.append(means[node] + rng.standard_normal((count, len(candidates))) @ root.T)
    return Belief(candidates, np.concatenate(draws), float(weights @ luck))


def _sampling(outcomes: Sequence[Outcome]) -> np.ndarray:
    """Covariance [P, P] of the errors over utterances, slightly inflated for few of them, as for a t distribution."""
    parts = np.stack([one.parts for one in outcomes])
    return parts @ parts.T * (parts.shape[1] / max(parts.shape[1] - 3, 1))


def _members(values: Sequence[Any]) -> np.ndarray:
    """One-hot membership in the sorted distinct values: float [values, distinct values]."""
    return np.array([[float(value == group) for group in sorted(set(values))] for value in values])


class Choice(NamedTuple):
    """The recommended transfer set. best, within: the probabilities that it is the best, and no more than the margin
    above the best; regret: how far it is expected to be above the best, in points; verdict: BETTER, ENOUGH or OPEN.
    """

    candidate: Candidate
    best: float
    within: float
    regret: float
    verdict: str


def simplest(candidate: Candidate) -> tuple:
    """Sorts transfer sets: one kind of text before two, and task text, which is there anyway, before generic text."""
    return 0 < candidate.share < 1, -candidate.share


def choose(belief: Belief, candidates: Sequence[Candidate], margin: float) -> Choice:
    """The simplest candidate whose expected error is at most the margin above the lowest."""
    effects = belief.of(candidates)
    means, floor = effects.mean(axis=0), effects.min(axis=1)
    near = [one for one, mean in zip(candidates, means, strict=True) if mean <= means.min() + margin]
    picked = min(near, key=simplest)
    above = effects[:, candidates.index(picked)] - floor
    best, within = belief.best(candidates)[picked], float((above <= margin).mean())
    verdict = BETTER if best >= SURE else ENOUGH if within >= SURE else OPEN
    return Choice(picked, best, within, float(above.mean()), verdict)


def survivors(belief: Belief, alive: Sequence[Candidate], drop_below: float) -> list[Candidate]:
    """The better half by the probability of being the best, and all others for which it is at least `drop_below`."""
    chances = belief.best(alive)
    half = _better_half(belief, alive)
    return [one for one in alive if one in half or chances[one] >= drop_below]


def _better_half(belief: Belief, alive: Sequence[Candidate]) -> list[Candidate]:
    chances = belief.best(alive)
    return sorted(alive, key=lambda one: (-chances[one], simplest(one)))[: max(math.ceil(len(alive) / 2), 2)]


# The outcomes of these pilots, run now or before; None, and nothing run, if not all of them fit into the budget.
Run = Callable[[Sequence[Pilot]], Outcomes | None]


class Evidence(NamedTuple):
    """All pilots.

    alive: the transfer sets still compared at the end. of: the one that the learning curve and the adapted teacher
    belong to, if any. stopped: whether the budget ended the search before it was sure.
    """

    outcomes: dict[Pilot, Outcome]
    alive: list[Candidate]
    of: Candidate | None
    stopped: bool


def search(
    settings: Advise, full_steps: int, seeds: Sequence[int], adaptable: Callable[[], bool], run: Run
) -> Evidence:
    """Successive halving over the transfer sets, then the curve and the adapted teacher, then more seeds if unsure.

    seeds: in the order in which they are used. adaptable(): called once there are pilots. The first call of `run` may
    leave out pilots that do not fit; a later rung that does not fit is tried with its better half. The calls depend on
    the outcomes alone, so a resumed search asks for the same pilots.
    """
    tried: dict[Pilot, Outcome] = {}
    alive = sorted((Candidate(share) for share in settings.shares), key=simplest)
    rungs = [(max(round(share * full_steps), 1), count) for share, count in zip(settings.steps, settings.seeds)]
    belief: Belief | None = None

    def go_on(steps: int, count: int) -> bool:
        """Runs a rung; False if it does not fit."""
        nonlocal alive, belief
        while (found := run([Pilot(one, steps, seed) for seed in seeds[:count] for one in alive])) is None:
            fewer = _better_half(belief, alive) if belief else alive
            if len(fewer) == len(alive):
                return False
            alive = fewer
        tried.update(found)
        belief = believe(tried, full_steps)
        alive = survivors(belief, [one for one in alive if one in belief.candidates], settings.drop_below)
        return True

    def sure() -> bool:
        # With drop_below 0 the whole grid is run, to evaluate the advice.
        return belief is not None and settings.drop_below > 0 and decide(settings, belief).verdict != OPEN

    fits = True
    for steps, count in rungs:
        fits = go_on(steps, count)
        if not fits or sure():
            break
    assert belief is not None, "the first rung runs, or raises"
    of, more = decide(settings, belief).candidate, dict[Pilot, Outcome]()
    steps = max(one.steps for one in tried if one.candidate == of)
    extra = [[of._replace(amount=amount) for amount in settings.amounts]] if of.share > 0 and settings.amounts else []
    extra += [[of._replace(teacher="adapted")]] if settings.adapt and adaptable() else []
    for candidates in extra:
        for some in (seeds[:EXTRA_SEEDS], seeds[:1]):
            found = run([Pilot(one, steps, seed) for seed in some for one in (of, *candidates)])
            if found is not None:
                more.update(found)
                break
    steps, count = rungs[-1]
    while fits and settings.drop_below > 0 and not sure() and count < min(MOST_SEEDS, len(seeds)):
        count += 1
        fits = go_on(steps, count)
    return Evidence({**tried, **more}, alive, of if extra else None, not fits and not sure())


def compared(outcomes: Outcomes) -> dict[Pilot, Outcome]:
    """The pilots with all of the task text, which the model covers; less text has its own curve."""
    return {pilot: found for pilot, found in outcomes.items() if pilot.candidate.amount == 1}


def decide(settings: Advise, belief: Belief) -> Choice:
    """The choice among all transfer sets that have pilots."""
    return choose(belief, [one for one in belief.candidates if one.teacher == "generic"], settings.margin)


class Curve(NamedTuple):
    """The effect of the amount of task text; suffices and doubling are (median, low, high).

    suffices: number of texts that brings the error within the margin of that with all texts; at least the smallest
    amount that was tried. doubling: points that twice as many texts would save.
    """

    texts: tuple[int, ...]
    errors: tuple[float, ...]
    suffices: tuple[float, float, float]
    doubling: tuple[float, float, float]


def learning_curve(outcomes: Outcomes, texts: Mapping[float, int], margin: float, luck: float) -> Curve | None:
    """A power law that never rises, error = level of the seed + b (n / N) ** -c, over amounts n of N task texts.

    outcomes: of candidates that differ only in amount. texts: amount -> number of texts. None for fewer than three
    different numbers. c is uniform on a log scale from 0.1 to 1.5; the rise from all texts to the fewest has a
    half-normal prior with the mean error as scale.
    """
    pilots = sorted(outcomes)
    counts = np.array([texts[one.candidate.amount] for one in pilots], np.float64)
    sizes = sorted(set(counts.tolist()))
    if len(sizes) < 3:
        return None
    errors = np.array([outcomes[one].error for one in pilots])
    inverse = np.linalg.inv(_sampling([outcomes[one] for one in pilots]) + luck**2 * np.eye(len(pilots)))
    wide, rng = max(float(errors.mean()), 1.0), np.random.default_rng(0)
    levels = _members([one.seed for one in pilots])
    powers, logs, found = np.geomspace(0.1, 1.5, 40), [], []
    for power in powers:
        rise = (counts / sizes[-1]) ** -power - 1
        design = np.column_stack([levels, rise])
        precision = design.T @ inverse @ design
        precision[-1, -1] += (rise.max() / wide) ** 2
        spread = np.linalg.inv(precision)
        mean = spread @ design.T @ inverse @ errors
        b, deviation = mean[-1], spread[-1, -1] ** 0.5
        fit = errors @ inverse @ errors - mean @ precision @ mean
        likelihood = 0.5 * (np.linalg.slogdet(spread)[1] - fit) + special.log_ndtr(b / deviation)
        logs.append(float(likelihood + np.log(rise.max())))
        found.append((b, deviation))
    falls, exponents = [], []
    for (b, deviation), power, count in zip(found, powers, rng.multinomial(_DRAWS, special.softmax(logs))):
        # From the normal truncated to above 0, by its survival function, which stays exact far in the tail.
        tail = special.ndtr(b / deviation) * rng.uniform(size=count)
        falls.append(b - deviation * special.ndtri(np.maximum(tail, 1e-300)))
        exponents.append(np.full(count, power))
    fall, power = np.maximum(np.concatenate(falls), 1e-9), np.concatenate(exponents)
    enough = np.maximum(sizes[-1] * (1 + margin / fall) ** (-1 / power), sizes[0])
    errors_at = tuple(float(errors[counts == size].mean()) for size in sizes)
    return Curve(tuple(map(int, sizes)), errors_at, _summary(enough), _summary(fall * (1 - 2**-power)))


def curve_points(evidence: Evidence) -> dict[Pilot, Outcome]:
    """The pilots of the learning curve: with less task text, and with all of it at the same steps."""
    less = [one for one in evidence.outcomes if one.candidate.amount < 1]
    same = {(one.candidate.share, one.candidate.teacher, one.steps) for one in less}
    return {
        one: found
        for one, found in evidence.outcomes.items()
        if (one.candidate.share, one.candidate.teacher, one.steps) in same
    }


def _summary(draws: np.ndarray) -> tuple[float, float, float]:
    middle, low, high = np.quantile(draws, (0.5, *INTERVAL)).tolist()
    return middle, low, high


def table(settings: Advise, evidence: Evidence, belief: Belief) -> list[dict[str, Any]]:
    """The evidence on every transfer set: its last rung, and its difference from the chosen one after all steps."""
    outcomes, choice = compared(evidence.outcomes), decide(settings, belief)
    sets = [one for one in belief.candidates if one.teacher == "generic"]
    chances, rows = belief.best(sets), []
    for one in sets:
        steps = max(pilot.steps for pilot in outcomes if pilot.candidate == one)
        last = [found for pilot, found in outcomes.items() if pilot.candidate == one and pilot.steps == steps]
        change = belief.of([one, choice.candidate]) @ np.array([1.0, -1.0])
        difference = dict(zip(("difference", "low", "high"), (float(change.mean()), *_summary(change)[1:])))
        tasks = {task: float(np.mean([found.tasks[task] for found in last])) for task in last[0].tasks}
        error = float(np.mean([found.error for found in last]))
        numbers = {"steps": steps, "seeds": len(last), "error": error, "tasks": tasks, **difference}
        state = {"best": chances[one], "dropped": one not in evidence.alive}
        rows.append({"share": one.share, "set": one.set_name, **numbers, **state})
    return rows


def adapting(settings: Advise, belief: Belief) -> dict[str, Any] | None:
    """How many points the adapted teacher saves on the same text; None without a pilot of it."""
    adapted = next((one for one in belief.candidates if one.teacher == "adapted"), None)
    if adapted is None:
        return None
    gain = belief.of([adapted._replace(teacher="generic"), adapted]) @ np.array([1.0, -1.0])
    worth = float((gain > settings.margin).mean())
    verdict = BETTER if worth >= SURE else ENOUGH if worth <= 1 - SURE else OPEN
    middle, low, high = _summary(gain)
    values = {"gain": middle, "low": low, "high": high, "pays": worth, "verdict": verdict}
    return {"set": adapted.set_name, **values}


def swarm(outcomes: Outcomes, share_of: Callable[[Pilot], float]) -> tuple[str, str]:
    """ratios.csv and metrics.csv for `olmix fit`: a run per line, with the same `run` in both.

    share_of(pilot): its realized share of task text. The fit does not model steps, so all runs have the same number:
    that at which most transfer sets were tried, the largest of equals. Errors are shares, lower is better.
    """
    plain = [one for one in sorted(outcomes) if one.candidate == Candidate(one.candidate.share)]
    tried = {steps: len({one.candidate for one in plain if one.steps == steps}) for steps in {p.steps for p in plain}}
    steps = max(tried, key=lambda one: (tried[one], one))
    runs = [one for one in plain if one.steps == steps]
    tasks = list(outcomes[runs[0]].tasks)
    ratios: list[list[Any]] = [["run", "name", "index", "generic", "task"]]
    metrics: list[list[Any]] = [["run", "name", "index", *(f"{task}_{HEADLINE[task].error}" for task in tasks)]]
    for index, one in enumerate(runs):
        name = f"{one.candidate.set_name}-steps{steps}"
        who = [f"{name}-seed{one.seed}", name, index]
        share = round(share_of(one), 6)
        ratios.append([*who, round(1 - share, 6), share])
        metrics.append([*who, *(round(outcomes[one].tasks[task] / 100, 6) for task in tasks)])
    return _csv(ratios), _csv(metrics)


def _csv(rows: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
