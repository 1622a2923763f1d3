"""Paths on gs:// and s3://, and files that are written whole."""

import pathlib

import fsspec
import pytest

from kd_jax.runtime.files import read_json, write_atomically
from kd_jax.runtime.paths import as_path, file_name, is_remote, name_of_file, names_in, reaching
from kd_jax.types import UserError
from tests.support import fake_store


def test_a_local_name_is_a_plain_path_and_a_path_stays_what_it_is(tmp_path):
    assert as_path("runs/a") == pathlib.Path("runs/a") and not is_remote(as_path("runs/a"))
    assert as_path(tmp_path) is tmp_path


@pytest.mark.parametrize(
    "name", ["alarm/timer", "..", ".", ".hidden", "a%2Fb", "müsste", "a b", "x\ny\0", "a\\b", "plain"]
)
def test_a_name_from_the_data_stays_in_its_folder(tmp_path, name):
    escaped = file_name(name)
    assert (tmp_path / escaped).parent == tmp_path and name_of_file(escaped) == name
    (tmp_path / escaped).mkdir()
    assert [entry.name for entry in tmp_path.iterdir()] == [escaped] and not escaped.startswith(".")


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_remote_path_has_the_methods_of_a_path(tmp_path, scheme):
    fake_store.install(tmp_path)
    run = as_path(f"{scheme}://bucket/runs") / "a"
    assert str(run) == f"{scheme}://bucket/runs/a" and is_remote(run) and as_path(run) is run
    assert run.name == "a" and str(run.parent) == f"{scheme}://bucket/runs"
    assert names_in(run) == [] and not (run / "DONE").is_file()
    write_atomically(run / "stages/one.json", b'{"a": 1}')
    write_atomically(run / "DONE", b"{}")
    assert names_in(run) == ["DONE", "stages"]
    assert (run / "DONE").is_file() and (run / "stages").is_dir()
    assert read_json(run / "stages/one.json") == {"a": 1}
    assert (tmp_path / "buckets/bucket/runs/a/DONE").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError):
        read_json(run / "none.json")


def test_what_cannot_be_a_place_is_told_in_one_sentence(monkeypatch):
    with pytest.raises(UserError, match=r"^ftp://a/b: ftp:// is not a known kind .* use a local path, gs:// or s3://"):
        as_path("ftp://a/b")
    with pytest.raises(UserError, match=r"^gs://: names no bucket; write gs://BUCKET/FOLDER"):
        as_path("gs://")

    def missing(name):
        raise ImportError("Please install it")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for scheme, package in (("gs", "gcsfs"), ("s3", "s3fs")):
        with pytest.raises(UserError, match=rf"needs the package {package}; run pip install {package}"):
            as_path(f"{scheme}://bucket/a")


def test_an_unreachable_store_is_one_sentence_and_a_missing_file_stays_one(tmp_path):
    fake_store.install(tmp_path)
    remote = as_path("gs://bucket/a")
    with (
        pytest.raises(UserError, match=r"^gs://bucket/a: .* \(ConnectionError: no route\); check the bucket's name"),
        reaching(remote),
    ):
        raise ConnectionError("no route\nmore lines")
    for where, error in ((remote, FileNotFoundError("a")), (remote, UserError("mine")), (tmp_path, OSError("mine"))):
        with pytest.raises(type(error)) as caught, reaching(where):
            raise error
        assert caught.value is error
