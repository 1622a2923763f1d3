"""Distillation at the scale of published work, compiled before any machine is rented (docs/scaling.md).

Command:   python -m kd_jax.main.compile_check --config=configs/paper_scale.py:xl_17m --topology=v5e:4x4
           python -m kd_jax.main.study --config=configs/paper_scale.py:xl_17m --workdir=DIR, with the data of
           configs/massive_wikipedia.py. The argument is TEACHER_STUDENT, with the teachers mmbert, mmbert_small, xl and
           9b and the students 170m and 17m; the default is mmbert_17m
Hardware:  at least 16 TPU v5e or 8 H100s; --config.mesh.fsdp=8 for nodes of 8 GPUs
Time:      docs/scaling.md gives lower bounds from the compiled steps
Result:    not run
"""

from ml_collections import ConfigDict

from configs import massive_wikipedia
from kd_jax.config import base
from kd_jax.types import UserError

# mmBERT base; XLM-R XL as published; and a teacher of the Alexa Teacher Model's size, with its vocabulary of 150,000
# rounded up to a multiple of 512, so that a mesh divides it.
TEACHERS = {
    "mmbert": {"preset": "mmbert_base", "max_positions": 512},
    "mmbert_small": {"preset": "mmbert_small", "max_positions": 512},
    "xl": {"preset": "xlmr_xl"},
    "9b": {"preset": "teacher_9b", "vocab_size": 150_016},
}
STUDENTS = {"170m": "student_170m", "17m": "student_17m"}
WHOLE = dict.fromkeys(["vocab", "embed", "heads", "mlp", "layers", "positions"], "")


def get_config(argument: str = "") -> ConfigDict:
    config = massive_wikipedia.get_config("smoke" if argument == "smoke" else "")
    if argument == "smoke":
        return config
    teacher, _, student = (argument or "mmbert_17m").rpartition("_")
    if teacher not in TEACHERS or student not in STUDENTS:
        known = ", ".join(f"{one}_{other}" for one in TEACHERS for other in STUDENTS)
        raise UserError(f"configs/paper_scale.py:{argument} is unknown; use one of {known}, or smoke")
    config.rows.length = 512
    config.teacher = base.encoder(**TEACHERS[teacher])
    config.student = base.encoder(STUDENTS[student], vocab_size=config.teacher.vocab_size)
    config.distill.update({"steps": 100_000, "batch_size": 256, "learning_rate": 5e-4, "warmup_steps": 5000})
    config.mesh.fsdp = 16
    if teacher.startswith("mmbert"):  # small enough to replicate on every device
        config.sharding.teacher.update(WHOLE)
    config.student.scan = "scan"  # compiles in a fraction of the time
    if student == "17m":
        config.sharding.student.update(WHOLE)
    return config
