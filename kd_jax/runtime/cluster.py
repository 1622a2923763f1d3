"""This process's number in a job of several: from flags, or from a TPU pod, SLURM, Open MPI or Kubernetes."""

import os
import re
from typing import NamedTuple

# JAX's cluster detection. `jax.distributed.initialize()` uses it too, but cannot say that a process is on its own, and
# gives a process that has a SLURM node to itself only one of the node's devices.
from jax._src import clusters

from kd_jax.types import UserError

TIMEOUT = 300.0  # seconds within which all processes must have arrived


class Place(NamedTuple):
    """One process of a job."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # of this host, by number; None: all of them


def cores() -> list[int]:
    """The cores of this host that this process may use, by number."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def from_flags(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """The process that the flags describe, or else the environment; None for a process on its own.

    processes=1 alone says that this process is on its own, whatever the environment says. Raises UserError.
    """
    if processes == 1:
        return None
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None or value == ""]
    if len(missing) == len(given):
        return from_environment()
    if missing or coordinator is None or processes is None or process is None:
        raise UserError(
            f"{' and '.join(missing)}: missing beside {' and '.join(sorted(given.keys() - set(missing)))}; give all of "
            "--coordinator=HOST:PORT --processes=N --process=I, or none"
        )
    return _checked(Place(coordinator, processes, process), "--")


def from_environment() -> Place | None:
    """The process as a TPU pod, SLURM, Open MPI or an Indexed Kubernetes Job describes it; None outside of them, and in
    a job of one process.

    A process that has a host to itself takes all its devices; of several on a host each takes the device of its number.
    """
    for cluster in clusters.ClusterEnv._cluster_types:
        if cluster.opt_in_only_method or _irrelevant(cluster.__name__) or not cluster.is_env_present():
            continue
        name = cluster.__name__.removesuffix("Cluster")
        try:
            processes = cluster.get_process_count()
            if processes == 1:
                return None
            coordinator = os.environ.get("JAX_COORDINATOR_ADDRESS") or cluster.get_coordinator_address(
                timeout_secs=int(TIMEOUT), override_coordinator_port=os.environ.get("JAX_COORDINATOR_PORT")
            )
            number = cluster.get_local_process_id()
            devices = None if number is None or _alone_on_its_host(processes) else (number,)
            place = Place(coordinator, processes, cluster.get_process_id(), devices)
        except Exception as error:
            message = " ".join(str(error).split())
            raise UserError(
                f"the environment looks like {name}, but does not say which process this is ({message}); give "
                "--coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to run alone"
            ) from error
        return _checked(place, f"{name}: ")
    return None


def _irrelevant(name: str) -> bool:
    """Whether a kind of cluster is skipped without asking: asking Kubernetes or the TPU metadata server takes time."""
    if name.startswith("K8s"):
        return "JOB_COMPLETION_INDEX" not in os.environ  # a pod without an index is not part of a job
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return "Tpu" in name and bool(platforms) and "tpu" not in platforms


def _alone_on_its_host(processes: int) -> bool:
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1"
    return os.environ.get("SLURM_STEP_NUM_NODES") == str(processes)


def _checked(place: Place, prefix: str) -> Place:
    port = re.fullmatch(r".+:(\d+)", place.coordinator)
    if not port or not 0 < int(port.group(1)) < 2**16:
        raise UserError(f"{prefix}coordinator: {place.coordinator!r} is no HOST:PORT; name the host of process 0")
    if place.processes < 1:
        raise UserError(f"{prefix}processes: {place.processes} is below 1; give the number of processes of the job")
    if not 0 <= place.process < place.processes:
        raise UserError(
            f"{prefix}process: {place.process} is not one of {place.processes} processes; count from 0 to "
            f"{place.processes - 1}"
        )
    return place
