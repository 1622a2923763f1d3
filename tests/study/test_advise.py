"""The advisor's statistics in simulated worlds with known truth, its search, and its wording."""

import csv
import io

import numpy as np
import pytest

from kd_jax.config.commands import Advise
from kd_jax.study import advice
from kd_jax.study.advise import (
    BETTER,
    ENOUGH,
    OPEN,
    Candidate,
    Evidence,
    Outcome,
    Pilot,
    adapting,
    believe,
    choose,
    compared,
    curve_points,
    decide,
    learning_curve,
    outcome,
    search,
    survivors,
    swarm,
    table,
)
from tests.support.pilot_worlds import FULL, World, outcome_of
from tests.support.report_inputs import dc_record, icner_record

GENERIC, HALF, TASK = Candidate(0.0), Candidate(0.5), Candidate(1.0)
SETS = Advise(amounts=(), adapt=False)
WORLDS = 30  # of each kind; enough to notice 25 % instead of 5 %


def searched(settings, world, adaptable=False):
    """A search with at most three seeds, which is quick."""
    return search(settings, FULL, range(3), lambda: adaptable, world.run)


def belief_of(evidence):
    return believe(compared(evidence.outcomes), FULL)


def rates(generic, half, task):
    """Errors of transfer sets in points."""
    return lambda one: {0.0: generic, 0.5: half, 1.0: task}[one.share]


def choices(rate, count=WORLDS, **world):
    """The choices of many searches in worlds of the same truth."""
    found = []
    for seed in range(count):
        evidence = searched(SETS, World(rate, seed=seed, **world))
        found.append(decide(SETS, belief_of(evidence)))
    return found


def share(found, holds):
    return float(np.mean([holds(one) for one in found]))


def test_task_text_is_recommended_where_it_is_best():
    found = choices(rates(22.0, 20.5, 19.0), drift=0.5)
    assert share(found, lambda one: one.candidate == TASK) >= 0.95
    assert share(found, lambda one: one.verdict == OPEN) <= 0.5, "three seeds that spread by 0.5 points"


def test_a_mixture_is_recommended_where_task_text_is_so_scarce_that_it_loses():
    found = choices(rates(21.0, 19.0, 22.0), drift=0.5)
    assert share(found, lambda one: one.candidate == HALF) >= 0.95
    assert share(found, lambda one: one.verdict == OPEN) <= 0.1


def test_without_a_difference_nothing_is_called_better_and_one_kind_of_text_is_preferred():
    found = choices(rates(20.0, 20.0, 20.0), drift=0.5)
    assert share(found, lambda one: one.verdict == BETTER) <= 0.15, "5 % nominal"
    assert share(found, lambda one: one.candidate == TASK) > share(found, lambda one: one.candidate == GENERIC)
    assert share(found, lambda one: one.candidate == HALF) <= 0.35


@pytest.mark.parametrize("steps", [(0.25,), (0.25, 0.5, 1.0)])
def test_intervals_and_probabilities_are_calibrated_in_worlds_drawn_at_random(steps):
    settings = Advise(steps=steps, seeds=(1, 2, 3)[: len(steps)], amounts=(), adapt=False)
    covered, claimed, right = [], [], []
    for seed in range(2 * WORLDS):
        truth = 20 + 1.2 * np.random.default_rng(900 + seed).standard_normal(3)
        world = World(rates(*truth), seed=seed, drift=0.7)
        rungs = [(round(one * FULL), count) for one, count in zip(steps, settings.seeds)]
        found = world.run([Pilot(c, n, s) for n, count in rungs for s in range(count) for c in (GENERIC, HALF, TASK)])
        belief = believe(found, FULL)
        low, high = np.quantile(belief.of([TASK, GENERIC]) @ [1.0, -1.0], [0.05, 0.95])
        covered.append(low <= truth[2] - truth[0] <= high)
        chances = belief.best([GENERIC, HALF, TASK])
        claimed.append(max(chances.values()))
        right.append(max(chances, key=chances.__getitem__) == (GENERIC, HALF, TASK)[int(truth.argmin())])
    assert np.mean(covered) >= 0.8, "90 % nominal; 60 worlds"
    assert abs(np.mean(claimed) - np.mean(right)) <= 0.13


def test_what_the_pilots_of_a_seed_share_cancels():
    world = World(rates(23.0, 21.5, 20.0), seed=1, shared=15.0, luck=0.2)
    evidence = searched(SETS, world)
    belief = belief_of(evidence)
    assert decide(SETS, belief).candidate == TASK
    assert belief.luck < 3.0
    low, high = np.quantile(belief.of([GENERIC, TASK]) @ [1.0, -1.0], [0.05, 0.95])
    assert 0 < low < 3.0 < high < 6.0


def test_many_pilots_of_few_steps_still_leave_uncertainty():
    world = World(rates(20.4, 20.2, 20.0), seed=2, luck=0.01, shared=0.0, utterances=20_000)

    def spread(steps):
        found = world.run([Pilot(one, steps, seed) for seed in range(8) for one in (GENERIC, TASK)])
        return float((believe(found, FULL).of([GENERIC, TASK]) @ [1.0, -1.0]).std())

    assert spread(FULL // 8) > 1.5 * spread(FULL)


def test_pilots_of_different_utterances_are_refused():
    found = {Pilot(TASK, FULL, 0): outcome_of(np.ones(9)), Pilot(GENERIC, FULL, 0): outcome_of(np.ones(8))}
    with pytest.raises(ValueError, match="different utterances"):
        believe(found, FULL)


def test_without_any_error_nothing_is_known():
    found = {Pilot(one, FULL, seed): outcome_of(np.zeros(50)) for one in (GENERIC, TASK) for seed in (0, 1)}
    belief = believe(found, FULL)
    assert np.isfinite(belief.effects).all() and max(belief.best([GENERIC, TASK]).values()) < 0.6


def test_the_worse_half_is_dropped_only_where_it_is_unlikely_to_be_best():
    many = [Candidate(one) for one in (0.0, 0.25, 0.5, 1.0)]
    truth = {0.0: 30.0, 0.25: 20.0, 0.5: 20.1, 1.0: 20.2}
    found = World(lambda one: truth[one.share], seed=3).run([Pilot(one, FULL, 0) for one in many])
    belief = believe(found, FULL)
    left = survivors(belief, many, 0.1)
    assert GENERIC not in left and set(many[1:3]) < set(left) | {TASK}, "close ones stay although they are in the half"
    assert len(left) == 3
    assert len(survivors(belief, many, 0.999)) == 2 and survivors(belief, many, 0.0) == many


def test_one_kind_of_text_is_preferred_within_the_margin_and_only_there():
    found = World(rates(25.0, 19.8, 20.0), seed=4, luck=0.05, utterances=20_000).run(
        [Pilot(one, FULL, seed) for one in (GENERIC, HALF, TASK) for seed in range(4)]
    )
    belief, sets = believe(found, FULL), [GENERIC, HALF, TASK]
    near = choose(belief, sets, 1.0)
    assert near.candidate == TASK and near.verdict == ENOUGH and near.best < 0.5
    far = choose(belief, sets, 0.05)
    assert far.candidate == HALF and far.regret < near.regret
    found = World(rates(20.0, 19.8, 25.0), seed=4, luck=0.05, utterances=20_000).run(
        [Pilot(one, FULL, seed) for one in (GENERIC, HALF, TASK) for seed in range(4)]
    )
    assert choose(believe(found, FULL), sets, 1.0).candidate == GENERIC


class Stopped(Exception):
    pass


def test_a_search_that_was_stopped_goes_on_without_running_a_pilot_twice():
    settings = Advise(amounts=(0.1, 0.3), adapt=True)
    whole = World(rates(20.6, 20.2, 20.0), seed=5)
    wanted = searched(settings, whole, adaptable=True)
    assert len(set(whole.runs)) == len(whole.runs) > 12
    for stop in (1, 4, 9, len(whole.runs) - 1):
        ran: list[Pilot] = []
        kept: dict[Pilot, Outcome] = {}

        def run(pilots, limit=None, ran=ran, kept=kept):
            for one in pilots:
                if one not in kept:
                    if limit is not None and len(kept) == limit:
                        raise Stopped
                    ran.append(one)
                    kept[one] = whole.outcomes[one]  # a search that requests another pilot fails here
            return {one: kept[one] for one in pilots}

        with pytest.raises(Stopped):
            search(settings, FULL, range(3), lambda: True, lambda pilots, stop=stop, run=run: run(pilots, stop))
        found = search(settings, FULL, range(3), lambda: True, run)
        assert ran == whole.runs and found.alive == wanted.alive and found.outcomes.keys() == wanted.outcomes.keys()


def test_a_rung_that_does_not_fit_is_tried_with_the_better_half_and_ends_the_search_otherwise():
    settings = Advise(shares=(0.0, 0.25, 0.5, 1.0), amounts=(), adapt=False)
    world = World(lambda one: 20.0 - one.share / 10, seed=6)
    asked = []

    def run(pilots, most):
        asked.append(len(pilots))
        return world.run(pilots) if len(pilots) <= most else None

    found = search(settings, FULL, range(3), lambda: False, lambda pilots: run(pilots, 4))
    assert asked == [4, 8, 4, 6] and len(found.alive) == 2 and found.stopped
    assert {one.steps for one in found.outcomes} == {FULL // 4, FULL // 2}


def test_with_drop_below_0_the_whole_grid_is_run():
    settings = Advise(drop_below=0.0, amounts=(), adapt=False)
    found = searched(settings, World(rates(40.0, 30.0, 20.0), seed=7))
    assert len(found.outcomes) == 3 * (1 + 2 + 3) and not found.stopped


def test_adapting_and_less_text_are_tried_on_the_chosen_set_and_pay_or_do_not():
    def rate(one):
        return (19.0 if one.teacher == "adapted" else 22.0) + 4 * ((one.amount / 1.0) ** -0.5 - 1) + 2 * (1 - one.share)

    evidence = searched(Advise(), World(rate, seed=8, luck=0.2, utterances=8000), adaptable=True)
    extra = {one.candidate for one in evidence.outcomes} - {GENERIC, HALF, TASK}
    assert extra == {TASK._replace(amount=0.1), TASK._replace(amount=0.3), TASK._replace(teacher="adapted")}
    found = adapting(Advise(), belief_of(evidence))
    assert found and found["verdict"] == BETTER and found["low"] < 3.0 < found["high"]
    assert {one.candidate.teacher for one in curve_points(evidence)} == {"generic"}
    never = searched(Advise(), World(rate, seed=8, luck=0.2, utterances=8000), adaptable=False)
    assert adapting(Advise(), belief_of(never)) is None

    def worse(one):
        return 25.0 if one.teacher == "adapted" else 20.0 + 2 * (1 - one.share)

    evidence = searched(Advise(), World(worse, seed=8, luck=0.2, utterances=8000), adaptable=True)
    found = adapting(Advise(), belief_of(evidence))
    assert found and found["verdict"] == ENOUGH and found["pays"] < 0.05


def test_no_curve_is_drawn_where_the_choice_has_no_task_text():
    evidence = searched(Advise(), World(rates(15.0, 20.0, 25.0), seed=9), adaptable=False)
    assert evidence.of is None and all(one.candidate.amount == 1 for one in evidence.outcomes)


AMOUNTS = (0.05, 0.2, 0.5, 1.0)


def curve(fall, power, seed, amounts=AMOUNTS, luck=0.5, utterances=1500):
    """The curve of a world whose truth is a power law of up to 6,000 texts."""
    world = World(lambda one: 20 + fall * (one.amount**-power - 1), seed=seed, luck=luck, utterances=utterances)
    found = world.run([Pilot(TASK._replace(amount=one), FULL, seed) for seed in (0, 1) for one in amounts])
    return learning_curve(found, {one: round(6000 * one) for one in amounts}, 0.5, luck)


def test_the_curve_covers_the_truth():
    truth = 6000 * (1 + 0.5 / 2.0) ** (-1 / 0.5)
    gain = 2.0 * (1 - 2**-0.5)
    inside = [[], []]
    for seed in range(WORLDS):
        found = curve(2.0, 0.5, seed)
        assert found
        inside[0].append(found.suffices[1] <= truth <= found.suffices[2])
        inside[1].append(found.doubling[1] <= gain <= found.doubling[2])
    assert np.mean(inside[0]) >= 0.8 and np.mean(inside[1]) >= 0.8, "90 % nominal"


def test_the_curve_never_rises_and_a_flat_one_says_that_the_least_suffices():
    flat = curve(0.0, 0.5, 1, luck=0.01, utterances=20_000)
    assert flat and flat.doubling[1] >= 0 and flat.suffices[0] == 300 and flat.texts == (300, 1200, 3000, 6000)
    noisy = curve(0.0, 0.5, 1)
    assert noisy and noisy.doubling[1] > 1e-6, "the posterior is cut off at 0, it has no mass there"
    rising = curve(-0.5, 0.5, 1, luck=0.01, utterances=20_000)
    assert rising and 0 <= rising.doubling[1] < rising.doubling[2] < 0.1 and rising.suffices[2] == 300
    steep = curve(3.0, 0.5, 1)
    assert steep and steep.suffices[0] > 3000
    assert curve(2.0, 0.5, 1, amounts=(0.5, 1.0)) is None


def dc(number, right):
    return {**dc_record(number, "en-US", "music", right), "test_sets": ["dev"]}


def icner(number, intent, slot):
    return {**icner_record(number, "en-US", "music", intent, slot), "test_sets": ["dev"]}


def test_an_outcome_has_the_errors_of_the_tasks_and_what_each_utterance_adds():
    found = outcome(
        {"dc": [dc(n, n > 0) for n in range(8)], "icner": [icner(n, n > 1, n > 2) for n in range(8)]},
    )
    assert found and found.tasks["dc"] == pytest.approx(100 / 8)
    assert found.tasks["icner"] == pytest.approx(100 * 5 / 16), "two intents and three slots of 8 + 8"
    assert found.error == pytest.approx((100 / 8 + 500 / 16) / 2)
    assert found.parts.shape == (8,) and abs(found.parts.sum()) < 1e-12 and found.parts[0] == found.parts.max()
    assert outcome({"dc": []}) is None


def test_the_files_for_olmix_have_a_row_for_each_run_of_the_same_steps():
    found = World(rates(22.0, 21.0, 20.0), seed=1).run(
        [Pilot(one, 200, 0) for one in (GENERIC, HALF, TASK)]
        + [Pilot(one, 400, seed) for one in (HALF, TASK) for seed in (0, 1)]
        + [Pilot(TASK._replace(amount=0.1), 200, 0), Pilot(TASK._replace(teacher="adapted"), 200, 0)]
    )
    ratios, metrics = (
        list(csv.reader(io.StringIO(text))) for text in swarm(found, lambda one: 0.9 * one.candidate.share)
    )
    assert ratios[0] == ["run", "name", "index", "generic", "task"]
    assert metrics[0] == ["run", "name", "index", "dc_error_rate"]
    assert [row[0] for row in ratios[1:]] == ["generic-steps200-seed0", "mix50-steps200-seed0", "task-steps200-seed0"]
    assert [row[:3] for row in ratios] == [row[:3] for row in metrics]
    assert all(float(row[3]) + float(row[4]) == pytest.approx(1) for row in ratios[1:])
    assert [float(row[4]) for row in ratios[1:]] == [0.0, 0.45, 0.9]
    assert float(metrics[3][3]) == pytest.approx(found[Pilot(TASK, 200, 0)].error / 100, abs=1e-6)


def values(settings, evidence):
    """What advice.json holds, of a world."""
    chosen = decide(settings, belief_of(evidence))
    of = chosen.candidate
    named = {"set": of.set_name, "share": of.share, "text": of.text, "verdict": chosen.verdict}
    numbers = {"best": chosen.best, "within": chosen.within, "regret": chosen.regret}
    domain = {"domain": "music", "tokens": 1200, "jsd": 0.5, "jsd_matched": None, "overlap": 0.2}
    return {
        "choice": {**named, **numbers},
        "margin": settings.margin,
        "sets": table(settings, evidence, belief_of(evidence)),
        "adapting": adapting(settings, belief_of(evidence)) or {"why": "its masked-LM head is not trained"},
        "task_text": {"why": "it did not fit into 6 minutes"},
        "cost": {
            "pilots": 3,
            "minutes": 5.2,
            "budget_minutes": 6.0,
            "stopped": evidence.stopped,
            "untried": [],
            "full_minutes": 12.0,
        },
        "data": {
            "texts": {"generic": 10, "task": 20},
            "tokens": {"generic": 100, "task": 200},
            "jsd": 0.4,
            "overlap": 0.3,
            "domains": [domain],
        },
        "command": "kd-jax study --config=runs/advice/study.py --workdir=runs/advice",
    }


def evidence_of(rate, pilots, **world):
    return Evidence(World(rate, **world).run(pilots), [GENERIC, TASK], None, True)


def test_the_advice_begins_with_what_to_do_and_fits_on_a_screen():
    few = evidence_of(rates(20.4, 20.2, 20.0), [Pilot(one, 200, 0) for one in (GENERIC, HALF, TASK)], utterances=40)
    text = advice.terminal(values(SETS, few))
    assert text.startswith("Start with ") and "text alone; these pilots cannot tell" in text
    assert "a larger budget continues from here" in text and "(dropped)" in text
    clear = evidence_of(rates(30.0, 25.0, 20.0), [Pilot(c, FULL, s) for c in (GENERIC, HALF, TASK) for s in range(3)])
    text = advice.terminal(values(SETS, clear))
    assert text.startswith("Distill on task text alone. It is the best of 3 transfer sets with probability > 0.99")
    assert "was not tried: its masked-LM head" in " ".join(text.split()) and "> 0.99" in text
    assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) <= 30
    page = advice.markdown(values(SETS, clear))
    assert (
        page.startswith("Distill on task text alone.")
        and "| task | 2" in page
        and "| music | 1,200 | 0.500 | – |" in page
    )


def test_the_advice_on_adapting_and_on_the_amount_of_text_is_in_points():
    clear = evidence_of(rates(30.0, 25.0, 20.0), [Pilot(c, FULL, s) for c in (GENERIC, TASK) for s in range(3)])
    told = values(SETS, clear)
    told["adapting"] = {"set": "task", "gain": 1.5, "low": 1.0, "high": 2.0, "pays": 0.97, "verdict": BETTER}
    told["task_text"] = {
        "texts": (300, 6000),
        "of": "task text alone",
        "suffices": (2345.6, 1200.0, 4000.0),
        "doubling": (0.4, 0.1, 0.9),
    }
    text = " ".join(advice.terminal(told).split())
    assert "pays: for task it saves +1.50 points (+1.00 to +2.00)" in text
    assert "About 2,300 of the 6,000 task texts come within 0.5 points of all" in text
    assert "(90 % interval 1,200 to 4,000). Twice as many texts would save +0.40 points (+0.10 to +0.90)" in text
    told["task_text"]["suffices"] = (300.0, 300.0, 900.0)
    assert "300 or fewer of the 6,000 task texts" in " ".join(advice.terminal(told).split())
