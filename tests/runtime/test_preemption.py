import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from kd_jax.runtime import preemption as module
from kd_jax.runtime.preemption import EXIT_CODE, Preempted, Preemption, alone, poll, watching

ROOT = pathlib.Path(__file__).parents[2]
# Minutes in which the main thread runs no Python, as in a compilation, and other threads do.
BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_first_sigterm_raises_where_nothing_is_to_be_saved_and_the_handler_goes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        with pytest.raises(Preempted):
            terminate()
            time.sleep(5)
        assert preemption.requested()
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert not [one for one in threading.enumerate() if one.name == "preemption"]
    assert EXIT_CODE == 75


def test_deferred_leaves_it_to_the_work_and_ends_with_it():
    seen = []
    with Preemption() as preemption:
        with pytest.raises(Preempted), preemption.deferred():
            assert not preemption.reached()
            terminate()
            time.sleep(0.05)
            seen.append(preemption.reached())
        assert seen == [True]
        with pytest.raises(ValueError, match="mine"), preemption.deferred():
            raise ValueError("mine")  # not hidden behind the preemption


def test_no_exception_handler_on_the_way_swallows_it():
    assert not issubclass(Preempted, Exception)


def test_poll_asks_the_one_that_is_watching():
    poll()
    with Preemption() as preemption, watching() as inner:
        assert inner is preemption
        poll()
        preemption.request()
        with pytest.raises(Preempted):
            poll()
    poll()


def run(program, *signals_after_ready):
    """The return code and the output of a program that is sent signals, one by one, after its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import hashlib, os, signal, sys, time\n" + program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        for number in signals_after_ready:
            time.sleep(0.5)  # after its line the program goes into the library where it is to be found
            process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()  # a failed test leaves nothing running
    return process.returncode, first + output, errors


START = """
from kd_jax.runtime import preemption as module
module.GRACE_SECONDS = 0.5
"""


def test_a_second_sigterm_ends_the_process_at_once():
    code, output, _ = run(
        START
        + """
with module.Preemption() as preemption, preemption.deferred():
    os.kill(os.getpid(), signal.SIGTERM)
    print("alive", preemption.requested(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("still alive", flush=True)
"""
    )
    assert (code, output) == (-signal.SIGTERM, "alive True\n")


def test_a_second_sigterm_ends_a_process_that_is_inside_of_a_library_too():
    program = (
        f"with module.Preemption() as preemption, preemption.deferred():\n  print('ready', flush=True)\n  {BUSY}\n"
    )
    code, output, _ = run(START + program, signal.SIGTERM, signal.SIGTERM)
    assert (code, output) == (128 + signal.SIGTERM, "ready\n")


def test_a_process_inside_of_a_library_ends_by_itself_where_nothing_is_to_be_saved():
    program = f"with module.Preemption():\n  print('ready', flush=True)\n  {BUSY}\n"
    code, output, errors = run(START + program, signal.SIGTERM)
    assert (code, output) == (EXIT_CODE, "ready\n")
    assert errors == "preempted: there was nothing to save; the same command resumes the run\n"


def test_a_process_inside_of_a_library_is_waited_for_where_something_is_to_be_saved():
    program = """
with module.Preemption() as preemption:
    try:
        with preemption.deferred():
            print("ready", flush=True)
            started = time.monotonic()
            while not preemption.requested():
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6)
            while time.monotonic() - started < 2:
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**6)
            print("saved", flush=True)
    except module.Preempted:
        sys.exit(module.EXIT_CODE)
"""
    assert run(START + program, signal.SIGTERM)[:2] == (EXIT_CODE, "ready\nsaved\n")


def test_a_forked_child_is_ended_by_sigterm_without_a_word_to_its_parent():
    program = """
with module.Preemption() as preemption:
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(1)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(1.5)
    print(os.waitstatus_to_exitcode(status), preemption.requested(), flush=True)
"""
    assert run(START + program)[:2] == (0, f"{-signal.SIGTERM} False\n")


def test_outside_the_main_thread_only_request_sets_it():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with Preemption() as preemption:
            preemption.request()
            seen.append(preemption.requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [True]
    assert signal.getsignal(signal.SIGTERM) is before


def test_several_processes_ask_the_service_and_one_alone_itself(monkeypatch):
    """The service answers by the number of the call, which is the same in all processes."""
    asked = []

    def service(place):
        asked.append(place)
        return len(asked) == 3

    monkeypatch.setattr(module.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(module.jax, "process_count", lambda: 2)
    monkeypatch.setattr(module.multihost_utils, "reached_preemption_sync_point", service)
    monkeypatch.setattr(module, "_foreign_handler", lambda: None)
    with Preemption() as preemption:
        terminate()
        time.sleep(0.05)  # not raised: the others know nothing of it yet
        with alone():
            assert preemption.reached()
        assert [preemption.reached() for _ in range(4)] == [False, False, True, True]
    assert asked == list(range(asked[0], asked[0] + 3))
    with Preemption(), alone(), pytest.raises(Preempted):
        terminate()
        time.sleep(5)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    program = """
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
port, process = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(f"localhost:{port}", 2, process)
jax.devices()
with module.Preemption() as preemption:
    step = 0
    while not preemption.reached():
        step += 1
        time.sleep(0.01 * (1 + process))
        if step == 1:
            print("ready", flush=True)
    print(step, preemption.requested(), flush=True)
"""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "import os, signal, sys, time\n" + START + program, str(port), str(number)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        processes[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=60)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0][0] == outputs[1][0] and int(outputs[0][0]) > 10
    assert [requested for _, requested in outputs] == ["False", "True"]
