"""Where files lie: on a local path, or on gs:// and s3:// through etils' epath, which has pathlib's methods.

A remote store has no folders and no renames, but a file appears under its name whole or not at all: what is written
here is written in one put.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, cast
from urllib.parse import unquote

from kd_jax.types import UserError

# The package that fsspec needs to reach a store, and the name that epath asks it for.
BACKENDS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}


def as_path(name: str | os.PathLike) -> pathlib.Path:
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
        raise UserError(f"{text}: {scheme}:// is not a known kind of storage; use a local path, gs:// or s3://")
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
def reaching(path: str | os.PathLike, *, missing_is_error: bool = False) -> Iterator[None]:
    """Turns whatever a remote store or its library raises in the block into a UserError; a local path changes nothing.

    The block must only read or write below `path`. A missing file stays a FileNotFoundError, unless missing_is_error:
    when writing, it means that the bucket does not exist.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path) or (isinstance(error, FileNotFoundError) and not missing_is_error):
            raise
        reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
        raise UserError(
            f"{os.fspath(path)}: the store cannot be reached or refuses ({type(error).__name__}: {reason}); check the "
            "bucket's name, the credentials and the network (docs/storage.md)"
        ) from error


def make_folder(path: pathlib.Path) -> None:
    """Creates a local folder and its parents, UserError when it cannot; a remote store has no folders to create."""
    if not is_remote(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another folder"
            ) from error


def is_there(path: pathlib.Path) -> bool:
    """Whether a file or folder exists. Raises UserError if its store cannot be reached."""
    with reaching(path):
        return path.exists()


def names_in(folder: pathlib.Path) -> list[str]:
    """The sorted names in a folder, [] where it does not exist; one request on a remote store."""
    try:
        with reaching(folder):
            return sorted(entry.name for entry in folder.iterdir())
    except FileNotFoundError:
        return []


def file_name(name: str) -> str:
    """A name from the data as a file name: what would leave the folder, or hide in it, is percent-encoded."""
    return re.sub(r"[/\\%\x00-\x1f\x7f]|^\.", lambda found: f"%{ord(found[0]):02X}", name)


def name_of_file(escaped: str) -> str:
    """The inverse of `file_name`."""
    return unquote(escaped)


def digest(values: Any) -> str:
    """SHA-256 (hex) of a JSON value."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
