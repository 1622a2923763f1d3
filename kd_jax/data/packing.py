"""Packing: texts that share a row of fixed length, kept apart by segment ids 1, 2, ...; 0 is padding."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

# [cls], one token, [sep]: a row with less room than this takes no further text.
SMALLEST_SEGMENT = 3


def positions(segment_ids: np.ndarray) -> np.ndarray:
    """int32 [R, L] positions that restart at 0 in each segment of int [R, L] segment ids; 0 on padding."""
    columns = np.arange(segment_ids.shape[1], dtype=np.int32)[None, :]
    starts = np.zeros(segment_ids.shape, bool)
    starts[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    first_column = np.maximum.accumulate(np.where(starts, columns, np.int32(0)), axis=1)
    return np.where(segment_ids > 0, columns - first_column, np.int32(0))


def maskable(tokens: np.ndarray, segment_ids: np.ndarray, special_ids: Sequence[int]) -> np.ndarray:
    """bool [R, L]: real tokens that are not special: those that masking may take and that shares are counted in."""
    result = segment_ids > 0
    for special in special_ids:  # five comparisons are faster than np.isin
        result &= tokens != special
    return result


class BestFit:
    """Assigns items of given sizes to rows: the open row with the least sufficient room, else a new row.

    At most `open_rows` rows stay open; one more closes the fullest. A row also closes when no text fits into it any
    more, or when it holds `max_segments` texts.
    """

    def __init__(self, length: int, open_rows: int, max_segments: int):
        self.length, self.open_rows, self.max_segments = length, open_rows, max_segments
        self.num_rows = 0
        self._by_room: list[list[int]] = [[] for _ in range(length + 1)]
        # Bit r is set while some open row has room r. So the best fit is the lowest set bit from `size` upwards, found
        # in one operation on an integer of length + 1 bits instead of a search.
        self._rooms = 0
        self._segments: dict[int, int] = {}  # texts in each open row

    def place(self, sizes: Iterable[int]) -> tuple[list[int], list[int], list[int], list[int]]:
        """(row, column, segment id) of each item as three lists, and the rows that closed meanwhile, in order."""
        by_room, segments, rooms = self._by_room, self._segments, self._rooms
        length, max_segments = self.length, self.max_segments
        rows, columns, numbers, closed = [], [], [], []
        for size in sizes:
            fitting = rooms >> size
            if fitting:
                room = size + (fitting & -fitting).bit_length() - 1  # x & -x keeps the lowest set bit
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
                fullest = by_room[room].pop(0)  # of equally full rows the oldest
                if not by_room[room]:
                    rooms ^= 1 << room
                del segments[fullest]
                closed.append(fullest)
        self._rooms = rooms
        return rows, columns, numbers, closed


class Packer:
    """Packs texts into rows of `length` as they arrive: each becomes [cls] tokens [sep] and shares a row with others.

    A text of more than length - 2 tokens becomes consecutive segments; a text without tokens is left out. The rows do
    not depend on how the texts are cut into chunks. Memory: one chunk and `open_rows` rows.
    """

    def __init__(self, length: int, cls_id: int, sep_id: int, pad_id: int, open_rows: int):
        self.length, self.cls_id, self.sep_id, self.pad_id = length, cls_id, sep_id, pad_id
        self._fit = BestFit(length, open_rows, max_segments=length)
        self._ids = np.zeros(0, np.int64)  # of the open rows, ascending
        self._tokens = np.zeros((0, length), np.int32)
        self._segments = np.zeros((0, length), np.int32)

    def add(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Takes texts, each int [tokens] without special tokens; gives the rows that were finished, in order.

        They are (tokens int32 [n, L], segment_ids int32 [n, L]); n may be 0.
        """
        tokens_each = np.fromiter((len(text) for text in texts), np.int64, len(texts))
        if not tokens_each.sum():
            return self._tokens[:0], self._segments[:0]
        sizes = _segment_sizes(tokens_each, self.length - 2)
        first_new = self._fit.num_rows
        rows, columns, numbers, closed = self._fit.place((sizes + 2).tolist())

        ids = np.concatenate([self._ids, np.arange(first_new, self._fit.num_rows)])
        tokens = np.full((len(ids), self.length), self.pad_id, np.int32)
        segments = np.zeros((len(ids), self.length), np.int32)
        tokens[: len(self._ids)], segments[: len(self._ids)] = self._tokens, self._segments

        # Only `place` loops over texts; the tokens of all of them are written at once, into the flattened rows.
        starts = np.searchsorted(ids, rows) * self.length + np.asarray(columns)
        flat = tokens.reshape(-1)
        flat[starts] = self.cls_id
        flat[starts + sizes + 1] = self.sep_id
        flat[runs(starts + 1, sizes)] = np.concatenate(texts)
        segments.reshape(-1)[runs(starts, sizes + 2)] = np.repeat(numbers, sizes + 2)

        finished = np.searchsorted(ids, np.asarray(closed, np.int64))
        still_open = np.ones(len(ids), bool)
        still_open[finished] = False
        self._ids, self._tokens, self._segments = ids[still_open], tokens[still_open], segments[still_open]
        return tokens[finished], segments[finished]

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that are still open; the packer takes no more texts."""
        return self._tokens, self._segments


def pack_stream(
    chunks: Iterable[Sequence[np.ndarray]], length: int, cls_id: int, sep_id: int, pad_id: int, open_rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of packed rows, (tokens int32 [n, L], segment_ids int32 [n, L]), of chunks of texts (see `Packer`)."""
    packer = Packer(length, cls_id, sep_id, pad_id, open_rows)
    for texts in chunks:
        yield packer.add(texts)
    yield packer.finish()


def runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """int64 [sum of sizes]: sizes[0] numbers counting up from starts[0], then sizes[1] from starts[1], and so on."""
    before = np.cumsum(sizes) - sizes
    return np.arange(sizes.sum()) + np.repeat(starts - before, sizes)


def _segment_sizes(tokens_each: np.ndarray, most: int) -> np.ndarray:
    """Tokens of each segment when texts are cut after every `most` tokens; texts without tokens have none."""
    parts = -(-tokens_each // most)
    sizes = np.full(parts.sum(), most)
    last = np.cumsum(parts)[parts > 0] - 1
    sizes[last] = (tokens_each - (parts - 1) * most)[parts > 0]
    return sizes
