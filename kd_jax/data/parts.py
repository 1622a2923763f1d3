"""A cache of arrays on disk, written in parts: several machines share the work, and a killed one loses one part.

begun.json           what it is made from, and how it is divided into parts; a folder begun differently is refused
<name>.npy           arrays that all parts need
manifest.json        written last: the same, the statistics of each part, and every file's checksum
parts/<name>.npy     the array of a part
parts/<name>.json    its checksum and statistics, written after it

Parts are small files, so that a reader of a remote cache can start before it has all of them.
"""

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax.config import require
from kd_jax.data.rows import MANIFEST, open_array
from kd_jax.runtime.copies import LocalCopy, sha256_of
from kd_jax.runtime.files import full_disk_is_user_error, read_json, read_json_object, write_atomically, write_sealed
from kd_jax.runtime.paths import as_path, is_remote, make_folder, names_in, reaching
from kd_jax.types import UserError

PARTS = "parts"
BEGUN = "begun.json"
KEY = "teacher_cache"
_AGAIN = "remove the folder and write the cache again"


class PartsWriter:
    """Writes a cache part by part, and knows which parts exist already.

    begun: JSON values, what the cache is made from. arrays: written before anything else, by name. parts: (name,
    store's name) of each.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        begun: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        parts: Sequence[tuple[str, str]],
    ):
        self.folder, self._parts = as_path(folder), tuple(parts)
        self._arrays = tuple(f"{name}.npy" for name in arrays)
        self._begun: dict[str, Any] = json.loads(json.dumps(begun))
        self._sums: dict[str, dict[str, Any]] = {}  # checksums of the arrays that this object wrote
        with full_disk_is_user_error(self.folder):
            make_folder(self.folder / PARTS)
            there = BEGUN in names_in(self.folder)
            if there and read_json(self.folder / BEGUN, "remove it or choose another --workdir") != self._begun:
                raise UserError(
                    f"{self.folder}: holds a cache begun with another teacher, data or config; remove it or choose "
                    "another --workdir"
                )
            for name, values in arrays.items():
                if not there or not self._holds(f"{name}.npy", values):
                    self._write_array(f"{name}.npy", values)
            if not there:
                write_sealed(self.folder / BEGUN, self._begun)  # last: once it exists, the arrays do too

    def __len__(self) -> int:
        return len(self._parts)

    def missing(self, part: int, parts: int) -> list[int]:
        """The unfinished parts among every `parts`-th, beginning with `part`."""
        found = set(names_in(self.folder / PARTS))
        return [number for number in range(part, len(self), parts) if f"{self._parts[number][0]}.json" not in found]

    def write(self, number: int, values: np.ndarray, statistics: Mapping[str, float]) -> None:
        """Writes the array of a part, then its checksum with the statistics for the report."""
        name, store = self._parts[number]
        with full_disk_is_user_error(self.folder):
            written = self._write_array(f"{PARTS}/{name}.npy", values)
            note = {"name": name, "store": store, "records": len(values)}
            write_sealed(self.folder / f"{PARTS}/{name}.json", {**note, **written, **statistics})

    def attach(self, name: str, values: np.ndarray) -> None:
        """Writes an array that all parts need; an existing one is kept."""
        if not self.attached(name):
            with full_disk_is_user_error(self.folder):
                self._write_array(f"{name}.npy", values)

    def attached(self, name: str) -> bool:
        """Whether that array exists."""
        return f"{name}.npy" in names_in(self.folder)

    def read_attached(self, name: str) -> np.ndarray:
        """Reads that array, whichever machine wrote it."""
        with reaching(self.folder):
            return open_array(self.folder / f"{name}.npy", _AGAIN)

    def finish(self, attached: Sequence[str] = ()) -> dict[str, Any] | None:
        """Writes the manifest, including the arrays `attached`, and returns it if every part exists; else None."""
        if self.missing(0, 1):
            return None
        notes = [read_json_object(self.folder / PARTS / f"{name}.json") for name, _ in self._parts]
        # From the parts alone, in their order, so that it does not depend on who wrote which part.
        content = hashlib.sha256("".join(note["sha256"] for note in notes).encode()).hexdigest()
        files = {name: self._described(name) for name in (*self._arrays, *(f"{name}.npy" for name in attached))}
        files |= {f"{PARTS}/{note['name']}.npy": {key: note[key] for key in ("bytes", "sha256")} for note in notes}
        sums = {name: files[f"{name}.npy"]["sha256"] for name in attached}
        manifest = {**self._begun, "parts": notes, "attached": sums, "fingerprint": content, "files": files}
        write_sealed(self.folder / MANIFEST, manifest)
        return manifest

    def _write_array(self, name: str, values: np.ndarray) -> dict[str, Any]:
        data = _npy(values)
        write_atomically(self.folder / name, data)
        return self._described(name, data)

    def _holds(self, name: str, values: np.ndarray) -> bool:
        """Whether a file exists and is complete."""
        try:
            with reaching(self.folder):
                return (self.folder / name).read_bytes() == _npy(values)
        except OSError:
            return False

    def _described(self, name: str, data: bytes | None = None) -> dict[str, Any]:
        """Size and checksum of a file, which is read if another process wrote it."""
        if name not in self._sums:
            if data is None:
                with reaching(self.folder):
                    data = (self.folder / name).read_bytes()
            self._sums[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return self._sums[name]


class Parts:
    """A finished cache, memory-mapped. A part's checksum is verified when it is first read.

    A remote one is fetched to this host, once: a part when it is first read, the others in the background. Attributes:
    manifest, identity, fingerprint (of the content). Raises UserError if the folder holds no finished cache.
    """

    def __init__(self, folder: str | os.PathLike[str], command: str):
        self.folder, self._command = as_path(folder), command
        self.manifest = manifest_of(self.folder)
        if (found := kind_of(self.manifest)) != command:
            clean = "True" if found == "cache_states" else "False"
            problem = f"{self.folder} was written by {found}, and {command} is needed here"
            raise UserError(f"config.{KEY}: {problem}; name another folder, or set config.distill.clean to {clean}")
        self._copy = None
        if is_remote(self.folder):
            if "files" not in self.manifest:
                problem = f"{self.folder} was written by an older version and has no checksums"
                raise UserError(f"config.{KEY}: {problem}; run {command} again")
            self._copy = LocalCopy(self.folder, self.manifest)
        self.identity, self.fingerprint = self.manifest["identity"], self.manifest["fingerprint"]
        self._parts: dict[str, list[dict[str, Any]]] = {}
        for note in self.manifest["parts"]:
            self._parts.setdefault(note["store"], []).append(note)
        self._open: dict[str, np.ndarray] = {}

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raises UserError, naming the difference, if the cache was made from something else."""
        wanted = json.loads(json.dumps(identity))
        for name in sorted(self.identity.keys() | wanted.keys()):
            old, new = self.identity.get(name), wanted.get(name)
            problem = f"{self.folder} was made from another {name} ({_short(old)}, here {_short(new)})"
            remedy = f"run {self._command} with this config into another directory"
            require(old == new, KEY, problem, remedy)

    def array(self, name: str) -> np.ndarray | None:
        """One of the arrays written at the start, or None if there is none of that name."""
        file = f"{name}.npy"
        noted = self.manifest.get("files", {}).get(file)  # missing in old caches
        if noted is None and self._find(file) is None:
            return None
        place = self._find(file) if noted is None else self._verified(file, noted["sha256"], _AGAIN)
        assert place is not None
        return open_array(place, _AGAIN)

    def attached(self, name: str) -> np.ndarray | None:
        """An array that all parts need, or None if there is none of that name."""
        if name not in self.manifest["attached"]:
            return None
        return open_array(self._verified(f"{name}.npy", self.manifest["attached"][name], _AGAIN), _AGAIN)

    def part(self, store: str, number: int) -> np.ndarray:
        """The array of a store's part, memory-mapped."""
        note = self._parts[store][number]
        name = note["name"]
        if name not in self._open:
            remedy = f"remove it and {PARTS}/{name}.json, and run {self._command} again"
            file = self._verified(f"{PARTS}/{name}.npy", note["sha256"], remedy)
            self._open[name] = np.asarray(open_array(file, remedy, mapped=True))
        return self._open[name]

    def _find(self, name: str) -> pathlib.Path | None:
        """The path of a file on this host, or None if the cache has none of that name."""
        if self._copy is None:
            return self.folder / name if (self.folder / name).is_file() else None
        return self._copy.file(name) if name in self._copy else None

    def _verified(self, name: str, checksum: str, remedy: str) -> pathlib.Path:
        """The path of a file on this host, its checksum verified. Raises UserError if it differs."""
        file = self._find(name)
        if file is not None and sha256_of(file) == checksum:
            return file
        folder = self.folder
        if self._copy is not None:
            folder, remedy = self._copy.folder, "remove this copy, it is then fetched again"
        raise UserError(f"{folder / name}: is missing or was changed, its checksum differs; {remedy}")


def _npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def manifest_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a finished cache of any command. Raises UserError if there is none."""
    try:
        return read_json_object(as_path(folder) / MANIFEST, _AGAIN)
    except (FileNotFoundError, NotADirectoryError):
        problem = f"{folder} holds no finished cache"
        remedy = "run cache_teacher or cache_states into it, every part of it"
        raise UserError(f"config.{KEY}: {problem}; {remedy}") from None


def kind_of(manifest: Mapping[str, Any]) -> str:
    """The command that wrote a cache, by its manifest."""
    return manifest.get("command", "cache_teacher")  # which records no command, so that its older caches stay readable


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
