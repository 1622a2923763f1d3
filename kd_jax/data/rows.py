"""Stores of packed rows on disk: written once, streaming, and read through memory maps."""

import contextlib
import functools
import hashlib
import io
import os
import pathlib
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Self

import numpy as np

from kd_jax.data.packing import SMALLEST_SEGMENT, Packer, maskable
from kd_jax.data.text.tokenizer import Tokenizer
from kd_jax.runtime.copies import describe
from kd_jax.runtime.files import full_disk_is_user_error, read_json_object, write_sealed
from kd_jax.runtime.paths import is_remote
from kd_jax.types import UserError

MANIFEST = "manifest.json"
TOKENS, SEGMENTS, TOKEN_COUNTS = "tokens.npy", "segments.npy", "piece_counts.npy"
STORE_FILES = (MANIFEST, TOKEN_COUNTS, TOKENS, SEGMENTS)
_REMEDY = "remove the folder and run prepare again"


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Generator[pathlib.Path]:
    """A temporary folder that is renamed to `folder` when the block ends well, and removed otherwise.

    So a folder under its own name is always whole. What a killed process left is removed at the next try.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with full_disk_is_user_error(folder):
            temporary.mkdir(parents=True)
            yield temporary
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_manifest(folder: pathlib.Path) -> dict[str, Any] | None:
    """The manifest of a store or a prepared folder, None where there is none; UserError for broken JSON."""
    try:
        return read_json_object(folder / MANIFEST, _REMEDY)
    except FileNotFoundError:
        return None


def no_text(source: str, language: str, split: str, removed: Mapping[str, int]) -> UserError:
    """The error for one language of a source that leaves nothing to train on, or nothing to hold out."""
    if split == "heldout":
        return UserError(
            f"config.sources.{source}: no text of {language} was held out; raise config.rows.heldout_share or give "
            "more text (texts that begin with the same letters go together)"
        )
    reasons = ", ".join(f"{count} {reason}" for reason, count in removed.items() if count)
    left_out = f" (left out: {reasons})" if reasons else ""
    return UserError(
        f"config.sources.{source}: no text of {language} is left to train on{left_out}; give more text, or lower "
        "config.rows.heldout_share"
    )


class _ArrayFile:
    """A .npy file whose number of rows is known only at the end; also the digest of its rows."""

    def __init__(self, path: pathlib.Path, length: int, dtype: type[np.generic]):
        self.length, self.dtype, self.rows = length, np.dtype(dtype), 0
        self.digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
        self._data_start = self._header()

    def _header(self) -> int:
        description = np.lib.format.dtype_to_descr(self.dtype)
        values = {"descr": description, "fortran_order": False, "shape": (self.rows, self.length)}
        # NumPy pads the header so that the first number may grow to any size: it is overwritten in place at the end.
        np.lib.format.write_array_header_1_0(self._file, values)
        return self._file.tell()

    def append(self, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows, self.dtype).data
        self._file.write(data)
        self.digest.update(data)
        self.rows += len(rows)

    def finish(self) -> None:
        self._file.seek(0)
        if self._header() != self._data_start:
            raise RuntimeError("the .npy header changed its length")
        self.close()

    def close(self) -> None:
        self._file.close()


class StoreWriter:
    """Packs texts and appends their rows to files in `folder`, an existing empty folder (see `new_folder`).

    identity: name, source, kind, language and split, see `RowStore`. built_from: identifies the part of the config that
    the store depends on.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        length: int,
        open_rows: int,
        tokenizer: Tokenizer,
        built_from: str,
        **identity: str,
    ):
        self.folder, self.tokenizer, self.length = folder, tokenizer, length
        self._identity = {key: identity[key] for key in ("name", "source", "kind", "language", "split")}
        self._built_from = built_from
        self._packer = Packer(length, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, open_rows)
        # The smallest types that hold every id: rows are read at random, so half the bytes is half the disk cache.
        self._tokens = _ArrayFile(folder / TOKENS, length, np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
        most_segments = length // SMALLEST_SEGMENT
        self._segments = _ArrayFile(folder / SEGMENTS, length, np.uint8 if most_segments <= 255 else np.uint16)
        self._counts = np.zeros(tokenizer.vocab_size, np.int64)
        self._texts = self._cut = self._empty = self._real_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._tokens.close()
        self._segments.close()

    def add(self, texts: Sequence[np.ndarray]) -> None:
        """Takes texts, each int [tokens] without special tokens; one without tokens is counted as empty."""
        empty = sum(len(text) == 0 for text in texts)
        self._texts += len(texts) - empty
        self._empty += empty
        self._cut += sum(len(text) > self.length - 2 for text in texts)
        self._append(*self._packer.add(texts))

    def _append(self, tokens: np.ndarray, segment_ids: np.ndarray) -> None:
        self._tokens.append(tokens)
        self._segments.append(segment_ids)
        self._real_tokens += int(np.count_nonzero(segment_ids))
        counted = tokens[maskable(tokens, segment_ids, self.tokenizer.special_ids)]
        self._counts += np.bincount(counted, minlength=len(self._counts))

    def finish(self, removed: Mapping[str, int]) -> dict[str, Any]:
        """Completes the files and returns the manifest; `removed` counts texts left out before, by reason.

        Raises UserError when there is no row.
        """
        self._append(*self._packer.finish())
        rows, identity = self._tokens.rows, self._identity
        removed = {**removed, "empty": self._empty}
        if not rows:
            raise no_text(identity["source"], identity["language"], identity["split"], removed)
        self._tokens.finish()
        self._segments.finish()
        np.save(self.folder / TOKEN_COUNTS, self._counts)
        digests = f"{self._tokens.digest.hexdigest()} {self._segments.digest.hexdigest()}"
        content = f"{self.length} {self.tokenizer.fingerprint} {digests}"
        manifest = {
            **identity,
            "rows": rows,
            "length": self.length,
            "texts": self._texts,
            "cut": self._cut,
            "texts_per_row": self._texts / rows,
            "tokens": self._real_tokens,
            "maskable": int(self._counts.sum()),
            "unique_pieces": int(np.count_nonzero(self._counts)),
            "packing_efficiency": self._real_tokens / (rows * self.length),
            "removed": removed,
            "tokens_type": self._tokens.dtype.name,
            "segments_type": self._segments.dtype.name,
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
            "built_from": self._built_from,
            "files": describe(self.folder, (TOKEN_COUNTS, TOKENS, SEGMENTS)),
        }
        write_sealed(self.folder / MANIFEST, manifest)
        return manifest


def open_array(path: pathlib.Path, remedy: str, *, mapped: bool = False) -> np.ndarray:
    """The array of a .npy file, memory-mapped if `mapped`. Raises UserError for a truncated or other file."""
    try:
        source = io.BytesIO(path.read_bytes()) if is_remote(path) else path
        return np.load(source, mmap_mode="r" if mapped else None, allow_pickle=False)
    except Exception as error:  # a broken header raises whatever Python's tokenizer raises
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read, it is truncated or not a .npy file ({reason}); {remedy}") from None


class RowStore:
    """One source and language as packed rows on disk, memory-mapped and read only.

    Attributes from its manifest: name, source, kind ("generic", "task", or "selected" for selected generic text),
    language, split ("train" or "heldout"), num_rows, length, texts, cut (texts that became several segments; None in a
    store of kd_jax 0.2), maskable, fingerprint (of the content), tokenizer_fingerprint. Raises UserError if the folder
    is not a complete store, or was built with another tokenizer than `tokenizer_fingerprint`.

    find: gives the path of one of its files, verified; later: they are opened when the first rows are read, since they
    are still being fetched from a remote store.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tokenizer_fingerprint: str | None = None,
        find: Callable[[str], pathlib.Path] | None = None,
        later: bool = False,
    ):
        self.folder = pathlib.Path(folder)
        self._find = find or (lambda name: self.folder / name)
        manifest = read_manifest(self._find(MANIFEST).parent)
        if manifest is None:
            raise UserError(f"{self.folder}: no finished row store is here; run prepare")
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.source: str = manifest["source"]
        self.kind: str = manifest["kind"]
        self.language: str = manifest["language"]
        self.split: str = manifest["split"]
        self.num_rows: int = manifest["rows"]
        self.length: int = manifest["length"]
        self.texts: int = manifest["texts"]
        self.cut: int | None = manifest.get("cut")
        self.maskable: int = manifest["maskable"]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        if tokenizer_fingerprint not in (None, self.tokenizer_fingerprint):
            raise UserError(
                f"{self.folder}: its rows were built with tokenizer {self.tokenizer_fingerprint}, not "
                f"{tokenizer_fingerprint}; run prepare again into another folder"
            )
        if not later:
            _ = self._arrays

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        manifest = self.manifest
        return self._open(TOKENS, manifest["tokens_type"]), self._open(SEGMENTS, manifest["segments_type"])

    def _open(self, file_name: str, dtype: str) -> np.ndarray:
        path = self._find(file_name)
        rows = open_array(path, _REMEDY, mapped=True)
        expected = (self.num_rows, self.length)
        surplus = os.path.getsize(path) - rows.offset - rows.nbytes if isinstance(rows, np.memmap) else 0
        if rows.shape != expected or rows.dtype != dtype or surplus:
            raise UserError(
                f"{path}: holds {rows.dtype.name} {rows.shape} and {surplus} more bytes, its manifest says "
                f"{dtype} {expected}; {_REMEDY}"
            )
        return np.asarray(rows)  # a view of the mapped file without memmap's slower indexing

    def token_counts(self, vocabulary: int) -> np.ndarray:
        """int64 [vocabulary]: how often each maskable token occurs in the store; 0 for special tokens."""
        path = self._find(TOKEN_COUNTS)
        counts = open_array(path, _REMEDY)
        if counts.shape != (vocabulary,):
            raise UserError(f"{path}: counts {counts.shape} tokens, not {vocabulary}; {_REMEDY}")
        return counts

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n, L], segment_ids int32 [n, L]) of the rows at `indices`, int [n]."""
        tokens, segments = self._arrays
        return tokens[indices].astype(np.int32), segments[indices].astype(np.int32)

    def full_rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`rows` with the ids of the full tokenizer, even if a student's vocabulary is trimmed."""
        return self.rows(indices)
