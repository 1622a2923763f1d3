"""Damaged inputs end with a one-sentence error or the right result; the counts are printed."""

import pytest

from tests.faults import inputs


def check(folder, count):
    cases = inputs.run(folder, inputs.plan(count, list(inputs.KINDS)), seed=0)
    said = inputs.report(cases, seed=0)
    print(f"\n{said}")
    assert len(cases) == count and {one.kind for one in cases} == set(inputs.KINDS)
    assert all(one.outcome in inputs.GOOD for one in cases), said
    # No kind may be always refused, or never: then its cases would test nothing.
    assert {outcome for one in cases for outcome in [one.outcome]} == set(inputs.GOOD)
    assert any(one.repaired for one in cases)


@pytest.mark.slow
def test_a_hundred_bad_inputs(tmp_path):
    check(tmp_path, 100)


@pytest.mark.long
def test_a_thousand_bad_inputs(tmp_path):
    check(tmp_path, 1000)
