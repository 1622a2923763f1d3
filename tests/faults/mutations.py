"""Damages files: truncation, flipped bits, swaps, deletions, wrong types, huge numbers, unusual Unicode.

Every mutation is a function of a NumPy generator, so that a seed reproduces a case. Values and texts come from pools
that hypothesis draws once with a fixed seed.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import hypothesis
import numpy as np
from hypothesis import strategies as st

Mutation = Callable[[bytes, np.random.Generator], bytes]

# Characters that readers, tokenizers and terminals often get wrong: line separators, a byte order mark, marks of
# direction, joiners, combining marks, NUL, noncharacters, characters outside the first plane.
UNUSUAL = "\u2028\u2029\x85\x0b\x0c\x1c\ufeff\u202e\u200d\u200b\u0301\x00\x7f\uffff\U0010ffff\U0001f469\u0130ßﬁ\ud83d"
# Bytes that are not, or only almost, UTF-8.
BROKEN_BYTES = (
    b"\xff",
    b"\xc3",
    b"\xed\xa0\xbd",
    b"\xf8\x88\x80\x80\x80",
    b"\xc0\x80",
    b"\x00",
    b"\r",
    b"\xe2\x80\xa8",
)
HUGE = (10**12, 10**19, -(10**19), 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -1e308)


@functools.cache
def pool(kind: str) -> tuple[Any, ...]:
    """Values that hypothesis draws with a fixed seed: "texts" or "values" (JSON)."""
    texts = st.text(st.sampled_from(UNUSUAL) | st.characters(), max_size=12)
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from(HUGE)
    nested = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
    found: list[Any] = []

    @hypothesis.seed(0)
    @hypothesis.settings(
        max_examples=300,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(texts if kind == "texts" else nested)
    def draw(value: Any) -> None:
        found.append(value)

    draw()
    return tuple(found)


def of_pool(kind: str, rng: np.random.Generator) -> Any:
    return pool(kind)[rng.integers(len(pool(kind)))]


def truncated(data: bytes, rng: np.random.Generator) -> bytes:
    """Cut anywhere, more often near the ends."""
    places = (int(rng.integers(0, len(data) + 1)), min(len(data), 10), max(0, len(data) - 1), 0)
    return data[: places[rng.choice(4, p=(0.6, 0.15, 0.15, 0.1))]]


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four flipped bits."""
    changed = bytearray(data)
    for place in rng.integers(0, max(len(data), 1), rng.integers(1, 5)):
        if changed:
            changed[place] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _block(data: bytes, rng: np.random.Generator) -> tuple[int, int]:
    first, last = sorted(rng.integers(0, len(data) + 1, 2).tolist())
    return first, min(last, first + max(64, len(data) // 8))


def cut_out(data: bytes, rng: np.random.Generator) -> bytes:
    """A block is missing."""
    first, last = _block(data, rng)
    return data[:first] + data[last:]


def zeroed(data: bytes, rng: np.random.Generator) -> bytes:
    """A block of zeros, as a file system leaves it after a power cut."""
    first, last = _block(data, rng)
    return data[:first] + bytes(last - first) + data[last:]


def repeated(data: bytes, rng: np.random.Generator) -> bytes:
    """A block is repeated."""
    first, last = _block(data, rng)
    return data[:last] + data[first:last] + data[last:]


def swapped(data: bytes, rng: np.random.Generator) -> bytes:
    """Two neighboring blocks are swapped."""
    first, last = _block(data, rng)
    middle = (first + last) // 2
    return data[:first] + data[middle:last] + data[first:middle] + data[last:]


def inserted(data: bytes, rng: np.random.Generator) -> bytes:
    """Bytes that are not UTF-8, or unusual text, anywhere."""
    text = str(of_pool("texts", rng)).encode("utf-8", "surrogatepass")
    more = text if rng.random() < 0.5 else BROKEN_BYTES[rng.integers(len(BROKEN_BYTES))]
    place = int(rng.integers(0, len(data) + 1))
    return data[:place] + more + data[place:]


def lines_changed(data: bytes, rng: np.random.Generator) -> bytes:
    """Other line endings, a repeated line, lines in another order, a byte order mark, or a very long line."""
    lines = data.split(b"\n")
    which = int(rng.integers(6))
    if which == 0:
        return b"\r\n".join(lines)
    if which == 1:
        return b"\r".join(lines)
    if which == 2:
        return b"\n".join(lines[:1] + lines)
    if which == 3:
        return b"\n".join(lines[index] for index in rng.permutation(len(lines)))
    if which == 4:
        return b"\xef\xbb\xbf" + data
    return b"\n".join([b"a " * 200_000 if number == 1 else line for number, line in enumerate(lines)])


def json_changed(data: bytes, rng: np.random.Generator) -> bytes:
    """A JSON file, or one line of JSON Lines, that is still valid JSON: a value of another type, a huge number, unusual
    text, a missing or renamed key, two swapped values."""
    try:
        return _dumped(_changed(json.loads(data), rng), indent=2)
    except ValueError:
        pass
    lines = data.split(b"\n")
    number = int(rng.integers(max(len(lines) - 1, 1)))
    try:
        lines[number] = _dumped(_changed(json.loads(lines[number]), rng))
    except ValueError:
        return inserted(data, rng)
    return b"\n".join(lines)


def _dumped(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent).encode()


def _holders(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found = []
    for key, item in items:
        found += [(value, key), *_holders(item)]
    return found


def _changed(value: Any, rng: np.random.Generator) -> Any:
    holders = _holders(value)
    which = int(rng.integers(6))
    if not holders or rng.random() < 0.03:
        return of_pool("values", rng)
    # Keys near the root, which are read first, are drawn as often as the many below them.
    near = [one for one in holders if one[0] is value]
    chosen = near if rng.random() < 0.5 else holders
    holder, key = chosen[rng.integers(len(chosen))]
    if which == 0:
        del holder[key]
    elif which == 1:
        other, place = chosen[rng.integers(len(chosen))]
        holder[key], other[place] = other[place], holder[key]
        try:
            json.dumps(value)
        except ValueError:  # a value that now contains itself
            holder[key] = None
    elif which == 2 and isinstance(holder, dict):
        holder[str(of_pool("texts", rng))] = holder.pop(key)
    elif which == 3:
        holder[key] = HUGE[rng.integers(len(HUGE))]
    elif which == 4:
        holder[key] = str(of_pool("texts", rng))
    else:
        holder[key] = of_pool("values", rng)
    return value


def header_changed(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits or other digits among the first 256 bytes: headers of safetensors, .npy, gzip, tar and Parquet."""
    head, rest = data[:256], data[256:]
    if rng.random() < 0.5:
        return flipped(head, rng) + rest
    digits = [place for place, byte in enumerate(head) if chr(byte).isdigit()]
    changed = bytearray(head)
    for place in digits[: 1 + int(rng.integers(20))] if digits else ():
        changed[place] = ord(str(int(rng.integers(10))))
    return bytes(changed) + rest


def tail_changed(data: bytes, rng: np.random.Generator) -> bytes:
    """Flipped bits among the last 512 bytes: the footer of Parquet, the checksum of gzip."""
    return data[:-512] + flipped(data[-512:], rng)


BYTES: tuple[Mutation, ...] = (truncated, flipped, cut_out, zeroed, repeated, swapped, inserted)
TEXT: tuple[Mutation, ...] = (*BYTES, inserted, lines_changed, lines_changed)
JSON: tuple[Mutation, ...] = (*BYTES, json_changed, json_changed, json_changed, json_changed, json_changed)
BINARY: tuple[Mutation, ...] = (*BYTES, flipped, header_changed, header_changed, tail_changed)


def mutations_for(name: str) -> tuple[Mutation, ...]:
    """The mutations that suit a file, by its name."""
    if name.endswith((".txt",)):
        return TEXT
    if name.endswith(".jsonl"):
        return (*JSON, lines_changed)
    return JSON if name.endswith(".json") or name in ("DONE", "metadata", "_METADATA") else BINARY


def mutate(file: pathlib.Path, others: list[pathlib.Path], rng: np.random.Generator) -> str:
    """Damages a file, replacing it so that hard links keep their content; returns the name of the mutation."""
    if rng.random() < 0.06:
        file.unlink()
        return "deleted"
    if rng.random() < 0.02:
        file.unlink()
        file.mkdir()
        return "a folder in its place"
    same = [one for one in others if one != file and one.suffix == file.suffix]
    if same and rng.random() < 0.06:
        other = same[rng.integers(len(same))]
        data = other.read_bytes()
        _replace(file, data)
        return f"the content of {other.name} of {other.parent.name}"
    choices = mutations_for(file.name)
    mutation = choices[rng.integers(len(choices))]
    _replace(file, mutation(file.read_bytes(), rng))
    return mutation.__name__


def _replace(file: pathlib.Path, data: bytes) -> None:
    file.unlink()
    file.write_bytes(data)
