"""Where a process belongs in a job of several: what the flags say, or a TPU pod, SLURM, Open MPI or Kubernetes."""

import os
import re
from typing import NamedTuple

from jax._src import clusters  # JAX's detection of clusters, of which its public function tells nothing

from kd_jax.types import UserError

TIMEOUT = 300.0  # seconds in which all processes must have come


class Place(NamedTuple):
    """One process's place in a job."""

    coordinator: str  # host:port of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # of this host, by number; None: all of them


def from_flags(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """The place that the flags name, or else the environment; None for a process on its own.

    processes=1 alone says that this process is on its own, whatever the environment says. Raises UserError.
    """
    if processes == 1:
        return None
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None or value == ""]
    if len(missing) == len(given):
        return from_environment()
    if missing:
        raise UserError(
            f"{' and '.join(missing)}: missing beside {' and '.join(sorted(given.keys() - set(missing)))}; give all of "
            "--coordinator=HOST:PORT --processes=N --process=I, or none"
        )
    assert coordinator is not None and processes is not None and process is not None
    return _checked(Place(coordinator, processes, process), "--")


def from_environment() -> Place | None:
    """The place that a TPU pod, SLURM, Open MPI or an indexed Kubernetes job gives this process, found as JAX does.

    A process that has a host to itself takes all its devices; of several on a host each takes the device of its
    number. None outside of them and for a job of one process.
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
                f"the environment looks like {name}, but does not say where this process belongs ({message}); give "
                "--coordinator=HOST:PORT --processes=N --process=I, or --processes=1 to run alone"
            ) from error
        return _checked(place, f"{name}: ")
    return None


def _irrelevant(name: str) -> bool:
    """Whether a kind of cluster need not be asked: a pod without an index is no part of a job, and asking costs."""
    if name.startswith("K8s"):
        return "JOB_COMPLETION_INDEX" not in os.environ
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
            f"{prefix}process: {place.process} is none of {place.processes} processes; count from 0 to "
            f"{place.processes - 1}"
        )
    return place
