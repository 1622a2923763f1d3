"""Processes of a job: what they tell each other, and that an end of one is the end of all."""

import json
import pathlib
import signal
import time

import pytest

from kd_jax.runtime import distributed
from tests.support.several_processes import ended, free_port, run, start

MEMBER = str(pathlib.Path(__file__).parents[1] / "support" / "job_member.py")


def test_a_single_process_waits_for_nobody_and_tells_itself():
    with distributed.joined(None, lambda error: (1, str(error))):
        distributed.barrier()
        with distributed.first_goes_ahead():
            pass
        assert distributed.from_first((1, {"two": None})) == [1, {"two": None}], "as JSON, as in several processes"
        assert distributed.from_all(b"mine") == [b"mine"]


def test_an_error_of_a_single_process_is_raised_as_it_is():
    with pytest.raises(ZeroDivisionError), distributed.joined(None, lambda error: (1, str(error))):
        _ = 1 / 0


@pytest.mark.slow
def test_exchanges_in_step(tmp_path):
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in run(3, [MEMBER, "exchange", str(tmp_path)])]
    assert found[0]["first"] == [{"from": 0, "turn": 0}, {"from": 0, "turn": 1}]
    assert found[0]["all"] == [["0", 100_000], ["1", 200_000], ["2", 300_000]]
    assert found[0]["seen"] == "by 0"
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "codes", "said"),
    [
        ("mistake", (2, 2), "config.nothing: is empty; fill it"),
        pytest.param("mistake in a collective", (2, 2), "config.nothing: is empty; fill it", marks=pytest.mark.long),
        pytest.param("crash of the first", (1, 1), "ValueError: this cannot be", marks=pytest.mark.long),
        ("preemption of the first", (75, 75), "preempted: process 0: half of it is saved"),
        pytest.param("signal to one that waits", (75, 75), "stopped at texts", marks=pytest.mark.long),
        ("kill", (None, -signal.SIGKILL), None),
        pytest.param("kill of the first", (-signal.SIGKILL, None), None, marks=pytest.mark.long),
    ],
)
def test_an_end_of_one_is_the_end_of_all(tmp_path, what, codes, said):
    began = time.monotonic()
    found = ended(start(2, [MEMBER, what, str(tmp_path)]), timeout=120)
    assert time.monotonic() - began < 110, "they ended by themselves, well before JAX gives up waiting"
    ends = [code for code, _, _ in found]
    for code, wanted in zip(ends, codes, strict=True):
        assert code == wanted if wanted is not None else code != 0, f"{ends}: {found}"
    if said:
        told = [errors for _, _, errors in found]
        assert any(said in errors for errors in told)
        other = told[0 if what.startswith("mistake") else 1]
        assert said in other, "the process that did not fail says why it ends"
        assert "process" in other


@pytest.mark.slow
def test_a_process_that_nobody_joins_says_where_it_waited(tmp_path):
    place = [f"--coordinator=localhost:{free_port()}", "--processes=2", "--process=1", "--timeout=2"]
    ((code, _, errors),) = ended(start(1, [MEMBER, "exchange", str(tmp_path), *place]), timeout=60)
    assert code == 2
    assert "there was no process 0 at localhost:" in errors
