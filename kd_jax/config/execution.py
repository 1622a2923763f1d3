"""Settings that change how a run is executed and watched, never what it computes."""

from dataclasses import dataclass, field, fields

from ml_collections import ConfigDict

from kd_jax.config.settings import check, one_of, read

AXES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh: `config.mesh`.

    data, fsdp, tensor: >= 1, or -1 on one axis for the devices that are left.
    slices: TPU slices or nodes with a slower network between them; 0 asks the devices.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 0


@dataclass(frozen=True)
class Rules:
    """Kind of parameter dimension -> the mesh axis that it is split along: `config.sharding.teacher` and `.student`.

    Several axes are joined by commas; "" keeps the dimension whole on every device.
    """

    vocab: str = "tensor"
    embed: str = "fsdp"
    heads: str = "tensor"
    mlp: str = "tensor"
    layers: str = ""
    positions: str = ""

    def __post_init__(self):
        remedy = f"give one of {', '.join(AXES)}, several joined by commas, or '' to keep the dimension whole"
        for one in fields(self):
            named = self.axes(one.name)
            known = len(set(named)) == len(named) and set(named) <= set(AXES)
            check(known, one.name, f"{getattr(self, one.name)!r} is not a mesh axis", remedy)

    def axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes of one kind of dimension."""
        return tuple(axis.strip() for axis in getattr(self, name).split(",") if axis.strip())


@dataclass(frozen=True)
class Sharding:
    """How parameters are sharded, the frozen teacher's and those that are trained: `config.sharding`.

    teacher_once: with accumulation, the teacher predicts a step's whole batch before it is split into micro-batches,
        so that its shards are gathered once per step; takes the memory of its forward pass over all rows.
    """

    teacher: Rules = field(default_factory=Rules)
    student: Rules = field(default_factory=Rules)
    teacher_once: bool = False


@dataclass(frozen=True)
class Storage:
    """Everything may be on gs:// or s3:// (docs/storage.md): `config.storage`.

    local: folder of this host for copies of remote files; empty takes $KD_JAX_CACHE, or kd_jax in
        $XDG_CACHE_HOME or ~/.cache.
    """

    local: str = ""


@dataclass(frozen=True)
class Wandb:
    """Weights & Biases, imported only where a project is named: `config.wandb`.

    project: empty: not used.
    entity: user or team; empty takes the account's default.
    group: e.g. the study that the run belongs to.
    mode: online | offline (written to the run's directory, for `wandb sync`).
    """

    project: str = ""
    entity: str = ""
    group: str = ""
    mode: str = "online"

    def __post_init__(self):
        one_of(self.mode, ("online", "offline"), "mode")


@dataclass(frozen=True)
class Execution:
    """What every command reads at the top level of the config, apart from what it computes.

    attention: fused (kernels for TPUs and GPUs that keep scores out of main memory; elsewhere interpreted, for trials),
        plain, or auto: fused where a kernel supports it (rows of a multiple of 128 tokens on TPUs, 64 on GPUs, without
        attention_dropout), else plain. Results differ by rounding. It applies to training and teacher caches. The
        default is plain until the kernels have run on such devices.
    logits: fused (kernels for TPUs and NVIDIA GPUs that keep logits out of main memory; elsewhere interpreted, for
        trials), plain (in blocks; the default for the same reason), or auto: fused where there is a kernel
        (docs/performance.md). Results differ by rounding.
    progress: progress bars on a terminal.
    tensorboard: write TensorBoard events.
    watchdog_seconds: a step, an evaluation's batch or a wait for other processes that takes longer is reported with
        the stacks of all threads, on standard error and in stalled-<process>.txt of the run's directory; 0 turns it
        off, and it should be longer than the longest compilation.
    watchdog_exit: also end the process then, with the exit code on which launchers start it again.
    cache_part, cache_parts: several machines may write one cache: this one writes every cache_parts-th part, beginning
        with cache_part.
    """

    mesh: Mesh = field(default_factory=Mesh)
    sharding: Sharding = field(default_factory=Sharding)
    storage: Storage = field(default_factory=Storage)
    wandb: Wandb = field(default_factory=Wandb)
    attention: str = "plain"
    logits: str = "plain"
    progress: bool = True
    tensorboard: bool = True
    watchdog_seconds: float = 1800.0
    watchdog_exit: bool = False
    cache_part: int = 0
    cache_parts: int = 1

    def __post_init__(self):
        one_of(self.attention, ("auto", "plain", "fused"), "attention")
        one_of(self.logits, ("auto", "plain", "fused"), "logits")
        problem = f"fused logits are not split along tensor = {self.mesh.tensor}"
        check(self.logits != "fused" or self.mesh.tensor == 1, "logits", problem, "use auto, or config.mesh.tensor=1")
        seconds = self.watchdog_seconds
        check(seconds >= 0, "watchdog_seconds", f"{seconds} is negative", "1800 is usual, 0 turns it off")
        part, parts = self.cache_part, self.cache_parts
        remedy = "count from 0 to cache_parts - 1"
        check(0 <= part < parts, "cache_part", f"{part} is none of {parts} parts", remedy)


def read_execution(config: ConfigDict) -> Execution:
    """The execution settings of a whole config. Raises UserError."""
    return read(Execution, config, "")
