"""Linear layers and layer normalization, with float32 parameters and activations of any float dtype."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.random_numbers import truncated_normal


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, axes: int) -> jax.Array:
    """Contracts the last `axes` axes of x with the first of the kernel, as jnp.tensordot does.

    Its gradient by the kernel is x times the cotangent. JAX would multiply in the other order, for which XLA on a CPU
    first transposes the cotangent, mostly the larger of the two.
    """
    return jnp.tensordot(x, kernel, axes)


def _product_forward(x, kernel, axes):
    return product(x, kernel, axes), (x, kernel)


def _product_backward(axes, factors, cotangent):
    x, kernel = factors
    leading = tuple(range(x.ndim - axes))
    outputs = tuple(range(len(leading), cotangent.ndim)), tuple(range(axes, kernel.ndim))
    return jnp.tensordot(cotangent, kernel, outputs), jnp.tensordot(x, cotangent, (leading, leading))


product.defvjp(_product_forward, _product_backward)


class Linear(nnx.Module):
    """Contracts the last axes of x, shaped `inputs`, into `outputs`. `axes` name the kernel's axes for sharding.

    A call may ask for a `part` of the first output axis.
    """

    def __init__(self, inputs, outputs, axes, *, bias: bool, std: float, rngs: nnx.Rngs):
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


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis, computed in float32, returned in x's dtype."""

    def __init__(self, config: EncoderConfig):
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones(config.hidden_size, jnp.float32), axes=(None,))
        self.bias = nnx.Param(jnp.zeros(config.hidden_size, jnp.float32), axes=(None,)) if config.norm_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centered = wide - jnp.mean(wide, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        leading = range(x.ndim - 1)
        y = centered * jax.lax.rsqrt(variance + self.epsilon) * jnp.expand_dims(self.scale[...], leading)
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...], leading)
        return y.astype(x.dtype)
