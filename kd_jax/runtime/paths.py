"""Where files lie: on a local path, or on gs:// and s3:// through etils' epath, which has pathlib's methods.

A remote store has no folders and no renames, but a file appears under its name whole or not at all: what is written
here is written in one put.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any, cast

from kd_jax.types import UserError

# The package that fsspec needs to reach a store, and the name that epath asks it for.
BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}

# A growing file is put again after so many seconds at the earliest; stores refuse more than about one put a second.
_SECONDS_BETWEEN_PUTS = 10.0


def place(name: str | os.PathLike) -> pathlib.Path:
    """The path of a name: pathlib's for a local one, epath's for gs://bucket/key and s3://bucket/key.

    Raises UserError for another scheme, for a name without a bucket, and when the store's package is not installed.
    """
    if isinstance(name, pathlib.PurePath):
        return cast(pathlib.Path, name)
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return pathlib.Path(text)
    if scheme not in BACKENDS:
        raise UserError(f"{text}: {scheme}:// is no known kind of storage; use a local path, gs:// or s3://")
    if not rest.strip("/"):
        raise UserError(f"{text}: names no bucket; write {scheme}://BUCKET/FOLDER")
    # Without this, epath would import TensorFlow where it is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec
    from etils import epath
    from fsspec.config import conf as fsspec_defaults

    package, known_as = BACKENDS[scheme]
    # Several hosts write below one folder: a listing that was true a while ago is no answer.
    fsspec_defaults.setdefault(known_as, {}).setdefault("use_listings_cache", False)
    try:
        fsspec.get_filesystem_class(known_as)
    except ImportError:
        raise UserError(f"{text}: {scheme}:// needs the package {package}; run pip install {package}") from None
    return cast(pathlib.Path, epath.Path(text))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a name or path lies on a remote store."""
    return "://" in os.fspath(path)


def need_local(path: str | os.PathLike, what: str) -> None:
    """Raises UserError for a remote place of something that is written or read by a library that knows none."""
    if is_remote(path):
        raise UserError(f"{os.fspath(path)}: {what} lies on a local path; give one, and copy it from or to the store")


def scheme_of(path: str | os.PathLike) -> str:
    """ "gs" or "s3"; "" for a local path."""
    return os.fspath(path).partition("://")[0] if is_remote(path) else ""


@contextlib.contextmanager
def reaching(path: str | os.PathLike) -> Iterator[None]:
    """Makes one sentence of what a remote store or its library raises in the block, which does nothing but read or
    write below `path`. A missing file stays a FileNotFoundError; for a local path nothing changes.
    """
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except Exception as error:
        if not is_remote(path) or type(error).__module__.startswith("kd_jax."):  # a preemption, for one
            raise
        raise unreachable(path, error) from error


def unreachable(path: str | os.PathLike, error: Exception) -> UserError:
    """What to tell the user when a remote store refuses or does not answer."""
    reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
    return UserError(
        f"{os.fspath(path)}: the store cannot be reached or refuses ({type(error).__name__}: {reason}); check the "
        "bucket's name, the credentials and the network (docs/storage.md)"
    )


def make_folder(path: pathlib.Path) -> None:
    """Makes a local folder with its parents; on a remote store there is nothing to make."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """Replaces a file so that a reader finds the old content or the new, never a part.

    A local one is written under another name, made safe on the disk, and renamed. Raises OSError for a local path and
    UserError for a remote one.
    """
    if is_remote(path):
        try:
            with reaching(path):
                path.write_bytes(data)
        except FileNotFoundError as error:  # a bucket that is not there
            raise unreachable(path, error) from error
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> Any:
    """The value that a JSON file holds; FileNotFoundError where there is none, UserError for an unreachable store."""
    with reaching(path):
        text = path.read_text(encoding="utf-8")
    return json.loads(text)


def names_in(folder: pathlib.Path) -> list[str]:
    """The sorted names in a folder, [] where it does not exist; one request on a remote store."""
    try:
        with reaching(folder):
            return sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return []


def digest(values: Any) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class GrowingFile:
    """A text file that lines are appended to: a local one is flushed at once, a remote one is put whole again.

    The puts are made by a thread of their own, every ten seconds at the most, and by `sync` and `close`. One that fails
    is tried again with the next; `sync` and `close` raise UserError.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file = None if is_remote(path) else open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self._lines: list[str] = []
        self._written = 0  # lines that are in the store
        self._changed, self._closed = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        if self._file is None:
            with contextlib.suppress(FileNotFoundError), reaching(path):
                self._lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            self._written = len(self._lines)
            threading.Thread(target=self._put_now_and_then, name="growing file", daemon=True).start()

    def write(self, line: str) -> None:
        """Appends a line, which ends in a newline."""
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        else:
            self._lines.append(line)
            self._changed.set()

    def sync(self) -> None:
        """Returns when every line so far is in the store."""
        if self._file is None:
            self._put()

    def close(self) -> None:
        """`sync`, and the end."""
        self._closed.set()
        self._changed.set()
        if self._file is not None:
            self._file.close()
        else:
            self._put()

    def _put(self) -> None:
        with self._lock:
            count = len(self._lines)
            if count > self._written:
                write_whole(self._path, "".join(self._lines[:count]).encode())
                self._written = count

    def _put_now_and_then(self) -> None:
        while self._changed.wait() and not self._closed.is_set():
            self._changed.clear()
            with contextlib.suppress(UserError):
                self._put()
            self._closed.wait(_SECONDS_BETWEEN_PUTS)
