"""Speed and memory of distillation, finetuning and prediction, against common alternatives and PyTorch.

Command:   python -m benchmarks --config=configs/benchmark.py --workdir=runs/benchmark
           With KD_JAX_DATA=DIR set, it reads MASSIVE and plain text from there (see configs/massive.py) instead of the
           embedded default; pip install torch==2.13.0 adds the comparison with PyTorch
Hardware:  two CPU cores, 16 GB of memory; run nothing else on the machine
Time:      about 20 minutes
Result:    docs/performance.md
"""

import os

from ml_collections import ConfigDict

from kd_jax.config import base

LANGUAGES = ("de", "en", "es", "fr")
LOCALES = ("de-DE", "en-US", "es-ES", "fr-FR")


def get_config(argument: str = "") -> ConfigDict:
    config = base.get_config()
    if os.environ.get("KD_JAX_DATA"):
        config.nlu.update({"format": "massive", "path": "${KD_JAX_DATA}/nlu/massive", "locales": LOCALES})
        config.sources.generic = base.source(
            "generic", "text", LANGUAGES, path="${KD_JAX_DATA}/generic/{language}.txt.gz", spoken_share=0.7
        )
        config.sources.generic.max_texts = 20_000
    else:
        config.nlu.update({"format": "embedded", "locales": LOCALES})
        config.sources.generic = base.source("generic", "embedded", LANGUAGES, spoken_share=0.7)
    config.sources.task = base.source("task", "utterances", config.nlu.get_oneway_ref("locales"))
    config.tokenizer.vocab_size = 8000
    config.rows.length = 64

    # Ten times the student's parameters; a wider initialization, so that the untrained teacher's predictions differ.
    config.teacher = base.encoder("teacher_small", num_layers=5, initializer_range=0.05)
    config.student = base.encoder("student_small")
    config.compute_dtype = "float32"
    config.distill.update({"steps": 1000, "batch_size": 64, "warmup_steps": 0, "schedule": "constant"})
    config.finetune.update({"batch_size": 128, "warmup_steps": 0, "schedule": "constant", "dropout": 0.0})

    config.benchmark = ConfigDict(
        {
            "sections": ("step", "finetune", "scaling"),  # what is measured
            "texts": ConfigDict({"utterances": 1.0, "mixed": 0.7, "generic": 0.0}),  # name -> share of task tokens
            "batches": 4,  # distinct batches, one step each; a pass runs them all
            "rounds": 5,  # measured passes of each variant, in alternation
            "device": "cpu",  # cpu | gpu, of the section "step"; with gpu set compute_dtype=bfloat16
            "threads": 2,  # cores of each worker; 0 leaves it to the frameworks
            "check_steps": 3,  # first steps whose losses must agree
            "tolerance": 1e-3,  # largest relative difference between the losses of two variants
            "gemm_size": 2048,  # rows and columns of the matrices whose product defines the peak
            "gemm_steps": 4,  # products per pass
            # The section "scaling" changes one of these at a time and takes the other sizes from the blocks above.
            "scaling": ConfigDict(
                {
                    "batch": (16, 32, 64, 128),  # rows
                    "length": (32, 64, 128, 256),  # tokens per row, with proportionally fewer rows
                    "vocabulary": (4000, 8000, 16_000, 32_000, 64_000),  # tokens
                    "layers": (1, 2, 4, 8),  # of the student
                    "devices": (1, 2, 4, 8),  # virtual CPU devices, which share the cores
                }
            ),
        }
    )
    if argument != "smoke":
        return config
    config = base.smoke(config)
    config.teacher = base.encoder("tiny", num_layers=3, initializer_range=0.05)
    config.distill.warmup_steps = 0
    config.finetune.update({"batch_size": 16, "warmup_steps": 0})
    config.benchmark.update({"batches": 2, "rounds": 2, "check_steps": 2, "gemm_size": 128, "gemm_steps": 2})
    config.benchmark.scaling.update(
        {"batch": (8, 16), "length": (16, 32), "vocabulary": (500, 1000), "layers": (1, 2), "devices": (1, 2)}
    )
    return config
