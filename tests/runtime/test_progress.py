import io
import sys

import pytest

from kd_jax.runtime import progress
from kd_jax.runtime.progress import Count, Progress, counted

RATES = {"tokens_per_second": 12_300.0, "padded_tokens_per_second": 1.5e6, "useful_share": 0.971}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_with_loss_rates_and_time_left(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("distill", 0, 10, ["table"]) as bar:
        for step in range(1, 6):
            bar.update(step, 2.5, RATES)
        bar.note("evaluating")
        shown = terminal.getvalue()
    assert shown.startswith("table\n")
    assert "distill" in shown and "5/10" in shown and "evaluating" in shown
    assert "<" in shown  # tqdm's elapsed<remaining


def test_a_log_file_sees_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress("distill", 10, 40) as bar:
        bar.update(11, 3.0, {})
        now[0] += 31
        bar.update(20, 2.5, RATES)
        bar.update(21, 2.5, RATES)
    line = "distill: step 20/40, loss 2.5000, 12.3k tok/s (1.5M padded, 97% useful), 69 s left\n"
    assert capsys.readouterr().err == line  # 9 steps in 31 s since the first, which compiled, and 20 to go


def test_nothing_is_shown_when_progress_is_off(capsys):
    with Progress("distill", 0, 10, ["table"], shown=False) as bar:
        bar.update(1, 1.0, RATES)
        bar.note("evaluating")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "text"), [(0.5, "0.5"), (999, "999"), (12_300, "12.3k"), (2.5e6, "2.5M"), (3e9, "3.0G")]
)
def test_numbers_are_short(number, text):
    assert progress._short(number) == text


def test_a_count_shows_a_line_now_and_then(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Count("cache", "rows", 100) as count:
        count.update(10)
        now[0] += 40
        count.update(10)
        count.update(10)
    with Count("prepare", "texts") as count:
        now[0] += 31
        count.update(62_000)
    assert capsys.readouterr().err == (
        "cache: 20 of 100 rows, 0.5 a second, 160 s left\nprepare: 62,000 texts, 2.0k a second\n"
    )


def test_a_count_is_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Count("evaluate test", "utterances", 100) as count:
        count.update(50)
        shown = terminal.getvalue()
    assert "evaluate test" in shown and "0/100" in shown


def test_counted_gives_the_things_and_shows_their_number(monkeypatch, capsys):
    assert list(counted(range(1000), "prepare", unit="texts", shown=False)) == list(range(1000))
    assert capsys.readouterr().err == ""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    for number in counted(range(600), "prepare", unit="texts"):
        now[0] += number == 300 and 32
    assert capsys.readouterr().err == "prepare: 512 texts, 16 a second\n"


def test_a_line_of_its_own_is_said_without_progress_too(capsys):
    with Progress("distill", 0, 10, shown=False) as bar:
        bar.say("step 3 was skipped")
    assert capsys.readouterr().err == "step 3 was skipped\n"
