"""Launchers as tests call them: stand-ins for sbatch, gcloud and kubectl, and a study that is planned."""

import os
import pathlib
import shlex
import subprocess
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = ("slurm.sh", "slurm_study.sh", "node.sh", "tpu_pod.sh", "gke.sh")
COMMAND = ["python", "-m", "kd_jax.main.distill", "--config=configs/a b.py", "--workdir=runs/x"]
TPU = ["--name", "kd", "--zone", "us-west4-a", "--type", "v5litepod-16", "--runtime", "v2-alpha-tpuv5-lite"]
GKE = ["--name", "kd", "--image", "registry/kd:1"]


def launch(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(["bash", LAUNCH / script, *arguments], capture_output=True, text=True, env=env, timeout=60)


def printed(script: str, *arguments: str) -> list[list[str]]:
    """The words of each line that --dry-run prints."""
    ran = launch(script, "--dry-run", *arguments)
    assert ran.returncode == 0, ran.stderr
    return [shlex.split(line) for line in ran.stdout.splitlines()]


class Tools:
    """A folder of stand-ins: `make(name, script)` puts one there; `calls()` are the words of every call of one."""

    def __init__(self, place: pathlib.Path):
        self.folder, self.log = place / "bin", place / "calls"
        self.environment = {"PATH": f"{self.folder}:{os.environ['PATH']}", "HOME": str(place / "home")}
        self.folder.mkdir()
        (place / "home").mkdir()

    def make(self, name: str, script: str) -> None:
        file = self.folder / name
        record = f'{{ printf "%s\\0" {name} "$@"; echo; }} >>{shlex.quote(str(self.log))}'
        file.write_text(f"#!/usr/bin/env bash\n{record}\n{script}\n")
        file.chmod(0o755)

    def calls(self) -> list[list[str]]:
        if not self.log.exists():
            return []
        return [line.rstrip("\0").split("\0") for line in self.log.read_text().split("\0\n") if line]


def wait_for(file: pathlib.Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, f"{file} did not come"
        time.sleep(0.02)


TABLE = (
    "01-teachers-prepare\t-\tcpu\tprepare-1\n"
    "02-teachers-pretrain\t01-teachers-prepare\taccelerator\tpretrain-teacher-2\n"
    "03-students-pretrain\t01-teachers-prepare\taccelerator\tmlm-3 mlm-4 mlm-5\n"
    "04-report\t02-teachers-pretrain,03-students-pretrain\tcpu\treport\n"
)


def planned_study(tools: Tools, place: pathlib.Path) -> list[str]:
    """Arguments of a study, and a python that plans it as TABLE has it."""
    workdir = place / "a study"
    workdir.mkdir()
    (place / "table").write_text(TABLE)
    tools.make("planner", f'cp "{place / "table"}" "{workdir / "plan.tsv"}"; echo "JAX on $JAX_PLATFORMS"')
    return ["--python", "planner", "--config=configs/x.py", f"--workdir={workdir}", "--config.seed=1"]
