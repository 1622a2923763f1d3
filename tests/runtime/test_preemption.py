import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from kd_jax.runtime import preemption as module
from kd_jax.runtime.preemption import EXIT_CODE, Agreement, Preempted, Preemption, interruptible, reached, requested

ROOT = pathlib.Path(__file__).parents[2]


def test_sigterm_sets_a_flag_that_is_polled_and_the_handler_goes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption():
        assert not requested() and not reached()
        os.kill(os.getpid(), signal.SIGTERM)
        assert requested() and reached()
    assert signal.getsignal(signal.SIGTERM) is before
    assert not requested()
    assert EXIT_CODE == 75


def test_no_exception_handler_on_the_way_swallows_it():
    assert not issubclass(Preempted, Exception)


@pytest.mark.parametrize("alone", [False, True])
def test_interruptible_shows_life_before_each_item_and_stops_before_the_next(monkeypatch, alone):
    signs, seen = [], []
    monkeypatch.setattr(module, "alive", signs.append)
    assert list(interruptible("abc", "letters", alone=alone)) == ["a", "b", "c"]
    assert signs == ["letters, item 0", "letters, item 1", "letters, item 2"]
    with Preemption() as preemption, pytest.raises(Preempted, match="stopped at letters"):
        for letter in interruptible("abc", "letters", alone=alone):
            seen.append(letter)
            if letter == "b":
                preemption.request()
    assert seen == ["a", "b"]


def test_outside_the_main_thread_only_request_sets_it():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Preemption() as preemption:
            preemption.request()
            seen.append(requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def run(program):
    """(return code, output) of a program that listens for SIGTERM."""
    program = "import os, signal, time\nfrom kd_jax.runtime.preemption import *\n" + program
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60)
    return ended.returncode, ended.stdout


def test_a_second_sigterm_ends_the_process():
    program = """
with Preemption():
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still alive", flush=True)
"""
    assert run(program) == (-signal.SIGTERM, "alive True\n")


def test_a_forked_child_is_ended_by_sigterm_without_a_word_to_its_parent():
    program = """
with Preemption():
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"1")  # a signal before Python is ready in the child would be lost
        time.sleep(60)
        os._exit(1)
    os.read(reader, 1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), requested(), flush=True)
"""
    assert run(program) == (0, f"{-signal.SIGTERM} False\n")


class Service:
    """Keys and values as JAX's coordination service keeps them."""

    def __init__(self):
        self.values, self.changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self.changed:
            if key in self.values:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get(self, key, _):
        with self.changed:
            self.changed.wait_for(lambda: key in self.values)
            return self.values[key]


def stopped(member, polls):
    """The number of the first poll of so many that says to stop."""
    found = [member.reached() for _ in range(polls)]
    return found.index(True) + 1


def test_several_processes_stop_at_the_first_poll_that_none_has_passed():
    service = Service()
    members = [Agreement(service, process, 3) for process in range(3)]
    for member, polls in zip(members, (2, 5, 3)):
        assert not any(member.reached() for _ in range(polls))
    members[0].announce()
    members[2].announce()  # two were asked
    for member in members:
        member._thread.join()
        assert member.announced
    assert [passed + stopped(member, 10) for member, passed in zip(members, (2, 5, 3))] == [6, 6, 6]
    for member in members:
        member.close()


def test_processes_that_are_done_end_their_agreement_without_a_stop():
    service = Service()
    members = [Agreement(service, process, 2) for process in range(2)]
    for member in members:
        member.close()
        assert not member.announced and not member.reached()


def test_a_process_of_several_learns_of_another_ones_request(monkeypatch):
    service = Service()
    one, other = (Agreement(service, process, 2) for process in range(2))
    monkeypatch.setattr(module, "agreement", one)
    with Preemption() as preemption:
        assert not requested()
        preemption.request()
        assert requested(), "this process was asked"
    monkeypatch.setattr(module, "agreement", other)
    other._thread.join()
    assert requested() and reached()
    with pytest.raises(Preempted):
        next(interruptible("abc", "letters", alone=True))


MEMBER = """
import sys, time, pathlib
from kd_jax.runtime import cluster, distributed
from kd_jax.runtime.preemption import Preemption, reached
flags = dict(one.removeprefix("--").split("=") for one in sys.argv[2:])
place = cluster.from_flags(flags["coordinator"], int(flags["processes"]), int(flags["process"]))
with distributed.joined(place, lambda error: (1, repr(error))), Preemption():
    step = 0
    while not reached():
        step += 1
        time.sleep(0.01 * (1 + place.process))
        if step == 1:
            (pathlib.Path(sys.argv[1]) / f"ready-{place.process}").touch()
    print(step, flush=True)
"""


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    from tests.support.several_processes import ended, start

    processes = start(2, ["-c", MEMBER, str(tmp_path)])
    end = time.monotonic() + 100
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    processes[1].send_signal(signal.SIGTERM)
    (one, steps, errors), (other, same, _) = ended(processes)
    assert (one, other) == (0, 0), errors
    assert steps == same and int(steps) > 10
