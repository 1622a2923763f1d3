"""Paths on gs:// and s3://, and files that are written whole."""

import pathlib

import fsspec
import pytest

from kd_jax.runtime import paths as places
from kd_jax.runtime.paths import GrowingFile, is_remote, names_in, place, reaching, read_json, write_whole
from kd_jax.types import UserError
from tests.support import fake_store


def test_a_local_name_is_a_plain_path_and_a_path_stays_what_it_is(tmp_path):
    assert place("runs/a") == pathlib.Path("runs/a") and not is_remote(place("runs/a"))
    assert place(tmp_path) is tmp_path


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_remote_path_has_the_methods_of_a_path(tmp_path, scheme):
    fake_store.install(tmp_path)
    run = place(f"{scheme}://bucket/runs") / "a"
    assert str(run) == f"{scheme}://bucket/runs/a" and is_remote(run) and place(run) is run
    assert run.name == "a" and str(run.parent) == f"{scheme}://bucket/runs"
    assert names_in(run) == [] and not (run / "DONE").is_file()
    write_whole(run / "stages/one.json", b'{"a": 1}')
    write_whole(run / "DONE", b"{}")
    assert names_in(run) == ["DONE", "stages"]
    assert (run / "DONE").is_file() and (run / "stages").is_dir()
    assert read_json(run / "stages/one.json") == {"a": 1}
    assert (tmp_path / "buckets/bucket/runs/a/DONE").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError):
        read_json(run / "none.json")


def test_what_cannot_be_a_place_is_told_in_one_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"^ftp://a/b: ftp:// is no known kind .* use a local path, gs:// or s3://"):
        place("ftp://a/b")
    with pytest.raises(UserError, match=r"^gs://: names no bucket; write gs://BUCKET/FOLDER"):
        place("gs://")

    def missing(name):
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for scheme, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        with pytest.raises(UserError, match=rf"needs the package {package}; run pip install {package}"):
            place(f"{scheme}://bucket/a")


def test_an_unreachable_store_is_one_sentence_and_a_missing_file_stays_one(tmp_path):
    fake_store.install(tmp_path)
    remote = place("gs://bucket/a")
    with (
        pytest.raises(UserError, match=r"^gs://bucket/a: .* \(ConnectionError: no route\); check the bucket's name"),
        reaching(remote),
    ):
        raise ConnectionError("no route\nmore lines")
    for where, error in ((remote, FileNotFoundError("a")), (remote, UserError("mine")), (tmp_path, OSError("mine"))):
        with pytest.raises(type(error)) as caught, reaching(where):
            raise error
        assert caught.value is error


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_whole(file, b"old")

    def fails(*_):
        raise OSError("disk")

    monkeypatch.setattr(places.os, "fsync", fails)
    with pytest.raises(OSError, match="disk"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("where", ["local", "gs://bucket/run"])
def test_a_growing_file_goes_on_and_holds_every_line_after_sync_and_close(tmp_path, where):
    fake_store.install(tmp_path)
    folder = place(str(tmp_path) if where == "local" else where)
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
    file = place("s3://bucket/run/metrics.jsonl")
    growing = GrowingFile(file)
    write = places.write_whole

    def refuses(path, data):
        raise UserError("refused")

    monkeypatch.setattr(places, "write_whole", refuses)
    growing.write("1\n")
    with pytest.raises(UserError, match="refused"):
        growing.sync()
    monkeypatch.setattr(places, "write_whole", write)
    growing.write("2\n")
    growing.close()
    assert file.read_text(encoding="utf-8") == "1\n2\n"
