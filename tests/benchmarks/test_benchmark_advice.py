"""The evaluation of the advice: on simulated worlds with known truth, and on the files of runs."""

import json

import numpy as np
import pytest

from benchmarks import advice
from kd_jax.config.commands import Advise
from kd_jax.study.advise import Candidate, Pilot
from tests.support.pilot_worlds import FULL, World
from tests.support.report_inputs import dc_record

SHARES = (0.0, 0.5, 1.0)
STEPS = {FULL // 4: 1, FULL // 2: 2, FULL: 3}


def cell(seed, luck=0.5, drift=0.7, divergence=None):
    """A cell of a world: the whole grid of pilots, at one second per step."""
    truth = dict(zip(SHARES, (20 + 1.5 * np.random.default_rng(seed).standard_normal(3)).tolist()))
    world = World(lambda one: truth[one.share], seed=seed, luck=luck, drift=drift)
    pilots = [Pilot(Candidate(c), n, s) for n, count in STEPS.items() for s in range(count) for c in SHARES]
    seconds = {one: float(one.steps) for one in pilots}
    return advice.Cell(f"cell {seed}", truth, 500, world.run(pilots), seconds, FULL, divergence)


def test_the_advisor_beats_rules_that_look_at_nothing_and_stays_within_the_grid():
    details = [advice.judged(cell(seed), Advise(budget_minutes=1e9)) for seed in range(24)]
    found = advice.summary(details, 0.5)
    rules = found["rules"]
    assert found["cells"] == 24 and found["pairs"] == 72
    assert rules["advisor"]["pairs"] > 0.8 > 0.65 > rules["always task text"]["pairs"]
    assert rules["advisor"]["regret"] < 0.3 < rules["always half"]["regret"]
    assert rules["advisor"]["correlation"] > 0.6
    assert 0.3 < found["task_loses"] < 1 and abs(found["claimed_best"] - found["was_best"]) < 0.25
    assert found["sure_within_margin"] >= 0.85
    text = advice.text({**found, "similarity": None})
    assert "24 decisions, 72 pairs" in text and "advisor" in text and "single pilot" in text


def test_a_single_pilot_costs_no_more_than_the_advisor():
    one = cell(1)
    assert advice.single(one, 3.0 * FULL) == {
        share: one.outcomes[Pilot(Candidate(share), FULL, 0)].error for share in SHARES
    }
    few = {share: one.outcomes[Pilot(Candidate(share), FULL // 4, 0)].error for share in SHARES}
    assert advice.single(one, 3.0 * FULL / 4) == few and advice.single(one, 1.0) == few


def test_a_budget_ends_the_replay_and_a_missing_pilot_does_too():
    one = cell(2)
    _, ran = advice.replayed(one, Advise(budget_minutes=3 * FULL / 4 / 60))
    assert {pilot.steps for pilot in ran} == {FULL // 4} and len(ran) == 3
    short = one._replace(outcomes={pilot: found for pilot, found in one.outcomes.items() if pilot.steps < FULL})
    _, ran = advice.replayed(short, Advise(budget_minutes=1e9, margin=0.0))
    assert max(pilot.steps for pilot in ran) == FULL // 2


def test_pairs_and_correlation_by_hand():
    truth = {0.0: 3.0, 0.5: 1.0, 1.0: 2.0}
    assert advice.ordered({0.0: 3.0, 0.5: 2.0, 1.0: 1.0}, truth) == [1.0, 1.0, 0.0]
    assert advice.ordered({0.0: 1.0, 0.5: 1.0, 1.0: 1.0}, truth) == [0.5, 0.5, 0.5]
    assert advice.ordered({0.0: 1.0, 1.0: 2.0}, {0.0: 1.0, 1.0: 1.0}) == []
    assert (
        advice.correlated(truth, truth) == pytest.approx(1)
        and advice.correlated(dict.fromkeys(truth, 1.0), truth) is None
    )
    assert [advice.share_of(name) for name in ("generic", "mix12.5", "task", "mine")] == [0.0, 0.125, 1.0, None]


def test_similarity_adds_where_it_decides_and_not_where_it_is_noise():
    rng = np.random.default_rng(3)
    noise = advice.similarity_adds([cell(seed, divergence=float(rng.random())) for seed in range(12)])
    assert noise and noise["pilots and similarity"] > 0.9 * noise["pilots"] and noise["similarity"] > noise["pilots"]
    known = [cell(seed) for seed in range(12)]
    told = advice.similarity_adds([one._replace(divergence=(one.truth[0.0] - one.truth[1.0]) / 10) for one in known])
    assert told and told["pilots and similarity"] < 1e-6 < told["pilots"]
    assert advice.similarity_adds(known) is None


def test_cells_come_from_the_files_of_runs(tmp_path, capsys):
    pilots, study = tmp_path / "pilots", tmp_path / "study"
    study.mkdir()
    lines = []
    for share, errors in ((0.0, 30), (1.0, 10)):
        folder = f"dev-{share:g}"
        (pilots / "stages" / folder).mkdir(parents=True)
        rows = [
            {**dc_record(n + 80 * (domain == "news"), locale, domain, n % 40 >= errors / 2), "test_sets": ["dev"]}
            for n in range(80)
            for locale in ("de-DE", "en-US")
            for domain in ("music", "news")
        ]
        (pilots / "stages" / folder / "records.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        who = {"share": share, "teacher": "generic", "amount": 1.0, "steps": 100, "seed": 0, "full_steps": 100}
        lines += [
            {**who, "scored": {"dc": folder}, "seconds": 60.0},
            {**who, "amount": 0.1, "scored": {}, "seconds": 1.0},
        ]
    (pilots / "pilots.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    place = {"student": "distilled", "teacher": "generic", "task": "dc", "metric": "error_rate", "test_set": "test"}
    results = [
        {**place, "transfer_set": name, "seed": seed, "scope": "locale", "locale": locale, "domain": "all"}
        | {"value": value + 0.01 * seed, "count": count}
        for name, value in (("generic", 0.3), ("task", 0.1), ("mine", 0.0))
        for seed in (0, 1)
        for locale, count in (("de-DE", 100), ("en-US", 20))
    ]
    (study / "results.jsonl").write_text("\n".join(map(json.dumps, results)) + "\n")
    (one,) = advice.read_cells(pilots, study, "locale", 50)
    assert one.name == "pilots/study de-DE" and one.truth == pytest.approx({0.0: 30.5, 1.0: 10.5})
    assert {pilot.candidate.share: found.error for pilot, found in one.outcomes.items()} == {0.0: 37.5, 1.0: 12.5}
    assert one.utterances == 100 and len(next(iter(one.outcomes.values())).ids) == 160
    file = tmp_path / "found.json"
    advice.main(["--pair", str(pilots), str(study), "--by", "locale", "--least", "10", f"--output={file}"])
    assert "2 decisions, 2 pairs" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert found["rules"]["advisor"]["pairs"] == 1.0 and found["details"][0]["rules"]["advisor"]["chosen"] == 1.0
    with pytest.raises(SystemExit):
        advice.main(["--pair", str(pilots), str(study), "--by", "locale", "--least", "1000"])
