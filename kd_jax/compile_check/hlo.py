"""Reading a compiled program: how often each part runs, and what its collectives move."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_WIDTH = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}

# Kind of a collective -> what each of g devices sends of an array of one byte, in a ring. The array is the largest one
# that it reads or gives: the gathered one, or the one that is to be scattered.
_SENT = {
    "all-gather": lambda g: (g - 1) / g,
    "reduce-scatter": lambda g: (g - 1) / g,
    "all-reduce": lambda g: 2 * (g - 1) / g,
    "all-to-all": lambda g: (g - 1) / g,
    "ragged-all-to-all": lambda g: (g - 1) / g,
    "collective-permute": lambda g: 1.0,
    "collective-broadcast": lambda g: 1.0,
}

COLLECTIVES = tuple(_SENT)

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # as written, with layouts
    opcode: str
    operands: tuple[str, ...]
    line: str

    @property
    def bytes(self) -> int:
        return bytes_of(self.shape)


@dataclass(frozen=True)
class Collective:
    """A collective of the program. size: bytes of the array; count: how often it runs in a step; group: how many
    devices take part in each; members: those of the first group, numbered along the mesh; sent: bytes that a device
    sends in a step, all `count` runs together. source: what in our code it comes from."""

    kind: str
    size: int
    count: int
    group: int
    members: tuple[int, ...]
    sent: float
    source: str


class Program:
    """The computations of a compiled module's text, and how often each runs."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self.fused: set[str] = set()
        self._read(text)
        self.runs = dict.fromkeys(self.computations, 0)
        self._count(self.entry, 1)

    def _read(self, text: str) -> None:
        name = ""
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith(" ") and "->" in line:
                head = line.split(" ", 2)
                name = (head[1] if head[0] == "ENTRY" else head[0]).lstrip("%").split("(")[0]
                self.computations[name] = []
                if head[0] == "ENTRY":
                    self.entry = name
            elif line.startswith("}"):
                name = ""
            elif name and (found := _INSTRUCTION.match(line)):
                self.computations[name].append(_instruction(found.group(1), found.group(2)))

    def _count(self, name: str, times: int) -> None:
        """Adds the runs of a computation and of what it calls. A module calls no computation from itself."""
        self.runs[name] += times
        for one in self.computations[name]:
            called = called_by(one)
            if one.opcode == "while":
                trips = self.trip_count(one)
                for role, inside in called:
                    self._count(inside, times * (trips + (role == "condition")))
            else:
                for _, inside in called:
                    if one.opcode == "fusion":
                        self.fused.add(inside)
                    if inside in self.computations:
                        self._count(inside, times)

    def trip_count(self, loop: Instruction) -> int:
        """How often a while loop runs: as XLA found out, or the constant that its condition compares with; else 1."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(found.group(1))
        condition = dict(called_by(loop))["condition"]
        lines = self.computations[condition]
        root = lines[-1]
        constants = {one.name: one for one in lines if one.opcode == "constant"}
        for one in (root, *(line for line in lines if line.opcode in ("compare", "fusion"))):
            for operand in one.operands:
                if operand in constants and (found := re.search(r"constant\((\d+)\)", constants[operand].line)):
                    return int(found.group(1))
        return 1

    def instructions(self) -> Iterator[tuple[int, Instruction]]:
        """(runs in a step, instruction) of all that is no part of a fusion."""
        for name, lines in self.computations.items():
            if self.runs[name] and name not in self.fused:
                for one in lines:
                    yield self.runs[name], one

    def collectives(self) -> list[Collective]:
        """All collectives, the largest first.

        A TPU program may spread one over several fusions, which then all show it; a channel's number tells that they
        are one, and the rarest that it is begun so often.
        """
        found: dict[str, Collective] = {}
        for name, lines in self.computations.items():
            for one in lines:
                kind = one.opcode.removesuffix("-start")
                if kind not in _SENT or not self.runs[name]:
                    continue
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "reduce-scatter"  # so it is called on TPUs: a fusion of both
                this = _collective(kind, one, lines, self.runs[name])
                channel = re.search(r"channel_id=(\d+)", one.line)
                key = channel.group() if channel else f"{name}/{one.name}"
                if key not in found or this.sent < found[key].sent:
                    found[key] = this
        return sorted(found.values(), key=lambda one: -one.sent)


def _instruction(name: str, rest: str) -> Instruction:
    shape, rest = _take_shape(rest)
    opcode, _, rest = rest.partition("(")
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[: _closing(rest)]))
    return Instruction(name, shape, opcode.strip(), operands, f"{opcode}({rest}")


def _closing(rest: str) -> int:
    """Where the parenthesis that was opened before closes."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0:
            return place
    return len(rest)


def _take_shape(rest: str) -> tuple[str, str]:
    """The shape in front, a tuple in parentheses or an array, and what follows."""
    depth = 0
    for place, letter in enumerate(rest):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(letter, 0)
        if letter == " " and depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""


def called_by(one: Instruction) -> list[tuple[str, str]]:
    """(role, computation) of what an instruction calls."""
    pairs = []
    for found in re.finditer(r"(calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|%[\w.\-]+)", one.line):
        pairs += [(found.group(1), name) for name in re.findall(r"%([\w.\-]+)", found.group(2))]
    return pairs


def arrays_of(shape: str) -> list[int]:
    """The bytes of each array of a shape as it is written."""
    sizes = []
    for kind, dimensions in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        digits = re.search(r"\d+", kind)
        width = _WIDTH.get(kind) or (max(int(digits.group()) // 8, 1) if digits else 0)
        sizes.append(width * math.prod(int(size) for size in dimensions.split(",") if size))
    return sizes


def bytes_of(shape: str) -> int:
    """The bytes of a shape, of all arrays of a tuple together."""
    return sum(arrays_of(shape))


def _collective(kind: str, one: Instruction, lines: list[Instruction], runs: int) -> Collective:
    shapes = {line.name: line.shape for line in lines}
    read = sum(bytes_of(shapes[name]) for name in one.operands if name in shapes)
    given = one.bytes
    if one.opcode.endswith("-start"):  # its result holds what it reads as well
        given = max(given - read, 0) if kind != "all-reduce" else given
    size = max(read, given)
    groups = replica_groups(one.line)
    group = len(groups[0]) if groups else 1
    place = re.search(r'op_name="([^"]*)"', one.line)
    sent = runs * size * _SENT[kind](max(group, 1))
    members = groups[0] if groups else ()
    return Collective(kind, size, runs, group, members, sent, place.group(1) if place else "")


def replica_groups(line: str) -> list[tuple[int, ...]]:
    """The groups of a collective, in any of the ways in which they are written: listed, {{0,1},{2,3}}; counted,
    [groups,size]<=[sizes]T(order); or by axes of a mesh, mesh['a'=2,'b'=4] {'b'}. [] where there are none."""
    if found := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", line):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", found.group(1))]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, sizes = ([int(size) for size in part.split(",")] for part in found.group(1, 2))
        order = [int(axis) for axis in found.group(3).split(",")] if found.group(3) else list(range(len(sizes)))
        flat = _transposed(sizes, order)
        return [tuple(flat[start : start + shape[-1]]) for start in range(0, len(flat), shape[-1])]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{([^}]*)\}", line):
        return _mesh_groups(*found.groups())
    if found := re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", line):
        return [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", found.group(1))]
    return []


def _transposed(sizes: list[int], order: list[int]) -> list[int]:
    """The numbers 0, 1, ... of an array of these sizes, read in another order of its axes."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    numbers = [0]
    for axis in order:
        numbers = [start + strides[axis] * step for start in numbers for step in range(sizes[axis])]
    return numbers


def _mesh_groups(axes: str, device_ids: str | None, wanted: str) -> list[tuple[int, ...]]:
    """Groups along axes of a mesh: "'a'=2,'b'=4", "[4,2]T(1,0)" for the devices in its order, and "'b'", or "'b':(2)2"
    for a part of an axis, of size 2 below another part of size 2."""
    parts = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted)}
    sizes, places = [], []
    for name, written in re.findall(r"'([^']+)'=(\d+)", axes):
        whole = int(written)
        pre, size = (int(number or 0) for number in parts.get(name, ("", "")))
        if name in parts and size:
            places.append(len(sizes) + 1)
            sizes += [pre, size, whole // (pre * size)]
        else:
            if name in parts:
                places.append(len(sizes))
            sizes.append(whole)
    others = [number for number in range(len(sizes)) if number not in places]
    flat = _transposed(sizes, others + places)
    if device_ids and (found := re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)):
        shape = [int(size) for size in found.group(1).split(",")]
        order = [int(axis) for axis in found.group(2).split(",")] if found.group(2) else list(range(len(shape)))
        devices = _transposed(shape, order)
        flat = [devices[number] for number in flat]
    each = math.prod(sizes[place] for place in places)
    return [tuple(flat[start : start + each]) for start in range(0, len(flat), each)]
