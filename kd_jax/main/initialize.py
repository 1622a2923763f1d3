"""Initializes a student from its teacher, as `distill` does with distill.init, and trains nothing.

It is the control for what distillation adds.

python -m kd_jax.main.initialize --config=configs/FILE.py --workdir=DIR \\
    --config.prepared=DIR --config.teacher_checkpoint=DIR --config.distill.init=teacher
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from kd_jax.config import identity, require
from kd_jax.config.data import Vocabulary
from kd_jax.config.execution import read_execution
from kd_jax.config.settings import read
from kd_jax.config.training import Distill
from kd_jax.data.prepared import Prepared
from kd_jax.data.vocabulary import seen_by_student
from kd_jax.jobs import teachers
from kd_jax.jobs.job import model_layout
from kd_jax.jobs.masked_lm import HELDOUT, encoder_model
from kd_jax.main import command
from kd_jax.models.functional import parameter_count
from kd_jax.models.projection import WithProjections
from kd_jax.runtime.files import write_json
from kd_jax.trainer.checkpoint import FOLDER, Checkpoints
from kd_jax.trainer.mesh import make_mesh
from kd_jax.trainer.run_directory import RunDirectory
from kd_jax.trainer.state import params_notes


def keys(config: ConfigDict) -> tuple[str, ...]:
    """The config keys that decide what this command writes."""
    del config
    return ("prepared", "seed", "student", "vocabulary", teachers.KEY, "distill", "compute_dtype")


def work(config: ConfigDict, workdir: pathlib.Path) -> command.Work:
    """Writes a finished run whose checkpoint of step 0 holds the student that `distill` would start with."""
    del workdir
    distill, execution = read(Distill, config.distill, "distill"), read_execution(config)
    problem = "the student would start at random, and has nothing of its teacher"
    require(distill.init == "teacher", "distill.init", problem, "set it to teacher")
    prepared = seen_by_student(Prepared(config.prepared), read(Vocabulary, config.vocabulary, "vocabulary"))
    mesh, rules = make_mesh(execution.mesh), execution.sharding
    student = encoder_model(config.student, prepared, config.compute_dtype, "student")
    teacher = teachers.find_teachers(config[teachers.KEY], prepared, config.compute_dtype, rules.teacher)[0]
    init, remarks = teachers.initialization(distill, WithProjections(student), teacher, prepared, mesh)

    def start(directory: RunDirectory) -> dict[str, Any]:
        counts = parameter_count(student.abstract())
        notes = {"tokenizer_fingerprint": prepared.tokenizer.fingerprint, "remarks": remarks, "parameters": counts}
        directory.start(**notes)
        layout = model_layout(student, mesh, rules.student)
        draw = jax.jit(lambda seed: student.init(jax.random.key(seed)), out_shardings=layout)
        params = jax.device_put(init(draw(np.int32(config.seed))), layout)
        with Checkpoints(directory.path / FOLDER, keep=1) as checkpoints:
            values = {"step": jnp.int32(0), "params": params}
            checkpoints.save(0, values, {"identity": {"config": identity(directory.config)}})
            checkpoints.wait()
        if jax.process_index() == 0:
            write_json(directory.path / HELDOUT, [])  # its masked-LM head is untrained with this encoder
        return params_notes(params)

    return start


COMMAND = command.Command("initialize", "Starts a student from layers of its teacher.", keys, work)
run = COMMAND.run

if __name__ == "__main__":
    COMMAND.main()
