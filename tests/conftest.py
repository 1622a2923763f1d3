"""Eight CPU devices for every test, before jax starts; rank promotion is an error."""

import os
import pathlib

from tests.support.xla_flags import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = os.environ.get("KD_JAX_TEST_PLATFORMS", "cpu")  # cuda,cpu for tests marked gpu
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count=8 {FAST_COMPILATION}"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    """The folder of larger real data, or a skip."""
    folder = os.environ.get("KD_JAX_DATA", "")
    if not folder or not pathlib.Path(folder).is_dir():
        pytest.skip("KD_JAX_DATA names no folder; this test needs the larger data")
    return pathlib.Path(folder)
