"""kd_jax: on which text should a student be distilled?

The names below are the public API. Each is imported when it is first used, so `import kd_jax` is fast and leaves jax
alone. What is not listed here may change without notice.
"""

import importlib
import importlib.metadata
import os
from typing import Any

__version__ = "0.2.0"

# Name -> the module below kd_jax that defines it.
_API = {
    # Text as packed rows, and their mixture
    "RowStore": "data.rows",
    "StoreWriter": "data.rows",
    "TransferSet": "data.transfer_set",
    "MaskedBatches": "data.batches",
    "CleanBatches": "data.batches",
    # Models
    "EncoderConfig": "models.encoder_config",
    "Functional": "models.functional",
    "WithProjections": "models.projection",
    # Losses: each takes 0/1 weights and returns (sum, weight)
    "masked_cross_entropy": "losses.logits",
    "kl_divergence": "losses.logits",
    "top_k_divergence": "losses.sparse",
    "sampled_divergence": "losses.sparse",
    "hidden_distance": "losses.features",
    "relation_divergence": "losses.features",
    "text_means": "losses.features",
    "blocked_losses": "losses.blocked",
    "fused_losses": "losses.fused",
    "Decoder": "losses.tiling",
    # Steps: an objective, and the pure function (state, frozen, batch) -> (state, metrics) that minimizes it
    "DistillSettings": "steps.distill",
    "make_distill_objective": "steps.distill",
    "make_pretrain_objective": "steps.pretrain",
    "make_dc_objective": "steps.finetune",
    "make_icner_objective": "steps.finetune",
    "make_train_step": "steps.train_step",
    # Evaluation: records of utterances, metrics of records, which differences are more than chance
    "domain_record": "evaluation.records",
    "intent_slot_record": "evaluation.records",
    "read_records": "evaluation.records",
    "results": "evaluation.results",
    "error_counts": "evaluation.significance",
    "compare": "evaluation.significance",
    "decide": "evaluation.significance",
    # Finetuned models, asked for the domain, intent and slots of texts
    "Predictor": "main.predict",
}

__all__ = ["__version__", *_API]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Cached in the module, so this function is asked once for each name.
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_API[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _switch_off_wrong_sums() -> None:
    """Sets the XLA flag without which jaxlib 0.10.2 sums wrongly on CPUs (https://github.com/jax-ml/jax/issues/39103).

    XLA reads XLA_FLAGS once, when jax starts its first backend; after that, setting it changes nothing.
    """
    try:
        affected = importlib.metadata.version("jaxlib") == "0.10.2"
    except importlib.metadata.PackageNotFoundError:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    # Only that release: XLA aborts the process on a flag that it does not know.
    if affected and "xla_cpu_experimental_ynn_fusion_type" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_experimental_ynn_fusion_type=-reduce".lstrip()


_switch_off_wrong_sums()
