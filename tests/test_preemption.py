import os
import signal
import subprocess
import sys
import threading

from kd_jax.trainer.preemption import EXIT_CODE, Preemption


def test_a_first_sigterm_sets_the_flag_and_the_handler_goes_back():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert not preemption.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested()
    assert signal.getsignal(signal.SIGTERM) is before
    assert EXIT_CODE == 75


def test_a_second_sigterm_ends_the_process_at_once():
    program = """
import os, signal
from kd_jax.trainer.preemption import Preemption
preemption = Preemption()
os.kill(os.getpid(), signal.SIGTERM)
print("alive", preemption.requested(), flush=True)
os.kill(os.getpid(), signal.SIGTERM)
print("still alive", flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.stdout == "alive True\n"
    assert ended.returncode == -signal.SIGTERM


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
