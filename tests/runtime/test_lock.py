"""Ownership of a folder: a second owner is refused with the first one's name, and a kill releases the lock."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from kd_jax.runtime.files import write_atomically
from kd_jax.runtime.lock import owned, tidy
from kd_jax.types import UserError

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import pathlib, sys, time
from kd_jax.runtime.lock import owned
with owned(pathlib.Path(sys.argv[1])):
    print("inside", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that owns tmp_path/run."""
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "inside\n"
        yield process
        process.kill()


def test_a_second_owner_is_refused_with_the_name_of_the_first(tmp_path, other):
    told = rf"^{re.escape(str(tmp_path / 'run'))}: process {other.pid} on \S+ has been writing here for 0 minutes; wait"
    with pytest.raises(UserError, match=told), owned(tmp_path / "run"):
        pytest.fail("two owners")
    with owned(tmp_path / "run", "-1"), owned(tmp_path / "run", "-2"):  # each part of a cache has its own owner
        assert sorted(os.listdir(tmp_path / "run")) == [".owner", ".owner-1", ".owner-2"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_an_end_of_the_owner_releases_the_folder(tmp_path, other, how):
    other.send_signal(how)
    other.wait()
    with owned(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_an_error_releases_the_folder_and_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "run"):
        _ = 1 / 0
    with owned(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path / "run") == []


def test_a_lock_whose_file_was_removed_protects_nothing(tmp_path, monkeypatch):
    """The previous owner removes its file between our open and our lock: then we must lock the new file."""
    from kd_jax.runtime import lock

    opened = []
    take = lock.take

    def slow(descriptor):
        opened.append(descriptor)
        if len(opened) == 1:
            (tmp_path / ".owner").unlink()
        return take(descriptor)

    monkeypatch.setattr(lock, "take", slow)
    with owned(tmp_path):
        assert len(opened) == 2 and (tmp_path / ".owner").exists()


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: cannot be written \(.*\); "), owned(tmp_path / "file"):
        pytest.fail("no folder")


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path, other, monkeypatch):
    left, kept = tmp_path / "run/deep/.report.md.4711.tmp", tmp_path / "run/report.tmp"
    left.parent.mkdir()
    for file in (left, kept, tmp_path / "run/.owner-3"):
        file.write_text("half")
    replace = os.replace

    def watched(source, target):
        tidy(tmp_path / "run")
        assert source.exists()  # it is locked while it is written
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_atomically(tmp_path / "run/file", b"whole")
    assert sorted(os.listdir(tmp_path / "run")) == [".owner", "deep", "file", "report.tmp"]
    assert not left.exists() and (tmp_path / "run/file").read_bytes() == b"whole"
    other.kill()
    other.wait()
    tidy(tmp_path / "run")
    assert not (tmp_path / "run/.owner").exists()
