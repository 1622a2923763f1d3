"""Reads of user files and of the hub that end in one clear sentence when something is wrong with them."""

import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from kd_jax.runtime.paths import reaching
from kd_jax.types import UserError

# What a reader does with a broken record: `raise_error`, or something that notes the error, and the next record is
# read.
Report = Callable[[UserError], None]


def raise_error(error: UserError) -> None:
    """The Report of readers that nobody asked to go on."""
    raise error from None


def fill_path(path: str, language: str = "", *, key: str = "path") -> str:
    """Fills {language}, ${VARIABLE} and a leading ~; UserError names an unset variable and the config `key`."""

    def variable(match: re.Match) -> str:
        value = os.environ.get(match[1], "")
        if not value:
            raise UserError(
                f"{key}: environment variable {match[1]} is not set, but the value is {path!r}; "
                f"export {match[1]}=FOLDER or write the folder in its place"
            )
        return value

    filled = re.sub(r"\$\{(\w+)\}", variable, path)
    return os.path.expanduser(filled.replace("{language}", language))


def find_files(path: str, suffixes: tuple[str, ...], *, key: str = "path") -> list[Path]:
    """What `path` means, sorted: the file, the folder's files with these suffixes (subfolders too), or the glob's."""
    if not path:
        raise UserError(f"{key}: is empty; name a file, a folder or a glob")
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.name.endswith(suffixes) and file.is_file())
        problem = f"the folder {path} holds no file that ends in {' or '.join(suffixes)}"
    else:
        found = sorted(file for name in glob.glob(path, recursive=True) if (file := Path(name)).is_file())
        problem = f"no file {path}"
    if not found:
        raise UserError(f"{key}: {problem}; check the path")
    return found


def decode_lines(lines: Iterable[bytes], name: str, report: Report = raise_error) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without its line end); for bytes that are not UTF-8 a UserError with `name:line`."""
    for number, raw in enumerate(lines, 1):
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            at = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
            report(UserError(f"{name}:{number}: {at} is not UTF-8; convert the file to UTF-8"))
            continue
        if number == 1:
            text = text.removeprefix("\ufeff")
        yield number, text.rstrip("\r\n")


def numbered_lines(path: Path, report: Report = raise_error) -> Iterator[tuple[int, str]]:
    """Streams the numbered lines of a UTF-8 file, decompressed when its name ends in .gz; raises UserError for the file
    as a whole, and gives `report` what is wrong with a line.
    """
    try:
        with reaching(path), path.open("rb") as file, unpacked(file, path.name) as lines:
            yield from decode_lines(lines, str(path), report)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: is not a whole gzip file ({error}); copy or download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path and its rights") from None


def unpacked(file: Any, name: str) -> Any:
    """An open binary file, decompressed when its name ends in .gz."""
    return gzip.open(file) if name.endswith(".gz") else file


def json_object(line: str, place: str) -> dict[str, Any]:
    """The JSON object on one line; anything else raises a UserError that begins with `place`."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        where = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{place}: broken JSON ({where}); write one JSON object on the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: holds a JSON {type(record).__name__}; write one JSON object on the line")
    return record


def load_hub(name: str, subset: str | None = None, **options: Any) -> Any:
    """`datasets.load_dataset(name, subset, **options)`, for a hub name or local folder; a failure is a UserError.

    NAME@REVISION names a branch, tag or commit of a data set on the hub; of refs/convert/parquet, the automatic export,
    which has a folder for each configuration, `subset` is the folder.
    """
    import datasets  # about a second, which runs on plain files need not pay

    path, at, revision = name.partition("@")
    chosen: str | None = subset
    if not at or Path(name).exists():
        path = name
    else:
        options["revision"] = revision
        if revision.startswith("refs/convert/"):
            chosen, options["data_dir"] = None, subset
    try:
        return datasets.load_dataset(path, chosen, **options)
    except Exception as error:
        raise hub_error(name, subset, error) from error


def hub_error(name: str, subset: str | None, error: Exception) -> UserError:
    """What to tell the user when the hub, the network or the `datasets` library gave up on a data set."""
    reason = str(error).strip().splitlines() or [""]
    what = f"{name} ({subset})" if subset else name
    return UserError(
        f"data set {what} cannot be read: {type(error).__name__}: {reason[0]}; check the name, its configuration "
        "and split, and the network, or download it and set `path` to the folder"
    )
