"""Packed rows: texts that share a row of fixed length, told apart by segment ids; and stores of them on disk."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kd_jax.types import UserError

# [cls], one piece, [sep]: a row with less room than this takes no further text.
SMALLEST_SEGMENT = 3

MANIFEST = "manifest.json"


def positions(segment_ids: np.ndarray) -> np.ndarray:
    """int32 [R, L] positions that restart at 0 in each segment of int [R, L] segment ids; 0 on padding."""
    columns = np.arange(segment_ids.shape[1], dtype=np.int32)[None, :]
    starts = np.zeros(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first_column = np.maximum.accumulate(np.where(starts, columns, np.int32(0)), axis=1)
    return np.where(segment_ids > 0, columns - first_column, np.int32(0))


def maskable(tokens: np.ndarray, segment_ids: np.ndarray, special_ids: Sequence[int]) -> np.ndarray:
    """bool [R, L]: real pieces that are no special token, which masking may take and which shares are counted in."""
    result = segment_ids > 0
    for special in special_ids:
        result &= tokens != special
    return result


class BestFit:
    """Places items of given sizes into rows: the open row with the least sufficient room, else a new row.

    At most `open_rows` rows stay open; beyond that the fullest is closed. A row also closes when no text fits into it
    any more or when it holds `max_segments` texts.
    """

    def __init__(self, length: int, open_rows: int, max_segments: int):
        self.length, self.open_rows, self.max_segments = length, open_rows, max_segments
        self.num_rows = 0
        self._by_room: list[list[int]] = [[] for _ in range(length + 1)]
        self._rooms = 0  # bit r is set while some open row has room r
        self._segments: dict[int, int] = {}  # texts in each open row

    def place(self, sizes: Iterable[int]) -> tuple[list[int], list[int], list[int], list[int]]:
        """(row, column, segment id) of each item as three lists, and the rows that closed meanwhile, in order."""
        by_room, segments, rooms = self._by_room, self._segments, self._rooms
        length, max_segments = self.length, self.max_segments
        rows, columns, numbers, closed = [], [], [], []
        for size in sizes:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1
                row = by_room[room].pop()
                if not by_room[room]:
                    rooms ^= 1 << room
                number = segments[row] + 1
            else:
                row, room, number = self.num_rows, length, 1
                self.num_rows += 1
            rows.append(row)
            columns.append(length - room)
            numbers.append(number)
            room -= size
            if room < SMALLEST_SEGMENT or number == max_segments:
                segments.pop(row, None)
                closed.append(row)
                continue
            segments[row] = number
            by_room[room].append(row)
            rooms |= 1 << room
            if len(segments) > self.open_rows:
                room = (rooms & -rooms).bit_length() - 1
                fullest = by_room[room].pop(0)
                if not by_room[room]:
                    rooms ^= 1 << room
                del segments[fullest]
                closed.append(fullest)
        self._rooms = rooms
        return rows, columns, numbers, closed

    def open(self) -> list[int]:
        """The rows that are still open, oldest first."""
        return sorted(self._segments)


def pack_stream(
    chunks: Iterable[Sequence[np.ndarray]], length: int, cls_id: int, sep_id: int, pad_id: int, open_rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Packs texts into rows of `length`; yields blocks of finished rows, (tokens int32 [n, L], segment_ids int32 [n,
    L]).

    `chunks` are lists of texts, a text being its pieces (int [p]) without special tokens. Each text becomes [cls]
    pieces [sep]; a text of more than length - 2 pieces becomes consecutive segments; a text without pieces is left
    out. The rows do not depend on how the texts are cut into chunks. Memory: one chunk and `open_rows` rows.
    """
    fit = BestFit(length, open_rows, max_segments=length)
    open_ids = np.zeros(0, np.int64)
    open_tokens = np.zeros((0, length), np.int32)
    open_segments = np.zeros((0, length), np.int32)
    for chunk in chunks:
        pieces_each = np.fromiter((len(text) for text in chunk), np.int64, len(chunk))
        if not pieces_each.sum():
            continue
        pieces = np.concatenate(chunk)
        sizes = _segment_sizes(pieces_each, length - 2)
        first_new = fit.num_rows
        placed_rows, columns, numbers, closed = fit.place((sizes + 2).tolist())

        ids = np.concatenate([open_ids, np.arange(first_new, fit.num_rows)])
        tokens = np.full((len(ids), length), pad_id, np.int32)
        segments = np.zeros((len(ids), length), np.int32)
        tokens[: len(open_ids)], segments[: len(open_ids)] = open_tokens, open_segments

        starts = np.searchsorted(ids, placed_rows) * length + np.asarray(columns)
        flat = tokens.reshape(-1)
        flat[starts] = cls_id
        flat[starts + sizes + 1] = sep_id
        flat[runs(starts + 1, sizes)] = pieces
        segments.reshape(-1)[runs(starts, sizes + 2)] = np.repeat(numbers, sizes + 2)

        finished = np.searchsorted(ids, np.asarray(closed, np.int64))
        if len(finished):
            yield tokens[finished], segments[finished]
        still_open = np.ones(len(ids), bool)
        still_open[finished] = False
        open_ids, open_tokens, open_segments = ids[still_open], tokens[still_open], segments[still_open]
    if len(open_ids):
        yield open_tokens, open_segments


def runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [sum of sizes]: sizes[0] numbers counting up from starts[0], then sizes[1] from starts[1], and so on."""
    before = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(starts - before, sizes)


def _segment_sizes(pieces_each: np.ndarray, most: int) -> np.ndarray:
    """Pieces of each segment when texts are cut after every `most` pieces; texts without pieces have none."""
    parts = -(-pieces_each // most)
    sizes = np.full(parts.sum(), most)
    last = np.cumsum(parts)[parts > 0] - 1
    sizes[last] = (pieces_each - (parts - 1) * most)[parts > 0]
    return sizes


class _ArrayFile:
    """A .npy file of rows whose number is known only at the end; also the digest of its rows."""

    def __init__(self, path: pathlib.Path, length: int, dtype: np.dtype):
        self.length, self.dtype, self.rows = length, dtype, 0
        self.digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115, closed by `close`
        self._header()

    def _header(self) -> None:
        description = np.lib.format.dtype_to_descr(self.dtype)
        values = {"descr": description, "fortran_order": False, "shape": (self.rows, self.length)}
        np.lib.format.write_array_header_1_0(self._file, values)  # leaves room for the row count to grow
        self._data_start = self._file.tell()

    def append(self, rows: np.ndarray) -> None:
        data = np.ascontiguousarray(rows, self.dtype).data
        self._file.write(data)
        self.digest.update(data)
        self.rows += len(rows)

    def finish(self) -> None:
        start = self._data_start
        self._file.seek(0)
        self._header()
        if self._data_start != start:
            raise RuntimeError("the .npy header changed its length")
        self.close()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def new_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `folder` that takes its name (and place) when the block ends well, and vanishes
    otherwise.

    What a killed process left is removed at the next try. A full disk is a UserError.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{folder}: the disk is full; free some space or choose another folder") from error
        raise


def write_store(
    folder: str | os.PathLike,
    chunks: Iterable[Sequence[np.ndarray]],
    *,
    name: str,
    source: str,
    kind: str,
    language: str,
    split: str,
    length: int,
    open_rows: int,
    tokenizer: Any,
    removed: Mapping[str, int],
    built_from: str,
) -> dict[str, Any]:
    """Packs `chunks` (see `pack_stream`) into a store and returns its manifest.

    `removed` (texts left out before tokenising, by reason) is read after the last chunk; `built_from` identifies the
    config part the store was built from. Raises UserError when no text is left or the disk is full; nothing is left
    behind then.
    """
    folder = pathlib.Path(folder)
    token_type = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32)
    segment_type = np.dtype(np.uint8 if length // SMALLEST_SEGMENT <= 255 else np.uint16)
    texts = empty = tokens_total = maskable_total = 0
    piece_counts = np.zeros(tokenizer.vocab_size, np.int64)

    def counted(chunks):
        nonlocal texts, empty
        for chunk in chunks:
            without_pieces = sum(len(text) == 0 for text in chunk)
            texts += len(chunk) - without_pieces
            empty += without_pieces
            yield chunk

    with new_folder(folder) as temporary, contextlib.ExitStack() as files:
        token_file = _ArrayFile(temporary / "tokens.npy", length, token_type)
        files.callback(token_file.close)
        segment_file = _ArrayFile(temporary / "segments.npy", length, segment_type)
        files.callback(segment_file.close)
        blocks = pack_stream(counted(chunks), length, tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id, open_rows)
        for tokens, segment_ids in blocks:
            token_file.append(tokens)
            segment_file.append(segment_ids)
            tokens_total += int(np.count_nonzero(segment_ids))
            pieces = tokens[maskable(tokens, segment_ids, tokenizer.special_ids)]
            maskable_total += len(pieces)
            piece_counts += np.bincount(pieces, minlength=len(piece_counts))
        rows = token_file.rows
        if not rows:
            left_out = ", ".join(f"{count} {reason}" for reason, count in removed.items()) or "none was read"
            raise UserError(
                f"config.sources.{source}: no {split} text is left for {language} ({left_out}); "
                "check its path, its languages and rows.heldout_share"
            )
        token_file.finish()
        segment_file.finish()
        np.save(temporary / "piece_counts.npy", piece_counts)
        content = f"{length} {tokenizer.fingerprint} {token_file.digest.hexdigest()} {segment_file.digest.hexdigest()}"
        manifest = {
            "name": name,
            "source": source,
            "kind": kind,
            "language": language,
            "split": split,
            "rows": rows,
            "length": length,
            "texts": texts,
            "texts_per_row": texts / rows,
            "tokens": tokens_total,
            "maskable": maskable_total,
            "unique_pieces": int(np.count_nonzero(piece_counts)),
            "packing_efficiency": tokens_total / (rows * length),
            "removed": {**removed, "empty": empty},
            "tokens_type": token_type.name,
            "segments_type": segment_type.name,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "fingerprint": hashlib.sha256(content.encode()).hexdigest(),
            "built_from": built_from,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return manifest


class RowStore:
    """One source and language as packed rows on disk, memory-mapped and read only.

    Attributes from its manifest: name, source, kind ("generic" or "task"), language, split ("train" or "heldout"),
    num_rows, length, texts, tokens (special ones included), maskable, fingerprint (of the content),
    tokenizer_fingerprint. Raises UserError when the folder is no whole store, or was built with another tokenizer
    than `tokenizer_fingerprint`.
    """

    def __init__(self, folder: str | os.PathLike, tokenizer_fingerprint: str | None = None):
        self.folder = pathlib.Path(folder)
        remedy = "remove the folder and run prepare again"
        try:
            self.manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.folder}: no finished row store is here; run prepare") from None
        except ValueError as error:
            raise UserError(f"{self.folder / MANIFEST}: broken JSON ({error}); {remedy}") from None
        manifest = self.manifest
        self.name: str = manifest["name"]
        self.source: str = manifest["source"]
        self.kind: str = manifest["kind"]
        self.language: str = manifest["language"]
        self.split: str = manifest["split"]
        self.num_rows: int = manifest["rows"]
        self.length: int = manifest["length"]
        self.texts: int = manifest["texts"]
        self.tokens: int = manifest["tokens"]
        self.maskable: int = manifest["maskable"]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        if tokenizer_fingerprint is not None and tokenizer_fingerprint != self.tokenizer_fingerprint:
            raise UserError(
                f"{self.folder}: its rows were built with tokenizer {self.tokenizer_fingerprint}, not "
                f"{tokenizer_fingerprint}; run prepare again into another folder"
            )
        self._tokens = self._open("tokens.npy", manifest["tokens_type"], remedy)
        self._segments = self._open("segments.npy", manifest["segments_type"], remedy)

    def _open(self, file_name: str, dtype: str, remedy: str) -> np.ndarray:
        path = self.folder / file_name
        try:
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{path}: cannot be read, it is truncated or no .npy file ({error}); {remedy}") from None
        expected = (self.num_rows, self.length)
        surplus = os.path.getsize(path) - rows.offset - rows.nbytes if isinstance(rows, np.memmap) else 0
        if rows.shape != expected or rows.dtype != dtype or surplus:
            raise UserError(
                f"{path}: holds {rows.dtype.name} {rows.shape} and {surplus} more bytes, its manifest says "
                f"{dtype} {expected}; {remedy}"
            )
        return np.asarray(rows)  # a view of the mapped file without memmap's slower indexing

    def token_counts(self, vocabulary: int) -> np.ndarray:
        """int64 [vocabulary]: how often each maskable piece occurs in the store; 0 for special tokens."""
        path = self.folder / "piece_counts.npy"
        counts = np.load(path, allow_pickle=False)
        if counts.shape != (vocabulary,):
            raise UserError(
                f"{path}: counts {counts.shape} pieces, not {vocabulary}; remove the folder and prepare again"
            )
        return counts

    def rows(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens int32 [n, L], segment_ids int32 [n, L]) of the rows at `indices`, int [n]."""
        return self._tokens[indices].astype(np.int32), self._segments[indices].astype(np.int32)
