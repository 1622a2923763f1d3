"""Named encoder sizes as plain values; `encoder_config.EncoderConfig` says what each field means.

The figures of public models are those of their published config files; parameter counts are without embeddings.
"""

from typing import Any

# The shape of BERT (arXiv 1810.04805) in `transformers`, and what the other families change in it.
_BERT: dict[str, Any] = {
    "vocab_size": 0,  # 0: the tokenizer's
    "hidden_size": 768,
    "num_layers": 12,
    "num_heads": 12,
    "intermediate_size": 3072,
    "max_positions": 512,  # tokens in the longest text
    "positions": "learned",
    "position_offset": 0,  # added to each position before the table is read
    "type_vocab_size": 2,  # token types; every token has type 0
    "norm_placement": "post",
    "embedding_norm": True,
    "final_norm": False,
    "skip_first_attention_norm": False,
    "use_bias": True,  # of linear layers in the encoder
    "norm_bias": True,
    "norm_epsilon": 1e-12,
    "activation": "gelu",
    "gated": False,
    "global_every": 1,  # layers 0, n, 2n ... attend to the whole text, the others inside local_window
    "local_window": 128,  # tokens: half on either side
    "global_theta": 10_000.0,  # rotary base of the global layers
    "local_theta": 10_000.0,
    "head_style": "bert",
    "head_activation": "gelu",
    "head_bias": True,  # of the dense layer in the heads
    "decoder_bias": True,
    "initializer_range": 0.02,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "scan": "scan",
    "remat": False,
}

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
