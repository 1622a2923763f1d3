import errno
import os

import pytest

from kd_jax.runtime import files
from kd_jax.runtime.files import (
    GrowingFile,
    full_disk_is_user_error,
    read_json,
    read_json_object,
    system_errors_are_user_errors,
    write_atomically,
    write_json,
    write_sealed,
)
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


def test_a_sealed_file_is_as_it_was_written_or_refused(tmp_path):
    path, other = tmp_path / "run.json", tmp_path / "config.json"
    values = {"steps": 10, "loss": 0.1 + 0.2, "sets": ["ä", None], "none": float("inf") > 0}
    write_sealed(path, values)
    assert read_json(path) == values
    text = path.read_text()
    for old, new in (("10", "11"), ("ä", "a"), ('"steps"', '"stebs"'), ("null", "0")):
        path.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=r"run\.json: was changed or damaged since it was written; restore it"):
            read_json(path)
    other.write_text(text)  # whole, but another file's
    with pytest.raises(UserError, match=r"config\.json: was changed"):
        read_json(other)
    write_json(path, values)  # as an older version wrote it
    assert read_json(path) == values


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1,}', b'{"a": "\xff"}', b"[" * 10_000])
def test_what_is_no_json_is_refused_by_name(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: broken JSON .*; write it again"):
        read_json(tmp_path / "a.json", "write it again")


def test_json_of_another_shape_is_refused_by_name(tmp_path):
    write_json(tmp_path / "a.json", [1])
    with pytest.raises(UserError, match=r"a\.json: is not a JSON object"):
        read_json_object(tmp_path / "a.json")
    write_json(tmp_path / "a.json", {"a": 1})
    found = read_json_object(tmp_path / "a.json")
    assert (found["a"], found.get("b"), {**found}) == (1, None, {"a": 1})
    with pytest.raises(UserError, match=r"a\.json: lacks 'b'"):
        _ = found["b"]
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match=r"folder\.json: cannot be read"):
        read_json(tmp_path / "folder.json")


def test_errors_of_the_system_name_the_file_and_bugs_pass(tmp_path):
    with (
        pytest.raises(UserError, match=r"nowhere: cannot be read or written \(No such file"),
        system_errors_are_user_errors(),
    ):
        (tmp_path / "nowhere").read_bytes()
    for error in (MemoryError("array of 10 TiB"), ValueError("RESOURCE_EXHAUSTED: Out of memory")):
        with pytest.raises(UserError, match="not enough memory"), system_errors_are_user_errors():
            raise error
    for bug in (KeyError("x"), ConnectionError("gone"), UserError("mine")):
        with pytest.raises(type(bug)) as caught, system_errors_are_user_errors():
            raise bug
        assert caught.value is bug


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
