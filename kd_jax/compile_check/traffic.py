"""Bytes that a compiled program reads from and writes to the memory of a device."""

import re

from kd_jax.compile_check.hlo import COLLECTIVES, Instruction, Program, arrays_of, called_by

# What moves nothing by itself, or is counted where it begins.
_NOTHING = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("iota", "partition-id", "replica-id", "opt-barrier", "domain", "copy-done", "send-done", "recv-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done", "async-done", "async-update"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}

# An array outside of the main memory, in a TPU's on-chip memories, has a layout with such a space.
_ON_CHIP = re.compile(r"\b[a-z]+\d*\w*\[[\d,]*\]\{[^{}]*S\([1-46-9]\)[^{}]*\}")


def memory_traffic(program: Program) -> float:
    """Bytes read and written in a step: operands and results of all that is not inside a fusion, as often as it runs.

    Of what is sliced only the slice counts, and of what is updated in place only the update.
    """
    shapes = {
        name: {one.name: one for one in lines} for name, lines in program.computations.items() if program.runs[name]
    }
    total = 0.0
    for name, lines in program.computations.items():
        if program.runs[name] and name not in program.fused:
            total += program.runs[name] * sum(_moved(one, shapes[name], program) for one in lines)
    return total


def _main(shape: str) -> int:
    """The bytes of a shape that lie in the main memory."""
    return sum(arrays_of(_ON_CHIP.sub("", shape)))


def _moved(one: Instruction, near: dict[str, Instruction], program: Program) -> float:
    if one.opcode in _NOTHING:
        return 0.0
    operands = [near[name] for name in one.operands if name in near]
    if one.opcode in _SLICES:
        return 2.0 * _main(one.shape)
    if one.opcode in ("dynamic-update-slice", "scatter") and len(operands) > 1:
        return 2.0 * _main(operands[-1 if one.opcode == "scatter" else 1].shape)
    if one.opcode == "fusion":
        inside = program.computations[dict(called_by(one))["calls"]]
        return _fusion(one, operands, inside)
    if one.opcode.endswith("-start"):
        return float(_main(one.shape))
    return float(_main(one.shape) + sum(_main(operand.shape) for operand in operands))


def _fusion(one: Instruction, operands: list[Instruction], inside: list[Instruction]) -> float:
    """What a fusion reads of each operand, and writes.

    On a TPU a collective may go on behind a fusion: its arrays are handed through and are no work of the fusion.
    """
    users: dict[str, list[tuple[int, Instruction]]] = {}
    for line in inside:
        for place, name in enumerate(line.operands):
            users.setdefault(name, []).append((place, line))
    by_name = {line.name: line for line in inside}
    parameters = {}
    for line in inside:
        if line.opcode == "parameter" and (found := re.match(r"parameter\((\d+)\)", line.line)):
            parameters[int(found.group(1))] = line
    root = inside[-1]
    handed = {"tuple", *COLLECTIVES}

    def update_of(line: Instruction) -> int:
        return sum(arrays_of(by_name[line.operands[1]].shape))

    total = 0.0
    for number, operand in enumerate(operands):
        using = _real_users(parameters[number].name, users) if number in parameters else []
        using = [(place, line) for place, line in using if line.opcode not in handed]
        if using and all(line.opcode in _SLICES and place == 0 for place, line in using):
            total += min(sum(sum(arrays_of(line.shape)) for _, line in using), _main(operand.shape))
        elif using and all(line.opcode == "dynamic-update-slice" and place == 0 for place, line in using):
            total += sum(update_of(line) for _, line in using)
        elif using or not inside[:-1]:
            total += _main(operand.shape)
    if root.opcode == "tuple":
        results = [by_name[name] for name in root.operands if name in by_name]
    else:
        results = [root]
    for line in results:
        while line.opcode == "bitcast" and line.operands[0] in by_name:
            line = by_name[line.operands[0]]
        if line.opcode == "dynamic-update-slice":
            total += update_of(line)
        elif root.opcode != "tuple":
            total += _main(one.shape)
        elif line.opcode not in ("parameter", "get-tuple-element", *COLLECTIVES):
            total += _main(line.shape)
    return total


def _real_users(name: str, users: dict[str, list[tuple[int, Instruction]]]) -> list[tuple[int, Instruction]]:
    """Who uses a value, looking through bitcasts."""
    found = []
    for place, line in users.get(name, []):
        found += _real_users(line.name, users) if line.opcode == "bitcast" else [(place, line)]
    return found
