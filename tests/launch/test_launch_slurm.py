"""launch/slurm.sh and launch/slurm_study.sh: what they would run, or run where sbatch and scontrol are stand-ins."""

import os
import shlex
import signal
import subprocess
import sys

import pytest

from tests.support.launchers import COMMAND, LAUNCH, ROOT, Tools, launch, planned_study, printed, wait_for


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


def test_slurm_prints_its_call_of_sbatch():
    options = ["--nodes", "4", "--gpus", "8", "--cpus", "16", "--sbatch", "--partition=gpu --time=24:00:00"]
    (call,) = printed("slurm.sh", *options, "--after", "7:9", *COMMAND)
    script = call.index(str(LAUNCH / "slurm.sh"))
    assert call[0] == "sbatch"
    assert {
        "--nodes=4",
        "--ntasks-per-node=1",
        "--gpus-per-node=8",
        "--cpus-per-task=16",
        "--requeue",
        "--signal=TERM@300",
        "--open-mode=append",
        f"--chdir={ROOT}",
        f"--output={ROOT}/runs/slurm/%x-%j.out",
        "--dependency=afterok:7:9",
        "--kill-on-invalid-dep=yes",
        "--partition=gpu",
        "--time=24:00:00",
    } <= set(call[1:script])
    assert call[script + 1 :] == ["--inside", "100", "0", *COMMAND]


def test_slurm_may_start_a_process_for_each_gpu():
    (call,) = printed("slurm.sh", "--gpus", "8", "--per-gpu", "--logs", "/logs", *COMMAND)
    assert "--ntasks-per-node=8" in call and "--output=/logs/%x-%j.out" in call


def test_slurm_submits_and_prints_the_id(tools, tmp_path):
    tools.make("sbatch", "echo '4711;cluster'")
    ran = launch("slurm.sh", "--logs", str(tmp_path / "logs"), "--name", "x", *COMMAND, **tools.environment)
    assert (ran.returncode, ran.stdout) == (0, "4711\n")
    (call,) = tools.calls()
    assert call == printed("slurm.sh", "--logs", str(tmp_path / "logs"), "--name", "x", *COMMAND)[0]
    assert (tmp_path / "logs").is_dir()


def test_slurm_says_when_sbatch_refuses(tools, tmp_path):
    tools.make("sbatch", "echo 'invalid partition' >&2; exit 1")
    ran = launch("slurm.sh", "--logs", str(tmp_path), *COMMAND, **tools.environment)
    assert ran.returncode == 2 and not ran.stdout
    assert "invalid partition" in ran.stderr and "sbatch refused the job" in ran.stderr


JOB = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "node[1-2]"}


def inside(tools, code: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What sbatch runs, with an srun that ends with `code`."""
    tools.make("srun", f'echo "cpus ${{SRUN_CPUS_PER_TASK:-none}}"; exit {code}')
    tools.make("scontrol", "exit 0")
    return launch("slurm.sh", "--inside", *arguments, **{**tools.environment, **JOB, **environment})


def test_a_preempted_job_goes_back_into_the_queue(tools):
    ran = inside(tools, 75, "3", "0", *COMMAND, SLURM_RESTART_COUNT="2", SLURM_CPUS_PER_TASK="8")
    assert ran.returncode == 75
    srun, requeue = tools.calls()
    assert srun == ["srun", "--kill-on-bad-exit=0", "--wait=120", *COMMAND]
    assert requeue == ["scontrol", "requeue", "4711"]
    assert "cpus 8" in ran.stdout and "start 3" in ran.stdout


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_a_job_that_ended_any_other_way_does_not(tools, code):
    assert inside(tools, code, "3", "0", *COMMAND).returncode == code
    assert [call[0] for call in tools.calls()] == ["srun"]


def test_a_job_goes_back_only_so_often(tools):
    ran = inside(tools, 75, "3", "0", *COMMAND, SLURM_RESTART_COUNT="3")
    assert ran.returncode == 75 and "started again 3 times already" in ran.stderr
    assert [call[0] for call in tools.calls()] == ["srun"]


def test_a_job_that_slurm_does_not_requeue_says_so(tools):
    tools.make("srun", "exit 75")
    tools.make("scontrol", "exit 1")
    ran = launch("slurm.sh", "--inside", "3", "0", *COMMAND, **{**tools.environment, **JOB})
    assert ran.returncode == 75 and "SLURM does not requeue 4711; submit it again" in ran.stderr


def test_each_job_of_an_array_has_its_word(tools):
    words = ["--stage=a", "--stage=b c"]
    ran = inside(tools, 75, "3", "2", *words, *COMMAND, SLURM_ARRAY_JOB_ID="4700", SLURM_ARRAY_TASK_ID="1")
    assert ran.returncode == 75
    srun, requeue = tools.calls()
    assert srun[3:] == [*COMMAND, "--stage=b c"]
    assert requeue == ["scontrol", "requeue", "4700_1"]
    (call,) = printed("slurm.sh", "--each", words[0], "--each", words[1], "--at-once", "1", *COMMAND)
    assert "--array=0-1%1" in call and f"--output={ROOT}/runs/slurm/%x-%A_%a.out" in call
    assert call[call.index("--inside") + 1 :] == ["100", "2", *words, *COMMAND]
    (call,) = printed("slurm.sh", "--each", words[0], *COMMAND)  # an array of one is a job
    assert not [word for word in call if word.startswith("--array")]


def test_a_job_that_is_taken_away_waits_for_what_slurm_does_with_it(tools, tmp_path):
    """SIGTERM reaches the job's shell only when the job is preempted, and then SLURM requeues it, or cancelled."""
    ready = tmp_path / "ready"
    tools.make("sleep", "")
    tools.make("srun", f"touch {shlex.quote(str(ready))}; {sys.executable} -c 'import time; time.sleep(1)'; exit 75")
    tools.make("scontrol", "exit 0")
    arguments = ["bash", LAUNCH / "slurm.sh", "--inside", "3", "0", *COMMAND]
    process = subprocess.Popen(arguments, env={**os.environ, **tools.environment, **JOB}, stdout=subprocess.DEVNULL)
    wait_for(ready)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert [call[:2] for call in tools.calls()] == [["srun", "--kill-on-bad-exit=0"], ["sleep", "600"]]


# A study: launch/slurm_study.sh

OPTIONS = ["--gpus", "1", "--at-once", "2", "--sbatch", "--partition=gpu", "--sbatch-cpu", "--partition=cpu --mem=4G"]


@pytest.fixture
def planned(tools, tmp_path):
    return planned_study(tools, tmp_path)


def test_a_study_becomes_arrays_that_wait_for_each_other(tools, planned, tmp_path):
    tools.make("sbatch", f"echo x >>{tmp_path / 'n'}; echo $((100 + $(wc -l <{tmp_path / 'n'})))")
    ran = launch("slurm_study.sh", *OPTIONS, "--logs", str(tmp_path / "logs"), *planned, **tools.environment)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "101 01-teachers-prepare: 1 stages",
        "102 02-teachers-pretrain: 1 stages",
        "103 03-students-pretrain: 3 stages",
        "104 04-report: 1 stages",
    ]
    plan, prepare, teacher, students, report = tools.calls()
    command = ["planner", "-m", "kd_jax.main.study", *planned[2:]]
    assert plan == [*command, "--plan"]
    assert "JAX on cpu" in ran.stderr  # planning takes no accelerator
    assert not [word for word in prepare if word.startswith("--dependency")]
    assert {"--partition=cpu", "--mem=4G"} <= set(prepare) and "--gpus-per-node=1" not in prepare
    assert {"--partition=gpu", "--gpus-per-node=1", "--dependency=afterok:101"} <= set(teacher)
    assert prepare[-len(command) - 1 :] == ["--stage=prepare-1", *command]
    assert {"--array=0-2%2", "--dependency=afterok:101"} <= set(students)
    assert students[-len(command) - 3 :] == ["--stage=mlm-3", "--stage=mlm-4", "--stage=mlm-5", *command]
    assert {"--dependency=afterok:102:103", "--partition=cpu"} <= set(report)


def test_a_study_dry_run_prints_the_same_calls(tools, planned):
    ran = launch("slurm_study.sh", "--dry-run", *OPTIONS, *planned, **tools.environment)
    assert ran.returncode == 0, ran.stderr
    calls = [shlex.split(line) for line in ran.stdout.splitlines()]
    assert [call[0] for call in calls] == ["sbatch"] * 4
    assert "--dependency=afterok:ID_OF_02-teachers-pretrain:ID_OF_03-students-pretrain" in calls[3]
    assert [call[0] for call in tools.calls()] == ["planner"]


def test_a_submission_that_fails_half_way_says_what_to_cancel(tools, planned, tmp_path):
    tools.make("sbatch", f'echo x >>{tmp_path / "n"}; n=$(wc -l <{tmp_path / "n"}); ((n < 3)) && echo "$n"')
    ran = launch("slurm_study.sh", *OPTIONS, "--logs", str(tmp_path / "logs"), *planned, **tools.environment)
    assert ran.returncode == 2
    assert "scancel 1 2" in ran.stderr and "03-students-pretrain was not submitted" in ran.stderr


def test_a_study_that_cannot_be_planned_submits_nothing(tools, planned):
    tools.make("planner", "echo 'error: config.study.seeds' >&2; exit 2")
    ran = launch("slurm_study.sh", *planned, **tools.environment)
    assert ran.returncode == 2
    assert "config.study.seeds" in ran.stderr and "cannot be planned" in ran.stderr
