"""What all modules are built of: random numbers, activations, dropout, linear layers and layer normalization.

Parameters are float32; activations have any float dtype.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.encoder_config import EncoderConfig

Shape = tuple[int, ...]

# Random numbers are a hash of each element's index and a key. On a CPU this runs about 30 times faster than jax.random
# and compiles in a fraction of the time, which otherwise is most of a small model's start. Like jax.random, the numbers
# do not depend on the sharding.


def _mix(bits: jax.Array) -> jax.Array:
    """A 32-bit integer hash in which each input bit flips each output bit half of the time (Wellons' lowbias32)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)


def random_bits(key: jax.Array, shape: Shape, site: int = 0) -> jax.Array:
    """Uniform uint32 of that shape; different for each PRNG key and each `site` under it."""
    words = jax.random.key_data(key).astype(jnp.uint32)
    # Two numbers, each depending on the whole key and the site, so that no two streams are shifts of one another.
    start = _mix(_mix(jnp.uint32(2 * site + 1)) ^ words[0]) ^ words[-1]
    salt = _mix(_mix(jnp.uint32(2 * site + 2)) ^ words[-1]) ^ words[0]
    index = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    return _mix(_mix(index + _mix(start)) ^ _mix(salt))


def truncated_normal(key: jax.Array, shape: Shape, std: float) -> jax.Array:
    """Float32 from a normal distribution of that standard deviation, cut at two of them on either side."""
    uniform = ((random_bits(key, shape) >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
    bound = math.erf(2 / math.sqrt(2))
    return std * math.sqrt(2) * jax.lax.erf_inv(bound * (2 * uniform - 1))


def drop(x: jax.Array, rate: float, key: jax.Array | None, site: int) -> jax.Array:
    """Dropout with its own mask for each `site` under one key; without a key, or at rate 0, x itself."""
    if key is None or rate == 0.0:
        return x
    keep = random_bits(key, x.shape, site) >= jnp.uint32(round(rate * 2**32))
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function with a gradient that, in bfloat16, saves only the arguments and recomputes the rest.

    Intermediate values in float32 would otherwise be saved, at twice the size of the arguments or more. In float32 this
    saves nothing, and on a CPU recomputing costs more than reading.
    """
    narrow = jax.custom_vjp(function)
    narrow.defvjp(lambda *given: (function(*given), given), lambda given, slope: jax.vjp(function, *given)[1](slope))

    def chosen(x: jax.Array, *others: Any) -> jax.Array:
        return (narrow if x.dtype == jnp.bfloat16 else function)(x, *others)

    return chosen


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415), by erf as in PyTorch.

    Computed in float32, returned in x's dtype.
    """
    # jax.nn.gelu uses erfc, which costs twice the operations to be as exact far below 0, where the result is almost 0.
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """Contracts the last `axes` axes of x with the first of the kernel, as jnp.tensordot does."""
    return jnp.tensordot(x, kernel, axes)


def _product_forward(x: jax.Array, kernel: jax.Array, axes: int):
    return product(x, kernel, axes), (x, kernel)


def _product_backward(axes: int, factors: tuple[jax.Array, jax.Array], cotangent: jax.Array):
    x, kernel = factors
    leading = tuple(range(x.ndim - axes))
    outputs = tuple(range(len(leading), cotangent.ndim)), tuple(range(axes, kernel.ndim))
    # The kernel's gradient is x times the cotangent. JAX would multiply in the other order, for which XLA on a CPU
    # first transposes the cotangent, mostly the larger of the two.
    return jnp.tensordot(cotangent, kernel, outputs), jnp.tensordot(x, cotangent, (leading, leading))


product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """Contracts the last axes of x, shaped `inputs`, into `outputs`. `axes` name the kernel's axes for sharding.

    A call may ask for a `part` of the first output axis.
    """

    def __init__(
        self, inputs: Shape, outputs: Shape, axes: tuple[str | None, ...], *, bias: bool, std: float, rngs: nnx.Rngs
    ):
        self.num_inputs = len(inputs)
        self.kernel = nnx.Param(truncated_normal(rngs.params(), (*inputs, *outputs), std), axes=axes)
        self.bias = nnx.Param(jnp.zeros(outputs, jnp.float32), axes=axes[len(inputs) :]) if bias else None

    def __call__(self, x: jax.Array, part: slice = slice(None)) -> jax.Array:
        kernel = self.kernel[(slice(None),) * self.num_inputs + (part,)]
        y: Any = product(x, kernel.astype(x.dtype), self.num_inputs)
        if self.bias is not None:
            bias = self.bias[part].astype(x.dtype)
            y = y + jnp.expand_dims(bias, range(y.ndim - bias.ndim))
        return y


def random_table(config: EncoderConfig, rows: int, axis: str | None, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """A table [rows, H], initialized like all tables and matrices; `axis` names its rows for sharding."""
    shape = (rows, config.hidden_size)
    return nnx.Param(truncated_normal(rngs.params(), shape, config.initializer_range), axes=(axis, "embed"))


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, config: EncoderConfig):
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.hidden_size, jnp.float32), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size, jnp.float32), axes=(None,)) if config.norm_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        return recomputed(self._normed)(x, self.scale[...], None if self.bias is None else self.bias[...])

    def _normed(self, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        leading = range(x.ndim - 1)
        y = centered * jax.lax.rsqrt(variance + self.epsilon) * jnp.expand_dims(scale, leading)
        if bias is not None:
            y = y + jnp.expand_dims(bias, leading)
        return y.astype(x.dtype)
