"""Copies of remote files on a host: whole, checked, fetched once, whoever is killed."""

import collections
import json
import pathlib
import signal
import subprocess
import sys

import pytest

from kd_jax.runtime import copies
from kd_jax.runtime.copies import LocalCopy, describe, fetch, on_this_host, outgoing, put, sha256_of, verify
from kd_jax.runtime.files import write_atomically
from kd_jax.runtime.paths import as_path
from kd_jax.types import UserError
from tests.support import fake_store

CONTENT = {f"rows/{number}.npy": bytes([number]) * (100 + number) for number in range(6)}
NAME = "gs://bucket/prepared"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """(what was read, remote folder, manifest) of a folder on the store; copies go to tmp_path/local."""
    read = fake_store.install(tmp_path)
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "local"))
    remote = as_path(NAME)
    for name, data in CONTENT.items():
        write_atomically(remote / name, data)
    manifest = {"files": describe(tmp_path / "buckets/bucket/prepared", CONTENT)}
    write_atomically(remote / "manifest.json", json.dumps(manifest).encode())
    return read, remote, manifest


def names_below(folder: pathlib.Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.name.endswith(".lock")}


def test_files_are_fetched_when_asked_for_and_only_once(store):
    read, remote, manifest = store
    copy = LocalCopy(remote, manifest, background=False)
    assert read == []
    assert copy.file("rows/3.npy").read_bytes() == CONTENT["rows/3.npy"]
    assert read == ["bucket/prepared/rows/3.npy"]
    assert copy.part("rows") == copy.folder / "rows"
    assert sorted(read) == sorted(f"bucket/prepared/{name}" for name in CONTENT)
    again = LocalCopy(as_path(NAME), manifest)
    again.part()
    assert len(read) == len(CONTENT) and names_below(again.folder) == {"rows", *CONTENT}


def test_the_background_fetches_what_nobody_asked_for(store):
    read, remote, manifest = store
    copy = LocalCopy(remote, manifest)
    for thread in copies.threading.enumerate():
        if thread.name.startswith("fetch-"):
            thread.join()
    assert len(read) == len(CONTENT) and names_below(copy.folder) == {"rows", *CONTENT}


def test_other_content_at_the_same_address_is_another_copy(store):
    _, remote, manifest = store
    old = LocalCopy(remote, manifest, background=False).file("rows/0.npy")
    write_atomically(remote / "rows/0.npy", b"new")
    newer = {"files": manifest["files"] | describe(remote_folder(old, "prepared"), ["rows/0.npy"])}
    assert LocalCopy(remote, newer, background=False).file("rows/0.npy").read_bytes() == b"new"
    assert old.read_bytes() == CONTENT["rows/0.npy"]


def remote_folder(copied: pathlib.Path, name: str) -> pathlib.Path:
    return copied.parents[4] / "buckets/bucket" / name


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:]])
def test_a_damaged_file_is_refused_by_name_and_leaves_nothing(store, damage):
    _, remote, manifest = store
    write_atomically(remote / "rows/2.npy", damage(CONTENT["rows/2.npy"]))
    copy = LocalCopy(remote, manifest)
    with pytest.raises(UserError, match=rf"^{NAME}/rows/2\.npy: is damaged: .* upload the folder again"):
        copy.part()
    for thread in copies.threading.enumerate():
        if thread.name.startswith("fetch-"):
            thread.join()
    assert "rows/2.npy" not in names_below(copy.folder)
    assert not [name for name in names_below(copy.folder) if "partial" in name]
    write_atomically(remote / "rows/2.npy", CONTENT["rows/2.npy"])
    assert copy.file("rows/2.npy").read_bytes() == CONTENT["rows/2.npy"]


def test_a_missing_file_and_one_that_the_manifest_does_not_name(store, tmp_path):
    _, remote, manifest = store
    (tmp_path / "buckets/bucket/prepared/rows/1.npy").unlink()
    copy = LocalCopy(remote, manifest, background=False)
    with pytest.raises(UserError, match=rf"^{NAME}/rows/1\.npy: is missing, though the manifest names it"):
        copy.file("rows/1.npy")
    with pytest.raises(UserError, match=rf"^{NAME}/rows/9\.npy: its manifest names no such file"):
        copy.file("rows/9.npy")


def test_a_copy_of_another_size_is_fetched_again(store):
    _, remote, manifest = store
    file = LocalCopy(remote, manifest, background=False).file("rows/4.npy")
    file.write_bytes(b"cut")
    assert LocalCopy(remote, manifest, background=False).file("rows/4.npy").read_bytes() == CONTENT["rows/4.npy"]


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "rows/../../outside", ""])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(store, name):
    _, remote, manifest = store
    with pytest.raises(UserError, match="lies outside the folder"):
        LocalCopy(remote, {"files": {name: manifest["files"]["rows/0.npy"]}})


def test_a_full_disk_leaves_no_part(store, tmp_path, monkeypatch):
    _, remote, manifest = store

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies.os, "fsync", full)
    target = tmp_path / "local/file"
    with pytest.raises(UserError, match=r"the disk is full .* config\.storage\.local"):
        fetch(remote / "rows/0.npy", target, manifest["files"]["rows/0.npy"])
    assert names_below(tmp_path / "local") == set()


def member(tmp_path, *kill):
    command = [sys.executable, "tests/support/store_member.py", str(tmp_path), str(tmp_path / "local"), NAME, *kill]
    environment = {**copies.os.environ, "PYTHONPATH": "."}
    root = pathlib.Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_of_one_host_fetch_each_file_once_together(store, tmp_path):
    (tmp_path / "local").mkdir()
    members = [member(tmp_path) for _ in range(2)]
    while len(list((tmp_path / "local").glob("ready-*"))) < 2:
        assert all(one.poll() is None for one in members)
        copies.threading.Event().wait(0.01)
    (tmp_path / "local/go").touch()
    read = collections.Counter(name for one in members for name in json.loads(one.communicate(timeout=60)[0]))
    assert [one.returncode for one in members] == [0, 0]
    assert read == dict.fromkeys((f"bucket/prepared/{name}" for name in CONTENT), 1)


def test_a_killed_fetch_leaves_no_file_and_its_successor_starts_cleanly(store, tmp_path):
    _, remote, manifest = store
    (tmp_path / "local").mkdir()
    (tmp_path / "local/go").touch()
    killed = member(tmp_path, "2.npy.partial")
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    copy = LocalCopy(remote, manifest, background=False)
    assert not (copy.folder / "rows/2.npy").exists() and (copy.folder / "rows/.2.npy.partial").exists()
    copy.part()
    assert names_below(copy.folder) == {"rows", *CONTENT}
    assert {name: (copy.folder / name).read_bytes() for name in CONTENT} == CONTENT


def test_what_is_put_can_be_fetched(store):
    home = outgoing(as_path("s3://bucket/new"))
    for name, data in CONTENT.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(data)
    files = describe(home, CONTENT)
    put(home, as_path("s3://bucket/new"), files)
    copy = LocalCopy(as_path("s3://bucket/new"), {"files": files, "about": "new"})
    assert {name: copy.file(name).read_bytes() for name in CONTENT} == CONTENT


def test_the_folder_of_this_host(tmp_path, monkeypatch):
    monkeypatch.setattr(copies, "_chosen_root", "")
    monkeypatch.delenv("KD_JAX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fake_store.install(tmp_path)
    assert copies.local_root() == tmp_path / "kd_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert copies.local_root() == pathlib.Path.home() / ".cache/kd_jax"
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "set"))
    assert copies.local_root() == tmp_path / "set"
    monkeypatch.setattr(copies, "_chosen_root", str(tmp_path / "chosen"))
    assert on_this_host(as_path("gs://bucket/a")).parent == tmp_path / "chosen/outgoing"
    assert on_this_host(tmp_path) == tmp_path
    assert outgoing(as_path("gs://bucket/a")) != outgoing(as_path("gs://bucket/b"))


def test_local_files_are_verified_once_and_again_when_they_change(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(copies, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"def")
    files = describe(tmp_path, ("a", "b"))
    read.clear()
    verify(tmp_path, files, "write it again")
    verify(tmp_path, files, "write it again")
    assert sorted(read) == ["a", "b"]
    (tmp_path / "b").unlink()
    (tmp_path / "b").write_bytes(b"deg")
    with pytest.raises(UserError, match=r"b: was changed or damaged .*; write it again"):
        verify(tmp_path, files, "write it again")
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=r"b: cannot be read \(No such file"):
        verify(tmp_path, files, "write it again")
