import subprocess
import sys
import time

from kd_jax.runtime import watchdog
from kd_jax.runtime.watchdog import Watchdog, alive


def wait_for(file, text, seconds=20.0):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if file.exists() and text in file.read_text():
            return file.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{file} never held {text!r}")


def test_a_stall_is_reported_with_process_step_and_stacks(tmp_path, capfd):
    def a_function_that_hangs():
        return wait_for(tmp_path / "stalled-0.txt", "a_function_that_hangs")

    with Watchdog(0.2, tmp_path):
        alive("step 7")
        text = a_function_that_hangs()
        alive("step 8")
    first = text.splitlines()[0]
    assert first.startswith("process 0 of 1: step 7 has taken 0 s, more than config.watchdog_seconds = 0.2; the stacks")
    assert "most recent call first" in text
    errors = capfd.readouterr().err
    assert first in errors and "a_function_that_hangs" in errors
    assert "step 7 went on after " in errors


def test_each_stall_is_reported_once_and_signs_of_life_prevent_it(tmp_path):
    file = tmp_path / "stalled-0.txt"
    with Watchdog(0.3, tmp_path):
        for step in range(10):
            alive(f"step {step}")
            time.sleep(0.05)
        assert not file.exists()
        wait_for(file, "step 9")
        time.sleep(0.5)
        alive("step 10")
        wait_for(file, "step 10")
    assert file.read_text().count("has taken") == 2


def test_outside_of_one_and_at_zero_nothing_is_watched(tmp_path):
    alive("nothing")
    with Watchdog(0.0, tmp_path):
        alive("step 1")
        time.sleep(0.2)
    with Watchdog(0.1, tmp_path):
        pass
    time.sleep(0.3)
    assert not list(tmp_path.iterdir())


def test_it_may_end_the_process_with_the_code_for_another_start(tmp_path):
    program = f"""
import time
from kd_jax.runtime import watchdog
from kd_jax.runtime.watchdog import Watchdog
with Watchdog(0.2, {str(tmp_path)!r}, exits=True):
    time.sleep(60)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50)
    assert ended.returncode == 75
    assert "process 0 of 1: the start has taken" in ended.stderr


class Pauses:
    """Stand-in for the watchdog's event: each wait advances the clock by the next number of seconds."""

    def __init__(self, monkeypatch, seconds):
        self._now, self._seconds = 0.0, iter(seconds)
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: self._now)

    def wait(self, _):
        pause = next(self._seconds, None)
        self._now += pause or 0.0
        return pause is None


def test_the_time_in_which_the_process_was_stopped_does_not_count(tmp_path, monkeypatch):
    file = tmp_path / "stalled-0.txt"
    for seconds, stalls in (((5, 120, 5, 5), False), ((5, 5, 5, 5, 5), True), ((5, 120, 5, 5, 5, 5), True)):
        one = Watchdog(20.0, tmp_path, exits=False)
        with monkeypatch.context() as patch:
            patch.setattr(one, "_stop", Pauses(patch, seconds))
            one._doing, one._since, one._reported = "the start", 0.0, False
            one._watch()
        assert file.exists() == stalls, seconds
        file.unlink(missing_ok=True)
