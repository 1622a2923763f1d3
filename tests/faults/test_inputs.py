"""Damaged inputs end in one sentence or in the right result; the counts are printed."""

import pytest

from tests.faults import inputs


def check(folder, count):
    cases = inputs.run(folder, inputs.plan(count, list(inputs.KINDS)), seed=0)
    said = inputs.report(cases, seed=0)
    print(f"\n{said}")
    assert len(cases) == count and {one.kind for one in cases} == set(inputs.KINDS)
    assert all(one.outcome in inputs.GOOD for one in cases), said
    # Not one kind may be refused whatever is done to it, nor go unnoticed: then its cases would say nothing.
    assert {outcome for one in cases for outcome in [one.outcome]} == set(inputs.GOOD)
    assert any(one.repaired for one in cases)


@pytest.mark.slow
def test_a_hundred_bad_inputs(tmp_path):
    check(tmp_path, 100)


@pytest.mark.long
def test_a_thousand_bad_inputs(tmp_path):
    check(tmp_path, 1000)
