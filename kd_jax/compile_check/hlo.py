"""Reading a compiled program's text: how often each part runs, and what its collectives send."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
_BROKEN = re.compile(r'\n(?="|}})')  # inside a kernel's metadata, which XLA prints over several lines
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?)?")
_CALLS = re.compile(
    r"(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # as written, with layouts
    opcode: str
    operands: tuple[str, ...]
    line: str

    @property
    def called(self) -> list[tuple[str, str]]:
        """(role, computation) of what it calls."""
        found = _CALLS.findall(self.line)
        return [(role, name) for role, names in found for name in re.findall(r"%([\w.\-]+)", names)]


@dataclass(frozen=True)
class Collective:
    """A collective of the program. size: bytes of the array; count: how often it runs in a step; group: how many
    devices take part in each; members: those of the first group, numbered along the mesh; sent: bytes that a device
    sends in a step, all `count` runs together; source: where in our code it comes from."""

    kind: str
    size: int
    count: float
    group: int
    members: tuple[int, ...]
    sent: float
    source: str


class Program:
    """The computations of a compiled module's text, and how often each runs in a step.

    XLA has no stable Python interface to a compiled module, and its own cost analysis counts a loop's body once, so the
    text is parsed here.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.fused: set[str] = set()
        name = entry = ""
        for line in _BROKEN.sub(" ", text).splitlines():
            if line.endswith("{") and not line.startswith(" ") and "->" in line:
                head = line.split(" ", 2)
                name = (head[1] if head[0] == "ENTRY" else head[0]).lstrip("%").split("(")[0]
                self.computations[name] = []
                if head[0] == "ENTRY":
                    entry = name
            elif line.startswith("}"):
                name = ""
            elif name and (found := _INSTRUCTION.match(line)):
                self.computations[name].append(_instruction(found.group(1), found.group(2)))
        self.runs: dict[str, float] = dict.fromkeys(self.computations, 0)
        self._count(entry, 1)

    def _count(self, name: str, times: float) -> None:
        """Adds the runs of a computation and of those it calls. XLA has no recursion.

        One branch of a conditional runs each time; the program does not say which, so each counts its share.
        """
        self.runs[name] += times
        for one in self.computations[name]:
            trips: float = self._trip_count(one) if one.opcode == "while" else 1
            if one.opcode == "conditional":
                trips = 1 / len(one.called)
            for role, inside in one.called:
                if one.opcode == "fusion":
                    self.fused.add(inside)
                if inside in self.computations:
                    # A loop's condition is also evaluated when the loop ends.
                    self._count(inside, times * (trips + (one.opcode == "while" and role == "condition")))

    def _trip_count(self, loop: Instruction) -> int:
        """How often a while loop runs: as XLA found out, or the constant that its condition compares with; else 1."""
        if found := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
            return int(found.group(1))
        lines = self.computations[dict(loop.called)["condition"]]
        constants = {one.name: one for one in lines if one.opcode == "constant"}
        for one in (lines[-1], *(line for line in lines if line.opcode in ("compare", "fusion"))):
            for operand in one.operands:
                if operand in constants and (found := re.search(r"constant\((\d+)\)", constants[operand].line)):
                    return int(found.group(1))
        return 1

    def collectives(self) -> list[Collective]:
        """All collectives, the largest first."""
        found: dict[str, Collective] = {}
        for name, lines in self.computations.items():
            for one in lines:
                kind = one.opcode.removesuffix("-start")
                if kind not in _SENT or not self.runs[name]:
                    continue
                if kind == "all-reduce" and "all-reduce-scatter" in name:
                    kind = "reduce-scatter"  # its name on TPUs, where it is a fusion of both
                this = _collective(kind, one, lines, self.runs[name])
                # A TPU program may spread one over several fusions that all show it. They share its channel, and the
                # one that runs least often tells how often it is started.
                channel = re.search(r"channel_id=(\d+)", one.line)
                key = channel.group() if channel else f"{name}/{one.name}"
                if key not in found or this.sent < found[key].sent:
                    found[key] = this
        return sorted(found.values(), key=lambda one: -one.sent)


def _instruction(name: str, rest: str) -> Instruction:
    end = _end(rest, " ", 0)
    shape, rest = rest[:end], rest[end + 1 :]
    opcode, _, rest = rest.partition("(")
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[: _end(rest, ")", 1)]))
    return Instruction(name, shape, opcode.strip(), operands, f"{opcode}({rest}")


def _end(text: str, letter: str, depth: int) -> int:
    """Where a letter ends the text: outside all brackets, of which `depth` are open at the start."""
    for index, here in enumerate(text):
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(here, 0)
        if here == letter and depth == 0:
            return index
    return len(text)


def arrays_of(shape: str, *, stored: bool = False) -> list[int]:
    """The bytes of each array of a shape, as HLO prints it. stored: including the padding of its tiles on a TPU.

    bf16[512,64]{1,0:T(8,128)(2,1)} is stored as 512 x 128 values: tiles are those of its most minor dimensions.
    """
    sizes: list[int] = []
    for kind, dimensions, order, tile in _ARRAY.findall(shape):
        digits = re.search(r"\d+", kind)
        width = _WIDTH.get(kind) or (max(int(digits.group()) // 8, 1) if digits else 0)
        lengths = _numbers(dimensions)
        if stored:
            for dimension, side in zip(_numbers(order), reversed(_numbers(tile))):
                lengths[dimension] = math.ceil(lengths[dimension] / side) * side
        sizes.append(width * math.prod(lengths))
    return sizes


def _numbers(written: str) -> list[int]:
    return [int(number) for number in written.split(",") if number]


def _collective(kind: str, one: Instruction, lines: list[Instruction], runs: float) -> Collective:
    shapes = {line.name: line.shape for line in lines}
    read = sum(sum(arrays_of(shapes[name])) for name in one.operands if name in shapes)
    given = sum(arrays_of(one.shape))
    if one.opcode.endswith("-start") and kind != "all-reduce":  # its result also holds its operands
        given = max(given - read, 0)
    size = max(read, given)
    groups = replica_groups(one.line)
    members = groups[0] if groups else ()
    group = max(len(members), 1)
    source = re.search(r'op_name="([^"]*)"', one.line)
    return Collective(kind, size, runs, group, members, runs * size * _SENT[kind](group), source[1] if source else "")


def replica_groups(line: str) -> list[tuple[int, ...]]:
    """The groups of a collective, in any notation: listed, {{0,1},{2,3}}; counted, [groups,size]<=[sizes]T(order); or
    by axes of a mesh, mesh['a'=2,'b'=4] {'b'}. [] if there are none."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", line):
        return [tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d, ]+)\}", found.group(1))]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        each = int(found.group(1).split(",")[-1])
        return _tuples(_iota(found.group(2)), each)
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? ?\{([^}]*)\}", line):
        return _mesh_groups(*found.groups())
    return []


def _iota(written: str) -> np.ndarray:
    """The numbers of "[2,4]T(1,0)": 0 to 7 as an array of that shape, transposed, flat."""
    sizes, *order = ([int(one) for one in part.split(",")] for part in re.findall(r"[\[(]([\d,]+)[\])]", written))
    numbers = np.arange(math.prod(sizes)).reshape(sizes)
    return (numbers.transpose(order[0]) if order else numbers).ravel()


def _tuples(flat: np.ndarray, each: int) -> list[tuple[int, ...]]:
    return [tuple(group) for group in flat.reshape(-1, each).tolist()]


def _mesh_groups(axes: str, device_ids: str | None, wanted: str) -> list[tuple[int, ...]]:
    """Groups along axes of a mesh: "'a'=2,'b'=4", "[4,2]T(1,0)" for the devices in its order, and "'b'", or "'b':(2)2"
    for a part of an axis, of size 2 below another part of size 2."""
    parts = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", wanted)}
    sizes: list[int] = []
    chosen: list[int] = []
    for name, written in re.findall(r"'([^']+)'=(\d+)", axes):
        pre, size = (int(number or 0) for number in parts.get(name, ("", "")))
        if size:
            chosen.append(len(sizes) + 1)
            sizes += [pre, size, int(written) // (pre * size)]
        else:
            if name in parts:
                chosen.append(len(sizes))
            sizes.append(int(written))
    others = [axis for axis in range(len(sizes)) if axis not in chosen]
    flat = np.arange(math.prod(sizes)).reshape(sizes).transpose(others + chosen).ravel()
    if device_ids:
        flat = _iota(device_ids)[flat]
    return _tuples(flat, math.prod(sizes[axis] for axis in chosen))
