"""Parameters of a checkpoint in memory, by way of a file, as `import_model` reads them."""

import pathlib
import tempfile

import jax
import numpy as np
from safetensors.numpy import save_file

from kd_jax.config.execution import Mesh
from kd_jax.models.encoder_config import EncoderConfig
from kd_jax.models.functional import Functional
from kd_jax.models.huggingface.files import SINGLE, TensorFiles, check_files, load_params
from kd_jax.trainer.mesh import make_mesh, shardings


def from_huggingface(tensors: dict[str, np.ndarray], config: EncoderConfig) -> dict:
    """Float32 parameters of kind "mlm" on one device; UserError as `check_files` raises it."""
    model, mesh = (
        Functional("mlm", config),
        make_mesh(Mesh(data=1, fsdp=1, tensor=1), jax.devices()[:1]),
    )
    layout = shardings(mesh, model.logical_axes(), model.abstract())
    with tempfile.TemporaryDirectory() as folder:
        whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
        save_file(whole, pathlib.Path(folder) / SINGLE)
        with TensorFiles(folder) as files:
            rows = config.vocab_size
            assert check_files(files, config, stored_vocab_size=rows), "the checkpoint has no masked-LM head"
            params = load_params(files, config, layout, stored_vocab_size=rows, head_key=jax.random.key(0))
    return jax.tree.map(np.asarray, params)
