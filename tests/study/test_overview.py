"""What `study` does in place of running, as a user calls it; and a study that a stand-in for SLURM runs job by job."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from kd_jax.main import study
from kd_jax.study import job_plan, overview
from kd_jax.types import UserError
from tests.support import pretrained

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("switch", ["--plan", "--dry-run", "--status", "--stage=x"])
def test_the_command_of_a_stage_is_the_one_given_without_its_switch(switch):
    argv = ["--config=configs/x.py", switch, "--workdir=runs/x", "--config.seed=1"]
    assert job_plan.arguments(argv) == ["python", "-m", "kd_jax.main.study", argv[0], *argv[2:]]
    assert job_plan.arguments(argv[:2])[-1] == "--workdir=WORKDIR"


def test_a_dry_run_prints_every_stage_and_the_totals(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", "--config=configs/quickstart.py", "--dry-run"])
    config = pretrained.get_config()
    study.INSTEAD["dry-run"][0](config, None)
    said = capsys.readouterr().out
    stages = study.open_study(config, overview.NOWHERE).planned()
    assert "\n  python -m kd_jax.main.study --config=configs/quickstart.py --workdir=WORKDIR\n" in said
    assert "--stage=" not in said
    for one in stages[:-1]:
        assert re.search(rf"^{re.escape(one.name)} +{one.command}( |$)", said, re.M), one.name
    assert re.search(r"^pretrain-teacher +pretrain +512k +2\.08T ", said, re.M)
    assert re.search(rf"^all +{len(stages) - 1} ", said, re.M)
    assert (
        "parameters" in said
        and "The largest stage takes" in said
        and "Assumed, since the data are not prepared: 2,000" in said
    )
    assert re.search(r"it takes \d.* or more: [\d.]+T FLOPs at [\d.]+[MGT] a second", said)
    assert not overview.NOWHERE.exists()


def test_plan_and_status_need_a_workdir():
    for name in ("plan", "status"):
        with pytest.raises(UserError, match="--workdir is missing"):
            study.INSTEAD[name][0](pretrained.get_config(), None)


def test_a_config_that_cannot_run_is_refused_before_it_is_planned(tmp_path):
    config = pretrained.get_config()
    config.distill.kl.temperature = -1.0
    with pytest.raises(UserError, match=r"config\.distill\.kl\.temperature"):
        study.INSTEAD["plan"][0](config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["schedule_sets", "average_sets", "chain_sets"])
def test_students_without_a_cache_are_refused_where_it_is_needed(name):
    for changes in ({"center": True}, {"masked_from": 0.5, "kl": {"weight": 1.0}}):
        config = pretrained.get_config("smoke")
        config.distill.update({"clean": True, "kl": {"weight": 0.0}, "mlm": {"weight": 0.0}, "hidden": {"weight": 1.0}})
        config.distill.update(changes)
        study.open_study(config, overview.NOWHERE)
        config.study[name] = ("task",)
        with pytest.raises(UserError, match=rf"config\.study\.{name}: these students have their teacher in the loop"):
            study.open_study(config, overview.NOWHERE)


def test_a_change_of_text_that_is_never_reached_is_refused():
    config = pretrained.get_config("smoke")
    config.distill.update({"clean": True, "hidden": {"weight": 1.0}, "masked_from": 0.9, "steps": 4})
    with pytest.raises(UserError, match=r"config\.distill\.masked_from: 0\.9 of 4 steps leaves no step"):
        study.open_study(config, overview.NOWHERE)


def test_a_plan_is_written_with_what_each_stage_takes(tmp_path, capsys):
    study.INSTEAD["plan"][0](pretrained.get_config("smoke"), tmp_path)
    values = json.loads((tmp_path / "plan.json").read_text())
    teacher = next(one for one in values["stages"] if one["name"] == "pretrain-teacher")
    assert teacher["resources"]["accelerator"] and teacher["resources"]["flops"] > 0
    assert teacher["resources"]["memory_bytes"] == pytest.approx(sum(teacher["resources"]["memory"].values()), abs=9)
    said = capsys.readouterr().out
    assert f"{len(values['stages'])} stages, 0 of them done" in said
    assert all(f"  {one['name']}: {len(one['stages'])}" in said for one in values["arrays"])


@pytest.mark.parametrize(
    "number, units, said",
    [
        (0, "UNITS", ""),
        (999, "UNITS", "999"),
        (12_300, "UNITS", "12.3k"),
        (2.08e12, "UNITS", "2.08T"),
        (3 * 2**20, "BYTES", "3 MiB"),
    ],
)
def test_numbers_are_written_for_people(number, units, said):
    assert overview.amount(number, getattr(overview, units)) == said


CONFIG = """
from tests.support import pretrained
from ml_collections import ConfigDict

def get_config(argument=""):
    config = pretrained.get_config("smoke")
    config.tensorboard = config.progress = False
    config.study.transfer_sets = ConfigDict({"task": 1.0})
    config.study.update({"adapted_sets": (), "tasks": ("dc",), "seeds": (0,), "recipe_learning_rates": (1e-3, 3e-3)})
    config.study.latency = False
    return config
"""

# An sbatch that runs every job of an array at once and prints its id; a job that asks to be requeued runs again.
SBATCH = r"""
array=0-0
for word in "$@"; do
  case "$word" in
    --array=*) array=${word#--array=} array=${array%\%*} ;;
    --dependency=afterok:*) for id in ${word#*afterok:}; do :; done; IFS=: read -r -a needs <<<"${word#*afterok:}" ;;
    */launch/slurm.sh) break ;;
  esac
  shift
done
for id in "${needs[@]}"; do [[ -e "$STATE/ended-$id" ]] || { echo "job $id has not ended well" >&2; exit 1; }; done
echo x >>"$STATE/jobs"
export SLURM_JOB_ID=$((100 + $(wc -l <"$STATE/jobs"))) SLURM_JOB_NODELIST=here
for ((task = 0; task <= ${array#*-}; task++)); do
  export SLURM_RESTART_COUNT=0
  if [[ "$array" != 0-0 ]]; then export SLURM_ARRAY_JOB_ID=$SLURM_JOB_ID SLURM_ARRAY_TASK_ID=$task; fi
  while true; do
    bash "$@" >>"$STATE/log" 2>&1 && break
    code=$?
    [[ -e "$STATE/requeue" ]] || exit "$code"
    rm "$STATE/requeue"
    SLURM_RESTART_COUNT=$((SLURM_RESTART_COUNT + 1))
  done
done
touch "$STATE/ended-$SLURM_JOB_ID"
echo "$SLURM_JOB_ID"
"""

# An srun that is preempted the first time that a student is distilled.
SRUN = r"""
while [[ "$1" == --* ]]; do shift; done
if [[ "$*" == *--stage=distilled* && ! -e "$STATE/preempted" ]]; then touch "$STATE/preempted"; exit 75; fi
exec "$@"
"""


@pytest.mark.long
def test_a_study_runs_as_slurm_jobs_to_its_report(tmp_path):
    (tmp_path / "bin").mkdir()
    stand_ins = {"sbatch": SBATCH, "srun": SRUN, "scontrol": 'echo "$*" >>"$STATE/requeued"; touch "$STATE/requeue"'}
    for name, script in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "config.py").write_text(CONFIG)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STATE": str(tmp_path)}
    environment.pop("XLA_FLAGS", None)
    # Every job is a process, and most of its time goes into compiling what another one compiled before.
    environment |= {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    workdir = tmp_path / "study"
    given = [f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}"]
    options = ["--python", sys.executable, "--logs", str(tmp_path / "logs")]

    def launched() -> subprocess.CompletedProcess[str]:
        command = ["bash", ROOT / "launch" / "slurm_study.sh", *options, *given]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    ran = launched()
    log = tmp_path / "log"
    assert ran.returncode == 0, ran.stderr + (log.read_text() if log.exists() else "")
    plan = json.loads((workdir / "plan.json").read_text())
    assert len(ran.stdout.splitlines()) == len(plan["arrays"])
    assert [place.name for place in workdir.glob("stages/*") if not (place / "DONE").is_file()] == []
    assert "distilled, task 100 %" in (workdir / "report.md").read_text()
    (requeued,) = (tmp_path / "requeued").read_text().splitlines()
    assert re.fullmatch(r"requeue 10\d(_\d+)?", requeued)
    outcomes = [json.loads(place.read_text())["outcome"] for place in workdir.glob("attempts/*.json")]
    assert set(outcomes) == {"finished"} and len(outcomes) == len(plan["stages"]) - 1

    status = [sys.executable, "-m", "kd_jax.main.study", *given, "--status"]
    said = subprocess.run(status, capture_output=True, text=True, cwd=ROOT, env=environment).stdout
    assert f"{len(outcomes)} done, 0 left" in said
    again = launched()
    assert again.returncode == 0 and again.stdout.endswith("01-report: 1 stages\n"), again.stderr
    assert len(again.stdout.splitlines()) == 1
