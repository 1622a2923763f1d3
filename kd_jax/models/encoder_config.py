"""The settings that shape an encoder and its heads, and named sizes.

Sizes of public models are those of their published config files; parameter counts are without embeddings.
"""

import dataclasses
import math
import typing
from typing import Any, Literal

from kd_jax.types import UserError

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]
Pooling = Literal["first", "mean", "max"]  # how the vector of a text is computed from the states of its tokens

_AT_LEAST_1 = (
    *("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "max_positions", "global_every"),
)
_MOST = 2**31 - 1  # maximum of any number: XLA indexes with 32 bits
_MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Everything that shapes an encoder and its heads; the defaults are BERT's (arXiv 1810.04805). Raises UserError."""

    vocab_size: int = 0  # 0: the tokenizer's
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512  # tokens in the longest text
    positions: Literal["learned", "rotary"] = "learned"
    position_offset: int = 0  # added to each position before the table is read
    type_vocab_size: int = 2  # token types; every token has type 0
    norm_placement: Literal["pre", "post"] = "post"
    embedding_norm: bool = True
    final_norm: bool = False
    skip_first_attention_norm: bool = False
    use_bias: bool = True  # of linear layers in the encoder
    norm_bias: bool = True
    norm_epsilon: float = 1e-12
    activation: Activation = "gelu"
    gated: bool = False
    global_every: int = 1  # layers 0, n, 2n, ... attend to the whole text, the others inside local_window
    local_window: int = 128  # tokens: half on either side
    global_theta: float = 10_000.0  # rotary base of the global layers
    local_theta: float = 10_000.0
    head_style: Literal["bert", "roberta", "modernbert"] = "bert"
    head_activation: Activation = "gelu"
    head_bias: bool = True  # of the dense layer in the heads
    decoder_bias: bool = True
    tied_decoder: bool = True  # the masked-LM head uses the token table; False: its own matrix
    initializer_range: float = 0.02
    dropout: float = 0.1
    attention_dropout: float = 0.1
    scan: Literal["scan", "unroll"] = "scan"
    remat: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), typing.get_args(field.type)
            if allowed and value not in allowed:
                known = ", ".join(allowed)
                raise UserError(f"encoder.{field.name}: {value!r} is not known; choose one of {known}")
            if field.name in _AT_LEAST_1 and value < 1:
                raise UserError(f"encoder.{field.name}: {value} is too small; give at least 1")
            most = _MOST_LAYERS if field.name == "num_layers" else _MOST
            if isinstance(value, int) and value > most:
                raise UserError(f"encoder.{field.name}: {value} is too large; give at most {most}")
            share = field.name.endswith("dropout")
            least = 0 if share or field.name == "initializer_range" else 1e-30
            if isinstance(value, float) and not least <= value < (1 if share else math.inf):
                remedy = "give a share from 0 to less than 1" if share else "give a positive number"
                raise UserError(f"encoder.{field.name}: {value} is out of range; {remedy}")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"encoder.num_heads: {self.num_heads} does not divide hidden_size {self.hidden_size}; change one"
            )
        if self.positions == "rotary" and self.head_dim % 2:
            raise UserError(
                f"encoder.num_heads: rotary positions need an even size per head, not {self.head_dim}; change it"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def output_std(self) -> float:
        """Initial standard deviation of matrices that write to the residual stream."""
        if self.norm_placement == "post":
            return self.initializer_range
        # Nothing normalizes a pre-norm stream, so its writers start smaller and it does not grow with depth.
        return self.initializer_range / math.sqrt(2 * self.num_layers)

    def reads(self, field: str) -> bool:
        """Whether a field decides what this encoder computes from its parameters, or how it is trained."""
        if field in ("global_theta", "local_theta") and self.positions == "learned":
            return False
        return field not in ("local_window", "local_theta") or self.global_every > 1

    def is_global(self, layer: int) -> bool:
        """Whether that layer attends to the whole text rather than inside the local window."""
        return layer % self.global_every == 0


def encoder_config(values: Any, vocab_size: int, key: str = "encoder") -> EncoderConfig:
    """From the keys of `config.teacher` or `config.student`; the tokenizer's `vocab_size` replaces a 0.

    Raises UserError, which names config.<key>.
    """
    values = dict(values)
    values["vocab_size"] = values["vocab_size"] or vocab_size
    if values["vocab_size"] < vocab_size:
        raise UserError(
            f"{key}.vocab_size: {values['vocab_size']} is less than the tokenizer's {vocab_size}; "
            f"set it to 0 to take the tokenizer's"
        )
    try:
        return EncoderConfig(**values)
    except UserError as error:
        raise UserError(f"{key}.{str(error).removeprefix('encoder.')}") from None


# BERT as in `transformers`, as plain values; the other families are changes to it.
_BERT: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(EncoderConfig)}

# RoBERTa and XLM-R count positions from padding_idx + 1 = 2 (tables of 514 rows for 512 positions).
_ROBERTA = _BERT | {"position_offset": 2, "type_vocab_size": 1, "norm_epsilon": 1e-5, "head_style": "roberta"}

# XLM-R XL and XXL (arXiv 2105.00572).
_XLMR_XL = _ROBERTA | {"norm_placement": "pre", "embedding_norm": False, "final_norm": True, "vocab_size": 250_880}

# ModernBERT (arXiv 2412.13663).
_MODERNBERT = _BERT | {
    "num_layers": 22,
    "intermediate_size": 1152,
    "max_positions": 8192,
    "positions": "rotary",
    "type_vocab_size": 0,
    "norm_placement": "pre",
    "final_norm": True,
    "skip_first_attention_norm": True,
    "use_bias": False,
    "norm_bias": False,
    "norm_epsilon": 1e-5,
    "gated": True,
    "global_every": 3,
    "global_theta": 160_000.0,
    "head_style": "modernbert",
    "head_bias": False,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}


def _small(hidden_size: int, num_layers: int, num_heads: int, intermediate_size: int, **changes: Any) -> dict[str, Any]:
    """A model of ours: ModernBERT's shape, short texts."""
    return _MODERNBERT | {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "intermediate_size": intermediate_size,
        "max_positions": 512,
        "scan": "unroll" if num_layers <= 6 else "scan",
        **changes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Ours.
    "tiny": _small(32, 2, 2, 64),  # for smoke tests
    "student_small": _small(128, 2, 2, 256),  # 0.35 M
    "student_base": _small(256, 4, 4, 512),  # 2.7 M
    "teacher_small": _small(256, 4, 4, 512),  # 2.7 M
    "teacher_medium": _small(384, 6, 6, 768),  # 9 M
    # The sizes of the Alexa Teacher Model's chain (arXiv 2206.07808): 9.3 B teacher, 170 M and 17 M students.
    "student_17m": _small(512, 6, 8, 1152),
    "student_170m": _small(1024, 18, 16, 1792),
    "teacher_9b": _small(4096, 46, 32, 11_008, max_positions=512, remat=True),
    # Public.
    "bert_base": _BERT | {"vocab_size": 30_522},
    "mbert": _BERT | {"vocab_size": 119_547},
    "distil_mbert": _BERT | {"vocab_size": 119_547, "num_layers": 6, "type_vocab_size": 0},
    "minilm_l12_h384": _BERT | {"vocab_size": 250_037, "hidden_size": 384, "intermediate_size": 1536},
    "roberta_base": _ROBERTA | {"vocab_size": 50_265},
    "xlmr_base": _ROBERTA | {"vocab_size": 250_002},
    "xlmr_large": _ROBERTA
    | {"vocab_size": 250_002, "hidden_size": 1024, "num_layers": 24, "num_heads": 16, "intermediate_size": 4096},
    "xlmr_xl": _XLMR_XL
    | {"hidden_size": 2560, "num_layers": 36, "num_heads": 32, "intermediate_size": 10_240, "remat": True},
    "xlmr_xxl": _XLMR_XL
    | {"hidden_size": 4096, "num_layers": 48, "num_heads": 32, "intermediate_size": 16_384, "remat": True},
    "modernbert_base": _MODERNBERT | {"vocab_size": 50_368},
    "mmbert_small": _MODERNBERT | {"vocab_size": 256_000, "hidden_size": 384, "num_heads": 6, "local_theta": 160_000.0},
    "mmbert_base": _MODERNBERT | {"vocab_size": 256_000, "local_theta": 160_000.0},
}
