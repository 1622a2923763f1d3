"""What shapes an encoder and its heads."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from kd_jax.types import UserError


def gelu(x: jax.Array) -> jax.Array:
    """x times the normal distribution function (Hendrycks and Gimpel, arXiv 1606.08415), by erf as in PyTorch.

    In float32, returned in x's dtype: jax.nn.gelu takes the complement of erf, of twice the operations, to be as exact
    far below 0, where the result is next to nothing.
    """
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Everything that shapes an encoder and its heads; the fields are explained in presets.py. Raises UserError."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_positions: int
    positions: Literal["learned", "rotary"]
    position_offset: int
    type_vocab_size: int
    norm_placement: Literal["pre", "post"]
    embedding_norm: bool
    final_norm: bool
    skip_first_attention_norm: bool
    use_bias: bool
    norm_bias: bool
    norm_epsilon: float
    activation: str
    gated: bool
    global_every: int
    local_window: int
    global_theta: float
    local_theta: float
    head_style: Literal["bert", "roberta", "modernbert"]
    head_activation: str
    head_bias: bool
    decoder_bias: bool
    initializer_range: float
    dropout: float
    attention_dropout: float
    scan: Literal["scan", "unroll"]
    remat: bool

    def __post_init__(self) -> None:
        choices = {
            "positions": ("learned", "rotary"),
            "norm_placement": ("pre", "post"),
            "head_style": ("bert", "roberta", "modernbert"),
            "scan": ("scan", "unroll"),
            "activation": tuple(ACTIVATIONS),
            "head_activation": tuple(ACTIVATIONS),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise UserError(
                    f"encoder.{key}: {getattr(self, key)!r} is not known; choose one of {', '.join(allowed)}"
                )
        for key in (
            "vocab_size",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
            "max_positions",
            "global_every",
        ):
            if getattr(self, key) < 1:
                raise UserError(f"encoder.{key}: {getattr(self, key)} is too small; give at least 1")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"encoder.num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}; change one"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(
                f"encoder.num_heads: rotary positions need an even size a head, not {self.head_dim}; change it"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def reads(self, field: str) -> bool:
        """Whether a field decides what this encoder computes from its parameters, or how it is trained."""
        if field in ("global_theta", "local_theta") and self.positions == "learned":
            return False
        return field not in ("local_window", "local_theta") or self.global_every > 1

    def is_global(self, layer: int) -> bool:
        """Whether that layer attends to the whole text rather than inside the local window."""
        return layer % self.global_every == 0


def encoder_config(values: Any, vocab_size: int) -> EncoderConfig:
    """From the keys of `config.teacher` or `config.student`; the tokenizer's `vocab_size` fills in a 0. Raises
    UserError.
    """
    values = dict(values)
    values["vocab_size"] = values["vocab_size"] or vocab_size
    if values["vocab_size"] < vocab_size:
        raise UserError(
            f"encoder.vocab_size: {values['vocab_size']} is less than the tokenizer's {vocab_size}; "
            f"set it to 0 to take the tokenizer's"
        )
    return EncoderConfig(**values)


def output_std(config: EncoderConfig) -> float:
    """Matrices that write to a pre-norm residual stream start smaller, so that its size does not grow with depth."""
    if config.norm_placement == "post":
        return config.initializer_range
    return config.initializer_range / math.sqrt(2 * config.num_layers)
