"""`import kd_jax`: the names that it offers, what it leaves alone, and the XLA flag that it sets."""

import importlib
import os
import subprocess
import sys

import pytest

import kd_jax

FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"

# A product of 3 x 3 with 32,769 rows, squared and summed in each; of the last row, (32768, 0, 0), that is 2 ** 30.
REPRODUCER = """
import kd_jax
import jax, jax.numpy as jnp
matrix, rows = jnp.eye(3), jnp.zeros((32_769, 3)).at[:, 0].set(jnp.arange(32_769))
sums = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
print(int(sums[-1]))
"""


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    line = [sys.executable, "-c", code]
    values = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(line, env=values, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", kd_jax.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(kd_jax, name) is not None
    assert name in dir(kd_jax)


def test_a_public_name_is_the_object_of_its_module():
    from kd_jax import TransferSet

    assert TransferSet is importlib.import_module("kd_jax.data.transfer_set").TransferSet


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'kd_jax' has no attribute 'TransferSets'"):
        _ = kd_jax.TransferSets


def test_import_leaves_jax_alone():
    assert python("import kd_jax, sys; print('jax' in sys.modules, 'numpy' in sys.modules)") == "False False"


def test_compiled_sums_are_right():
    assert int(python(REPRODUCER)) == 2**30


@pytest.mark.parametrize(
    "version, flags, expected",
    [
        ("0.10.2", "", FLAG),
        ("0.10.2", "--xla_dump_to=x", f"--xla_dump_to=x {FLAG}"),
        ("0.10.2", "--xla_cpu_experimental_ynn_fusion_type=", "--xla_cpu_experimental_ynn_fusion_type="),
        ("0.10.3", "--xla_dump_to=x", "--xla_dump_to=x"),
        ("0.10.1", "", ""),
    ],
)
def test_flag_is_set_for_the_affected_release_alone(version, flags, expected):
    code = f"import importlib.metadata, os; importlib.metadata.version = lambda name: {version!r}; import kd_jax"
    assert python(f"{code}; print(os.environ['XLA_FLAGS'])", XLA_FLAGS=flags) == expected
