import errno
import os

import pytest

from kd_jax.runtime import files
from kd_jax.runtime.files import GrowingFile, full_disk_is_user_error, write_atomically, write_json
from kd_jax.runtime.paths import as_path
from kd_jax.types import UserError
from tests.support import fake_store


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        ValueError("INTERNAL: Error writing local file: no space left on device"),
    ],
)
def test_a_full_disk_is_one_sentence_with_the_place(error):
    with pytest.raises(UserError, match=r"^/runs/a: the disk is full .*start the same command again"):  # noqa: SIM117
        with full_disk_is_user_error("/runs/a"):
            raise error


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("shape"), UserError("mine")])
def test_other_errors_pass_through(error):
    with pytest.raises(type(error)) as caught, full_disk_is_user_error("/runs/a"):
        raise error
    assert caught.value is error


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "dev.json"
    write_json(path, {"score": 0.5, "name": "größe"})
    assert path.read_text(encoding="utf-8") == '{\n  "score": 0.5,\n  "name": "größe"\n}\n'

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8").startswith("{")
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_refused_since_it_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomically(file, b"old")

    def fails(*_):
        raise OSError("disk")

    monkeypatch.setattr(files.os, "fsync", fails)
    with pytest.raises(UserError, match=r"a\.json: cannot be written \(disk\)"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["local", "gs://bucket/run"])
def test_a_growing_file_goes_on_and_holds_every_line_after_sync_and_close(tmp_path, where):
    fake_store.install(tmp_path)
    folder = as_path(str(tmp_path) if where == "local" else where)
    file = folder / "metrics.jsonl"
    for lines in (("1\n", "2\n"), ("3\n", "4\n")):
        growing = GrowingFile(file)
        growing.write(lines[0])
        growing.sync()
        assert file.read_text(encoding="utf-8").endswith(lines[0])
        growing.write(lines[1])
        growing.close()
    assert file.read_text(encoding="utf-8") == "1\n2\n3\n4\n"


def test_a_growing_file_on_a_store_that_fails_says_so_at_sync_and_goes_on(tmp_path, monkeypatch):
    fake_store.install(tmp_path)
    file = as_path("s3://bucket/run/metrics.jsonl")
    growing = GrowingFile(file)
    write = files.write_atomically

    def refuses(path, data):
        raise UserError("refused")

    monkeypatch.setattr(files, "write_atomically", refuses)
    growing.write("1\n")
    with pytest.raises(UserError, match="refused"):
        growing.sync()
    monkeypatch.setattr(files, "write_atomically", write)
    growing.write("2\n")
    growing.close()
    assert file.read_text(encoding="utf-8") == "1\n2\n"
