"""The machine's peak, measured: large float32 matrix products by jax."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


class JaxGemm:
    """A step is one product of two square matrices; a pass is "batches" of them."""

    def __init__(self, spec: Mapping[str, Any]):
        self.size, self.steps = spec["gemm_size"], spec["gemm_steps"]

    def prepare(self) -> dict[str, Any]:
        """Makes the matrices."""
        key = jax.random.key(0)
        self._left = jax.random.normal(key, (self.size, self.size), jnp.float32)
        self._right = self._left / self.size**0.5
        self._multiply = jax.jit(jnp.matmul)
        return {"framework": f"jax {jax.__version__}", "flops": 2.0 * self.size**3 * self.steps}

    def run(self, first: int, steps: int) -> list[dict[str, float]]:
        """Multiplies; nothing is computed that others could be compared with."""
        product = self._left
        for _ in range(steps):
            product = self._multiply(product, self._right)
        product.block_until_ready()
        return [{} for _ in range(steps)]
