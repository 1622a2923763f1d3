"""One variant in a process of its own: JSON lines in, JSON lines out.

python -m benchmarks.worker --variant=NAME --spec=FILE      (started by benchmarks)

    {"do": "prepare"}                     -> {"framework": ..., "flops": of one pass, ...}
    {"do": "run", "first": i, "steps": n} -> {"seconds": s, "values": [{"kl": ..., ...} for each step]}
    {"do": "forget_peak"}                 -> {"works": whether the peak counts anew from here}
    {"do": "memory"}                      -> {"base": after the imports, "peak": since the start or forget_peak}

Sizes are bytes. A failure is answered with {"error": text} and ends the worker. Everything else that a library prints
goes to standard error.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any, Protocol, TextIO

from benchmarks import memory
from benchmarks.handover import read_spec

# Variant -> where it is built: a function of the spec. The import brings the framework.
VARIANTS = {
    "padded_all": "jax_variants:padded_all",
    "packed_all": "jax_variants:packed_all",
    "packed_masked": "jax_variants:packed_masked",
    "packed_cached": "jax_variants:packed_cached",
    "pytorch_eager": "pytorch_variants:usual_eager",
    "pytorch_compiled": "pytorch_variants:usual_compiled",
    "pytorch_best": "pytorch_variants:best",
    "pytorch_narrow": "pytorch_variants:narrow",
    "gemm_jax": "gemm:JaxGemm",
    "gemm_pytorch": "pytorch_variants:PyTorchGemm",
    "finetune_packed": "finetune_variants:finetune_packed",
    "finetune_padded": "finetune_variants:finetune_padded",
    "finetune_longest": "finetune_variants:finetune_longest",
    "predict_packed": "finetune_variants:predict_packed",
    "predict_padded": "finetune_variants:predict_padded",
    "predict_longest": "finetune_variants:predict_longest",
    "scaling": "scaling_variants:ScaledDistill",
}


class Variant(Protocol):
    """What is measured. Steps are numbered over the fixed batches, again and again."""

    def prepare(self) -> dict[str, Any]:
        """Reads, builds and places everything that is not part of a step."""
        ...

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """Takes steps first .. first + steps - 1 and returns, when all are finished, what each computed."""
        ...


def build(name: str, spec: dict[str, Any]) -> Variant:
    """The variant of that name."""
    module, builder = VARIANTS[name].split(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), builder)(spec)


def pin(threads: int) -> None:
    """Keeps the process to its first `threads` cores, where the system allows; must precede jax and PyTorch."""
    if threads and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def answer(variant: Variant, base: int, request: dict[str, Any]) -> dict[str, Any]:
    """The answer to one request."""
    match request["do"]:
        case "prepare":
            return variant.prepare()
        case "run":
            start = time.perf_counter()
            values = variant.run(request["first"], request["steps"])
            return {"seconds": time.perf_counter() - start, "values": values}
        case "forget_peak":
            return {"works": memory.reset_peak()}
        case "memory":
            return {"base": base, "peak": memory.peak_bytes()}
    raise ValueError(f"unknown request {request}")


def serve(variant: Variant, base: int, requests: TextIO, answers: TextIO) -> int:
    """Answers requests until there are no more, or one fails; the exit code."""
    for line in requests:
        try:
            reply = answer(variant, base, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
        if "error" in reply:
            return 1
    return 0


def main() -> int:
    """Reads the arguments, then serves standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--spec", required=True)
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    spec = read_spec(arguments.spec)
    pin(spec["threads"])
    variant = build(arguments.variant, spec)
    return serve(variant, memory.current_bytes(), sys.stdin, answers)


if __name__ == "__main__":
    sys.exit(main())
