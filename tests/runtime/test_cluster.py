"""Where a process belongs: flags, and the environments of TPU pods, SLURM, Open MPI and Kubernetes."""

import pytest

from kd_jax.runtime import cluster
from kd_jax.runtime.cluster import Place, from_environment, from_flags
from kd_jax.types import UserError

SLURM = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_NODELIST": "node[007-010]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    """An environment that tells of no cluster."""
    for name in (*SLURM, *OPEN_MPI, "JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)


def enter(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_process_on_its_own_has_no_place():
    assert from_flags(None, None, None) is None
    assert from_flags(None, 1, None) is None


def test_flags_name_the_place_and_come_before_the_environment(monkeypatch):
    enter(monkeypatch, SLURM)
    assert from_flags("head:1234", 2, 0) == Place("head:1234", 2, 0)
    assert from_flags(None, 1, None) is None, "--processes=1 keeps out of the job that the environment tells of"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((None, 2, None), "--coordinator and --process: missing beside --processes"),
        (("head:1", None, 0), "--processes: missing beside --coordinator and --process"),
        (("head", 2, 0), "--coordinator: 'head' is no HOST:PORT"),
        (("head:70000", 2, 0), "--coordinator: 'head:70000' is no HOST:PORT"),
        (("head:1", 0, 0), "--processes: 0 is below 1"),
        (("head:1", 2, 2), "--process: 2 is not one of 2 processes; count from 0 to 1"),
        (("head:1", 2, -1), "--process: -1 is not one of 2 processes"),
    ],
)
def test_half_a_place_is_refused(flags, words):
    with pytest.raises(UserError) as refused:
        from_flags(*flags)
    assert words in str(refused.value)


def test_slurm_with_a_node_for_each_process_gives_it_all_devices(monkeypatch):
    enter(monkeypatch, SLURM)
    place = from_environment()
    assert place is not None and place.coordinator.startswith("node007:")
    assert place[1:] == (4, 2, None)


def test_slurm_with_several_processes_on_a_node_gives_each_a_device(monkeypatch):
    enter(monkeypatch, SLURM | {"SLURM_STEP_NUM_NODES": "2", "SLURM_LOCALID": "1", "SLURM_PROCID": "3"})
    place = from_environment()
    assert place is not None and place[1:] == (4, 3, (1,))


def test_slurm_with_one_task_is_no_job(monkeypatch):
    enter(monkeypatch, SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "1"})
    assert from_environment() is None


def test_an_allocation_without_a_step_is_no_job(monkeypatch):
    enter(monkeypatch, {"SLURM_JOB_ID": "4242", "SLURM_NTASKS": "4"})
    assert from_environment() is None


def test_open_mpi(monkeypatch):
    enter(monkeypatch, OPEN_MPI)
    place = from_environment()
    assert place is not None and place.coordinator.startswith("10.96.0.1:")
    assert place[1:] == (4, 3, (1,))
    enter(monkeypatch, {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "JAX_COORDINATOR_PORT": "999"})
    assert from_environment() == Place("10.96.0.1:999", 4, 3)


def test_an_environment_that_makes_no_sense_is_told_with_the_way_out(monkeypatch):
    enter(monkeypatch, SLURM | {"SLURM_PROCID": "second"})
    with pytest.raises(UserError, match=r"looks like Slurm.*second.*or --processes=1 to run alone"):
        from_environment()
    enter(monkeypatch, SLURM | {"SLURM_PROCID": "4"})
    with pytest.raises(UserError, match="Slurm: process: 4 is not one of 4 processes"):
        from_environment()


def test_a_pod_without_an_index_is_not_asked(monkeypatch):
    asked = []
    kind = next(one for one in cluster.clusters.ClusterEnv._cluster_types if one.__name__.startswith("K8s"))
    monkeypatch.setattr(kind, "is_env_present", lambda: asked.append(1) or False)
    assert from_environment() is None and not asked
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setattr(kind, "is_env_present", lambda: True)
    monkeypatch.setattr(kind, "get_process_count", lambda: 3)
    monkeypatch.setattr(kind, "get_process_id", lambda: 1)
    monkeypatch.setattr(kind, "get_coordinator_address", lambda **_: "study-0.study:55527")
    assert from_environment() == Place("study-0.study:55527", 3, 1)


def test_a_tpu_pod_takes_all_devices_of_its_host(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    kind = next(one for one in cluster.clusters.ClusterEnv._cluster_types if one.__name__ == "GkeTpuCluster")
    monkeypatch.setattr(kind, "is_env_present", lambda: True)
    monkeypatch.setattr(kind, "get_process_count", lambda: 8)
    monkeypatch.setattr(kind, "get_process_id", lambda: 5)
    monkeypatch.setattr(kind, "get_coordinator_address", lambda **_: "t1v-0:8476")
    assert from_environment() == Place("t1v-0:8476", 8, 5)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert from_environment() is None, "a run on the CPU of a TPU host is none of the pod's"
