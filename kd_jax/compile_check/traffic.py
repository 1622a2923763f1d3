"""Bytes that a compiled program reads from and writes to a device's main memory."""

import re
from collections.abc import Iterator

from kd_jax.compile_check.hlo import COLLECTIVES, Instruction, Program, arrays_of

# Opcodes that move nothing themselves, or are counted where they start.
_NOTHING = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call", "after-all"),
    *("iota", "partition-id", "replica-id", "opt-barrier", "domain", "copy-done", "send-done", "recv-done"),
    *("all-gather-done", "all-reduce-done", "collective-permute-done", "async-done", "async-update"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}

# An array in a TPU's on-chip memories, not in main memory, has a layout with such a memory space.
_ON_CHIP = re.compile(r"\b[a-z]+\d*\w*\[[\d,]*\]\{[^{}]*S\([1-46-9]\)[^{}]*\}")


def memory_traffic(program: Program) -> float:
    """Bytes read and written in a step: operands and results of everything outside fusions, as often as it runs.

    A slice counts only what is sliced, and an in-place update only the update. A kernel counts like any other
    operation, each operand once: repeated reads are not known here. Arrays on a TPU count as stored.
    """
    total = 0.0
    for name, lines in program.computations.items():
        if program.runs[name] and name not in program.fused:
            near = {one.name: one for one in lines}
            total += program.runs[name] * sum(_moved(one, near, program) for one in lines)
    return total


# Custom calls whose work is not an operation of XLA: Pallas on TPUs and GPUs, Triton of later jax, cuDNN's attention.
_KERNELS = ("tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call", "mosaic_gpu", "__cudnn$fmha")


def kernel_traffic(program: Program) -> dict[str, tuple[float, float]]:
    """The kernels of a program: name -> (runs in a step, bytes that all of them read and write)."""
    found: dict[str, tuple[float, float]] = {}
    for computation, lines in program.computations.items():
        runs, near = program.runs[computation], {one.name: one for one in lines}
        for one in lines:
            target = re.search(r'custom_call_target="([^"]*)"', one.line)
            if runs and one.opcode == "custom-call" and target and target.group(1).startswith(_KERNELS):
                count, size = found.get(name := _kernel_name(one), (0, 0.0))
                found[name] = count + runs, size + runs * _moved(one, near, program)
    return found


def _kernel_name(one: Instruction) -> str:
    """The kernel's name in the code; if XLA does not give it, from the path of functions that called it."""
    name = re.sub(r"[.\d]*$", "", one.name)
    path = re.search(r'op_name="([^"]*)/pallas_call', one.line)
    return re.findall(r"\w+", path.group(1))[-1] if name == "pallas_call" and path else name


def _main(*lines: Instruction) -> float:
    """The bytes of results that are in main memory."""
    return float(sum(sum(arrays_of(_ON_CHIP.sub("", line.shape), stored=True)) for line in lines))


def _moved(one: Instruction, near: dict[str, Instruction], program: Program) -> float:
    if one.opcode in _NOTHING:
        return 0.0
    operands = [near[name] for name in one.operands if name in near]
    if one.opcode in _SLICES:
        return 2 * _main(one)
    if one.opcode in ("dynamic-update-slice", "scatter") and len(operands) > 1:
        return 2 * _main(operands[-1 if one.opcode == "scatter" else 1])
    if one.opcode == "fusion":
        return _fusion(one, operands, program.computations[dict(one.called)["calls"]])
    return _main(one) if one.opcode.endswith("-start") else _main(one, *operands)


def _fusion(one: Instruction, operands: list[Instruction], inside: list[Instruction]) -> float:
    """What a fusion reads of each operand, and writes."""
    by_name = {line.name: line for line in inside}
    users: dict[str, list[tuple[int, Instruction]]] = {}
    parameters: dict[int, str] = {}
    for line in inside:
        for position, name in enumerate(line.operands):
            users.setdefault(name, []).append((position, line))
        if line.opcode == "parameter" and (found := re.match(r"parameter\((\d+)\)", line.line)):
            parameters[int(found.group(1))] = line.name

    def users_of(name: str) -> Iterator[tuple[int, Instruction]]:
        """Who uses a value, looking through bitcasts."""
        for position, line in users.get(name, []):
            if line.opcode == "bitcast":
                yield from users_of(line.name)
            # On a TPU a collective may continue behind a fusion. Its arrays only pass through it.
            elif line.opcode not in ("tuple", *COLLECTIVES):
                yield position, line

    def update_of(line: Instruction) -> int:
        return sum(arrays_of(by_name[line.operands[1]].shape, stored=True))

    total = 0.0
    for number, operand in enumerate(operands):
        using = list(users_of(parameters[number])) if number in parameters else []
        opcodes = {line.opcode if position == 0 else "" for position, line in using}
        if using and opcodes <= _SLICES:
            total += min(float(sum(sum(arrays_of(line.shape, stored=True)) for _, line in using)), _main(operand))
        elif opcodes == {"dynamic-update-slice"}:
            total += sum(update_of(line) for _, line in using)
        elif using or not inside[:-1]:
            total += _main(operand)
    root = inside[-1]
    several = root.opcode == "tuple"
    for line in [by_name[name] for name in root.operands if name in by_name] if several else [root]:
        while line.opcode == "bitcast" and line.operands[0] in by_name:
            line = by_name[line.operands[0]]
        if line.opcode == "dynamic-update-slice":
            total += update_of(line)
        elif not several:
            total += _main(one)
        elif line.opcode not in ("parameter", "get-tuple-element", *COLLECTIVES):
            total += _main(line)
    return total
