"""The output of a study while it runs, with a stand-in for its stages."""

import io
import json
import logging
import pathlib
import re
import sys

import pytest

from kd_jax.config import to_dict
from kd_jax.main import study
from kd_jax.study import overview
from kd_jax.study.run import Study
from kd_jax.study.timing import Timing
from kd_jax.types import UserError
from tests.support import pretrained

KEPT = []  # handlers that a stage made, as libraries do when they are first imported


def stage(name: str, values: dict, folder: pathlib.Path) -> None:
    """Prints a lot, and writes what `choose` and the next stages read."""
    print(f"details of {name}")
    print("more details", file=sys.stderr)
    if not KEPT:
        KEPT.append(logging.StreamHandler())
    KEPT[0].emit(logging.makeLogRecord({"msg": f"logged by {name}"}))
    folder.mkdir(parents=True)
    for file, content in (("DONE", {}), ("heldout.json", []), ("dev.json", {"score": 0.5})):
        (folder / file).write_text(json.dumps(content))


def toy(workdir, run_stage=stage) -> Study:
    config = pretrained.get_config()
    config.study.update({"seeds": (0,), "tasks": ("dc",), "name": "Toy"})
    return Study(to_dict(config), workdir, run_stage, study.KEYS)


def test_every_stage_prints_one_line_and_the_rest_goes_to_its_log(tmp_path, capsys):
    KEPT.clear()
    opened = toy(tmp_path)
    opened.run(lambda: overview.flops_of(opened), quiet=True)
    said = capsys.readouterr()
    count = len(opened.planned()) - 1
    lines = said.out.splitlines()
    assert said.err == "" and len(lines) == count
    for number, line in enumerate(lines, start=1):
        pattern = (
            rf"\[{number}/{count}\] \S+: \d+ s · (time left not known yet|(about|more than) \d+ s left|the report.*)"
        )
        assert re.fullmatch(pattern, line), line
    assert "not known" in lines[0] and lines[-1].endswith(" · the report is left")
    logs = list((tmp_path / "attempts").glob("*.log"))
    assert len(logs) == count
    (teacher,) = (tmp_path / "attempts").glob("pretrain-teacher-*.log")
    assert teacher.read_text() == "details of pretrain\nmore details\nlogged by pretrain\n"
    opened.run(quiet=True)
    assert capsys.readouterr().out == ""


def test_on_a_terminal_the_running_stage_is_shown_until_its_line_comes(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    toy(tmp_path).run(quiet=True)
    first, *others = terminal.getvalue().rstrip("\n").split("\n")  # not splitlines, which splits at \r too
    folder = next((tmp_path / "stages").glob("prepare-*")).name
    shown, ended = first.removeprefix("\r\033[K").split("\r\033[K")
    assert shown.endswith(f"prepare: running, see {tmp_path / 'attempts' / folder}.log")
    assert ended.startswith(shown.split(": running")[0]) and " s · " in ended
    assert all(line.count(": running, see") == 1 for line in others)


def test_without_quiet_a_stage_prints_to_the_terminal(tmp_path, capsys):
    KEPT.clear()
    toy(tmp_path).run()
    said = capsys.readouterr()
    assert "details of prepare\n[1/" in said.out and "more details" in said.err
    assert not list((tmp_path / "attempts").glob("*.log"))


def test_an_error_is_raised_and_its_log_is_named(tmp_path, capsys):
    def failing(name, values, folder):
        print("what led to it")
        raise UserError("no text")

    with pytest.raises(UserError, match="no text"):
        toy(tmp_path, failing).run(quiet=True)
    (log,) = (tmp_path / "attempts").glob("*.log")
    said = capsys.readouterr()
    assert re.fullmatch(rf"\[1/\d+\] prepare: not finished, see {re.escape(str(log))}\n", said.out) and said.err == ""
    assert log.read_text() == "what led to it\n"
    print("again here")
    assert capsys.readouterr().out == "again here\n"


def test_time_comes_from_the_same_kind_and_else_from_flops(tmp_path):
    opened = toy(tmp_path)
    stages = {stage.name: stage for stage in opened.planned()}
    flops = {one.folder: 100.0 for one in stages.values()}
    flops |= {stages["prepare"].folder: 0.0, stages["adapt-teacher"].folder: 50.0, stages["ngrams"].folder: 0.0}
    timing = Timing(flops)
    timing.note(stages["prepare"], 5)
    assert timing.expected(stages["pretrain-teacher"]) is None, "nothing that takes FLOPs has finished"
    assert timing.left([stages["pretrain-teacher"], stages["ngrams"]]) == "time left not known yet"
    timing.note(stages["distilled-task-generic-seed0"], 60, steps=20)
    assert timing.expected(stages["distilled-generic-generic-seed0"]) == 60
    timing.note(stages["distilled-mix50-generic-seed0"], 20, steps=50 / 3)
    timing.note(stages["distilled-mix50-generic-seed0"], 30, steps=25)
    assert timing.expected(stages["distilled-generic-generic-seed0"]) == 25, "the slowest also compiled"
    half = 50 / (100 / 25) + 10 / 3  # half the FLOPs at the lowest rate, plus the least time outside steps
    assert timing.expected(stages["adapt-teacher"]) == pytest.approx(half)
    assert timing.left([stages["adapt-teacher"]] * 12 + [stages["ngrams"]]) == "about 3 min left"
    assert timing.left([stages["ngrams"]]) == "about 1 s left"
    assert timing.left([]) == "the report is left"
    assert Timing().left([stages["ngrams"]]) == "time left not known yet"
