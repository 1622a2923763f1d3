"""Copies of remote files on this host: fetched once and checked against their checksums; and files put on a store.

    <local root>/copies/<digest of the manifest>/   files of one remote folder, each only once it is complete
    <local root>/outgoing/<digest of the address>/  files made here before they are put on a remote store

The manifest of a remote folder names its files, {name: {"bytes": int, "sha256": hex}}. A copy's folder is named by the
manifest and not by the address, so equal content is fetched once, and different content never mixes.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fsspec.core import url_to_fs

from kd_jax.runtime.files import full_disk_is_user_error
from kd_jax.runtime.paths import digest, is_remote, reaching
from kd_jax.types import UserError

Files = Mapping[str, Mapping[str, Any]]  # name, with / between folders -> {"bytes": size, "sha256": hex}

_STREAMS = 4  # files on their way at the same time

_chosen_root = ""


def keep_copies_in(folder: str) -> None:
    """Sets the local root for this process (config.storage.local); "" takes the user's cache folder."""
    global _chosen_root
    _chosen_root = folder


def local_root() -> pathlib.Path:
    """The folder on this host for copies: as set, or $KD_JAX_CACHE, or kd_jax in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := _chosen_root or os.environ.get("KD_JAX_CACHE", ""):
        return pathlib.Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (pathlib.Path(cache) if cache else pathlib.Path.home() / ".cache") / "kd_jax"


def outgoing(remote: pathlib.Path) -> pathlib.Path:
    """The local folder for files made here before they go to `remote`; the same address gives the same folder."""
    return local_root() / "outgoing" / digest(os.fspath(remote))[:24]


def on_this_host(path: pathlib.Path) -> pathlib.Path:
    """A local path as it is; for a remote one its `outgoing` folder."""
    return outgoing(path) if is_remote(path) else path


def describe(folder: pathlib.Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of files of a local folder, for a manifest."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in names}


_verified: dict[str, tuple[int, ...]] = {}  # path -> size, time and inode of the file whose checksum was right


def verify(folder: pathlib.Path, files: Files, remedy: str) -> None:
    """Raises UserError unless local files are as `describe` recorded them; each is read once per process."""

    def check(name: str) -> None:
        path = folder / name
        try:
            found = os.stat(path)
            state = (found.st_size, found.st_mtime_ns, found.st_ino)
            if _verified.get(os.fspath(path)) == state:
                return
            good = found.st_size == files[name]["bytes"] and sha256_of(path) == files[name]["sha256"]
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error}); {remedy}") from None
        if not good:
            raise UserError(f"{path}: was changed or damaged since it was written, its checksum differs; {remedy}")
        _verified[os.fspath(path)] = state

    with ThreadPoolExecutor(_STREAMS) as pool:  # hashing releases Python's lock
        list(pool.map(check, files))


def sha256_of(path: pathlib.Path) -> str:
    """SHA-256 (hex) of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(source: pathlib.Path, target: pathlib.Path, expected: Mapping[str, Any]) -> None:
    """Copies a remote file to a local path, where it appears only if its size and checksum are as expected.

    One of several processes or threads fetches, the others wait; the kernel frees the lock of a killed one. Raises
    UserError for a file that is missing, changed or unreachable, and for a full disk.
    """
    if _is_there(target, expected):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if _is_there(target, expected):
            return
        partial = target.with_name(f".{target.name}.partial")
        try:
            _copy_checked(source, partial, expected)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def _is_there(target: pathlib.Path, expected: Mapping[str, Any]) -> bool:
    try:
        return target.stat().st_size == expected["bytes"]
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _copy_checked(source: pathlib.Path, partial: pathlib.Path, expected: Mapping[str, Any]) -> None:
    try:
        # The disk's errors are caught inside, or a full disk would be taken for an unreachable store.
        with reaching(source), full_disk_is_user_error(partial, "or set config.storage.local to another disk"):
            store, name = url_to_fs(os.fspath(source))
            store.get_file(name, os.fspath(partial))
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
    except FileNotFoundError:
        raise UserError(f"{source}: is missing, though the manifest names it; upload the folder again") from None
    size, content = partial.stat().st_size, sha256_of(partial)
    if size != expected["bytes"] or content != expected["sha256"]:
        raise UserError(
            f"{source}: is damaged: {size} bytes with SHA-256 {content[:12]}, the manifest says "
            f"{expected['bytes']} and {expected['sha256'][:12]}; upload the folder again"
        )


def check_names(files: Files, where: object) -> None:
    """Raises UserError for a manifest whose names lead out of its folder."""
    for name in files:
        parts = pathlib.PurePosixPath(name).parts
        if not parts or parts[0] == "/" or ".." in parts:
            raise UserError(f"{where}: its manifest names {name!r}, which lies outside the folder; do not use it")


class LocalCopy:
    """The files of one remote folder on this host, each fetched when it is asked for, the others in the background.

    manifest: identifies the content; it has the key "files". A fetch that fails in the background is repeated, and its
    error raised, when the file is asked for.
    """

    def __init__(self, remote: pathlib.Path, manifest: Mapping[str, Any], background: bool = True):
        self._remote: pathlib.Path = remote
        self._files: Files = manifest["files"]
        check_names(self._files, remote)
        self.folder = copy_folder(manifest)
        self._waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
        if background and not all(_is_there(self.folder / name, entry) for name, entry in self._files.items()):
            for name in self._files:
                self._waiting.put(name)
            for number in range(min(_STREAMS, len(self._files))):
                # Daemon threads, not a pool: a finished command must not wait for files that it never needed.
                threading.Thread(target=self._fetch_waiting, name=f"fetch-{number}", daemon=True).start()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def file(self, name: str) -> pathlib.Path:
        """The local path of a file, once it is there; UserError as for `fetch`."""
        if name not in self._files:
            raise UserError(f"{self._remote / name}: its manifest names no such file; upload the folder again")
        fetch(self._remote / name, self.folder / name, self._files[name])
        return self.folder / name

    def part(self, prefix: str = "") -> pathlib.Path:
        """The local path of a folder of it ("" is all of it), once all its files are there."""
        names = [name for name in self._files if not prefix or name.startswith(f"{prefix}/")]
        with ThreadPoolExecutor(_STREAMS) as pool:
            list(pool.map(self.file, names))
        return self.folder / prefix

    def _fetch_waiting(self) -> None:
        with contextlib.suppress(queue.Empty, UserError, OSError):
            while True:
                self.file(self._waiting.get_nowait())


def copy_folder(manifest: Mapping[str, Any]) -> pathlib.Path:
    """The local folder for the files of a manifest."""
    return local_root() / "copies" / digest(manifest)[:24]


def put(folder: pathlib.Path, remote: pathlib.Path, names: Iterable[str]) -> None:
    """Puts files of a local folder on a remote store, several at a time; each appears whole or not at all."""

    def put_file(name: str) -> None:
        with reaching(remote):
            store, target = url_to_fs(os.fspath(remote / name))
            store.put_file(os.fspath(folder / name), target)

    with ThreadPoolExecutor(_STREAMS) as pool:
        list(pool.map(put_file, names))
