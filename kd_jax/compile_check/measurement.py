"""A compiled step: memory by kind, collectives, roofline; and the report about it."""

import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from kd_jax.compile_check.hlo import Collective, Program
from kd_jax.compile_check.roofline import GIB, Roofline, roofline
from kd_jax.compile_check.topology import Topology
from kd_jax.compile_check.traffic import kernel_traffic
from kd_jax.types import UserError

# How compilers report the memory that a program would need, if they do.
_NEEDED = re.compile(r"(?:Used|required[^(]*\(|[Nn]eeds?) ?([\d.]+)([KMG])")
_KINDS = ("arguments", "outputs", "temporaries", "code")
_UNITS = {"K": 2.0**10, "M": 2.0**20, "G": 2.0**30}


@dataclass(frozen=True)
class Measurement:
    """A step compiled for a topology, in bytes per device; outputs that reuse the memory of arguments are not counted.

    kernels: name -> (runs in a step, bytes that they read and write).
    """

    rows: int
    seconds: float  # of compilation
    arguments: int
    outputs: int
    temporaries: int
    code: int
    fits: bool
    collectives: tuple[Collective, ...] = ()
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)
    roofline: Roofline | None = None

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        values: dict[str, Any] = {**asdict(self), "total": self.total}
        if self.roofline is not None:
            values["roofline"] |= {"step": self.roofline.step, "bound": self.roofline.bound}
        return values


def measure(lowered: jax.stages.Lowered, rows: int, flops: float, topology: Topology, slice_size: int) -> Measurement:
    """Compiles. A program that is too large for the compiler does not fit; it has the memory that it would need, if the
    compiler reports that."""
    began = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise UserError(
                f"--topology={topology.name}: the compiler failed ({str(error).splitlines()[0][:200]}); for a GPU, "
                "XLA_FLAGS=--xla_gpu_enable_triton_gemm=false in the environment may help, else another mesh or batch"
            ) from error
        found = _NEEDED.search(str(error))
        needed = int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0
        return Measurement(rows, time.perf_counter() - began, 0, 0, needed, 0, False)
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    program = Program(compiled.as_text() or "")
    sizes = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    return Measurement(
        rows,
        seconds,
        *sizes,
        fits=sum(sizes) <= topology.chip.usable,
        collectives=tuple(program.collectives()),
        kernels=kernel_traffic(program),
        roofline=roofline(program, flops, topology.chip, slice_size),
    )


def lines_of(one: Measurement, topology: Topology, length: int, price: float) -> list[str]:
    """The measurement as lines of text. price: of a device per hour, 0 for none."""
    chip, devices = topology.chip, len(topology.devices)
    if one.roofline is None:
        needed = f", it needs {one.total / GIB:.1f} GiB for temporaries alone" if one.total else ""
        return [f"{one.rows} rows do not fit: the compiler ran out of memory{needed}"]
    found = [
        f"{one.rows} rows of {length} tokens on {devices} x {chip.name}, compiled in {one.seconds:.0f} s",
        "memory per device, GiB: " + ", ".join(f"{kind} {getattr(one, kind) / GIB:.2f}" for kind in _KINDS),
        f"  together {one.total / GIB:.2f} of {chip.usable / GIB:.2f}: it {'fits' if one.fits else 'does not fit'}",
        "collectives, bytes that a device sends per step:",
    ]
    found += [f"  {line}" for line in collective_lines(one.collectives)] or ["  none"]
    if one.kernels:
        found.append("kernels, bytes that they read and write per step:")
        found += [f"  {name:<40} {runs:>4g} x  {size / 1e9:>9.3f} GB" for name, (runs, size) in one.kernels.items()]
    roof = one.roofline
    tokens = one.rows * length / roof.step
    hours = 1e11 / tokens / 3600 * devices
    cost = f", {hours * price:,.0f} at {price:g} each" if price else ""
    return [
        *found,
        f"matrix products: {roof.flops / 1e12:.2f} TFLOP per device; memory traffic {roof.traffic / 1e9:.1f} GB; "
        f"sent {roof.sent / 1e9:.2f} GB",
        f"at best: compute {roof.compute:.4f} s, memory {roof.memory:.4f} s, network {roof.network:.4f} s; a step "
        f"takes {roof.step:.4f} s, bound by {roof.bound}",
        f"  {tokens:,.0f} tokens/s, {tokens / devices:,.0f} per device; {roof.compute / roof.step:.0%} of peak FLOPs",
        f"  100 billion tokens: {hours:,.0f} device-hours{cost}",
        f"  peaks of {chip.name}: {chip.source}",
    ]


def collective_lines(collectives: tuple[Collective, ...], most: int = 8) -> list[str]:
    """A line for each kind with its number and bytes, then the source of the largest ones."""
    lines: list[str] = []
    for kind in sorted({one.kind for one in collectives}):
        count = sum(one.count for one in collectives if one.kind == kind)
        sent = sum(one.sent for one in collectives if one.kind == kind)
        lines.append(f"{kind:<20} {count:>6g} x  {sent / 1e9:>9.3f} GB")
    for one in collectives[:most]:
        source = re.sub(r"^jit\(\w+\)/|jvp\(\)/|closed_call/|body/", "", one.source.split(":")[0])
        lines.append(
            f"  {one.kind} of {one.size / 1e6:.1f} MB over {one.group} devices, {one.count:g} x: "
            f"{one.sent / 1e9:.3f} GB{f' ({source})' if source else ''}"
        )
    return lines
