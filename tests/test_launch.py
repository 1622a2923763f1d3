"""The launchers: what they would run, and what they do run where sbatch, scontrol, gcloud and kubectl are stand-ins."""

import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
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


@pytest.fixture
def tools(tmp_path):
    """A folder of stand-ins: `make(name, script)` puts one there; `calls()` are the words of every call of one."""

    class Tools:
        folder = tmp_path / "bin"
        log = tmp_path / "calls"
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path / "home")}  # noqa: RUF012

        def make(self, name: str, script: str) -> None:
            file = self.folder / name
            record = f'{{ printf "%s\\0" {name} "$@"; echo; }} >>{shlex.quote(str(self.log))}'
            file.write_text(f"#!/usr/bin/env bash\n{record}\n{script}\n")
            file.chmod(0o755)

        def calls(self) -> list[list[str]]:
            if not self.log.exists():
                return []
            return [line.rstrip("\0").split("\0") for line in self.log.read_text().split("\0\n") if line]

    one = Tools()
    one.folder.mkdir()
    (tmp_path / "home").mkdir()
    return one


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_comment_at_the_top(script):
    for option in ("-h", "--help"):
        ran = launch(script, option)
        assert ran.returncode == 0 and "Usage: bash launch/" in ran.stdout and not ran.stderr
        assert not ran.stdout.startswith("#")
        options = set(re.findall(r"^ {4,}(--[a-z-]+)\)", (LAUNCH / script).read_text(), re.M)) - {"--dry-run"}
        assert options <= set(re.findall(r"--[a-z-]+", ran.stdout))


@pytest.mark.parametrize(
    "script, arguments, problem",
    [
        ("slurm.sh", [], "the command is missing"),
        ("slurm.sh", ["--nodes", "0", "python"], "--nodes takes a number of at least 1, not '0'"),
        ("slurm.sh", ["--nodes"], "--nodes has no value"),
        ("slurm.sh", ["--nod", "2", "python"], "unknown option '--nod'"),
        ("slurm.sh", ["--per-gpu", "python"], "--per-gpu: there are no GPUs"),
        ("slurm_study.sh", ["--workdir=x"], "--config=configs/FILE.py is missing"),
        ("slurm_study.sh", ["--config=x"], "--workdir=DIR is missing"),
        ("slurm_study.sh", ["--config=x", "--workdir=gs://x"], "--workdir is a folder on a filesystem"),
        ("slurm_study.sh", ["--config=x", "--plan"], "--plan is given by this script"),
        ("slurm_study.sh", ["python"], "unknown option 'python'"),
        ("node.sh", [], "the command is missing"),
        ("node.sh", ["--gpus", "all", "python"], "--gpus takes numbers joined by commas, not 'all'"),
        ("node.sh", ["--restarts", "-1", "python"], "--restarts takes a number, not '-1'"),
        ("tpu_pod.sh", TPU, "the command is missing"),
        ("tpu_pod.sh", [*TPU[:-2], "python"], "--runtime is missing"),
        ("gke.sh", [*GKE, "--tpu", "tpu-v5-lite-podslice", "python"], "--topology is missing"),
        ("gke.sh", [*GKE, "python"], "give one of --tpu and --gpu"),
        ("gke.sh", [*GKE, "--tpu", "a", "--gpu", "b", "python"], "give one of --tpu and --gpu"),
        ("gke.sh", ["--name", "Kd_1", "--gpu", "b", "python"], "lower-case letters, digits and hyphens, not 'Kd_1'"),
        ("gke.sh", [*GKE, "--gpu", "b", "--volume", "data", "python"], "--volume is CLAIM:DIR, not 'data'"),
    ],
)
def test_mistakes_are_told_in_one_line(script, arguments, problem):
    ran = launch(script, *arguments)
    assert ran.returncode == 2
    assert not ran.stdout
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"launch/{script}: ") and problem in line and line.endswith("see --help")


@pytest.mark.parametrize(
    "script, tool, arguments",
    [
        ("slurm.sh", "sbatch", COMMAND),
        ("tpu_pod.sh", "gcloud", [*TPU, *COMMAND]),
        ("gke.sh", "kubectl", [*GKE, "--gpu", "b", *COMMAND]),
    ],
)
def test_a_missing_program_is_named(script, tool, arguments, tmp_path):
    for name in ("bash", "dirname", "printf", "sed", "mkdir", "mktemp", "rm"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    ran = launch(script, *arguments, PATH=str(tmp_path))
    assert ran.returncode == 2
    assert f"there is no {tool} here" in ran.stderr


# SLURM: launch/slurm.sh


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


def wait_for(file: pathlib.Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, f"{file} did not come"
        time.sleep(0.02)


# A study on SLURM: launch/slurm_study.sh

TABLE = (
    "01-teachers-prepare\t-\tcpu\tprepare-1\n"
    "02-teachers-pretrain\t01-teachers-prepare\taccelerator\tpretrain-teacher-2\n"
    "03-students-pretrain\t01-teachers-prepare\taccelerator\tmlm-3 mlm-4 mlm-5\n"
    "04-report\t02-teachers-pretrain,03-students-pretrain\tcpu\treport\n"
)
OPTIONS = ["--gpus", "1", "--at-once", "2", "--sbatch", "--partition=gpu", "--sbatch-cpu", "--partition=cpu --mem=4G"]


@pytest.fixture
def planned(tools, tmp_path):
    """Arguments of a study, and a python that plans it as TABLE has it."""
    workdir = tmp_path / "a study"
    workdir.mkdir()
    (tmp_path / "table").write_text(TABLE)
    tools.make("planner", f'cp "{tmp_path / "table"}" "{workdir / "plan.tsv"}"; echo "JAX on $JAX_PLATFORMS"')
    return ["--python", "planner", "--config=configs/x.py", f"--workdir={workdir}", "--config.seed=1"]


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


# One node: launch/node.sh


def program(tmp_path, codes: list[int]) -> list[str]:
    """A command that ends with one code after the other."""
    file = tmp_path / "starts"
    text = f"""
import pathlib, sys
file = pathlib.Path({str(file)!r})
file.write_text((file.read_text() if file.exists() else "") + "x")
sys.exit({codes!r}[len(file.read_text()) - 1])
"""
    return [sys.executable, "-c", text]


@pytest.mark.parametrize(
    "codes, restarts, code, starts",
    [([0], "5", 0, 1), ([75, 75, 0], "5", 0, 3), ([75, 75, 75], "1", 75, 2), ([75, 2], "5", 2, 2), ([1], "5", 1, 1)],
)
def test_a_node_starts_again_what_was_preempted(tmp_path, codes, restarts, code, starts):
    ran = launch("node.sh", "--restarts", restarts, "--pause", "0", *program(tmp_path, codes))
    assert ran.returncode == code
    assert (tmp_path / "starts").read_text() == "x" * starts
    assert ran.stderr.count("preempted; starting again") == starts - 1


def test_a_node_that_is_told_to_stop_passes_it_on_and_does_not_start_again(tmp_path):
    text = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), sys.exit(75)))
place = pathlib.Path({str(tmp_path)!r})
(place / "starts").write_text(((place / "starts").read_text() if (place / "starts").exists() else "") + "x")
(place / "ready").touch()
time.sleep(60)
"""
    process = subprocess.Popen(["bash", LAUNCH / "node.sh", "--pause", "0", sys.executable, "-c", text])
    wait_for(tmp_path / "ready")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "starts").read_text() == "x"


def test_a_node_prints_its_command():
    assert printed("node.sh", *COMMAND) == [COMMAND]
    assert printed("node.sh", "--gpus", "0,1", *COMMAND) == [["env", "CUDA_VISIBLE_DEVICES=0,1", *COMMAND]]


# A TPU slice: launch/tpu_pod.sh

# A gcloud that keeps the state of the queued resource in a file, and two workers in two folders.
GCLOUD = r"""
cd "$HOME"
case "$*" in
  *"queued-resources describe"*) [[ -e state ]] && cat state || exit 1 ;;
  *"queued-resources create"*) echo ACTIVE >state ;;
  *"queued-resources delete"*) rm state ;;
  *"tpu-vm scp"*) for worker in 0 1; do mkdir -p "worker$worker" && cp "$5" "worker$worker/"; done ;;
  *"tpu-vm ssh"*)
    code=0
    for worker in 0 1; do
      for word in "$@"; do
        [[ "$word" != --command=* ]] || (cd "worker$worker" && WORKER=$worker bash -c "${word#--command=}") || code=255
      done
    done
    exit "$code" ;;
esac
"""


def tpu(tools, *command: str) -> subprocess.CompletedProcess[str]:
    tools.make("gcloud", GCLOUD)
    options = ["--setup", "test -f launch/tpu_pod.sh", "--poll", "1", "--delete", *TPU]
    return launch("tpu_pod.sh", *options, *command, **tools.environment)


def verbs(tools) -> list[str]:
    """What was asked of gcloud, but for the looks at the queue."""
    names = ("create", "delete", "scp", "ssh")
    return [name for call in tools.calls() if call[0] == "gcloud" for name in names if name in call[3:6]]


def test_a_slice_is_made_used_and_deleted(tools, tmp_path):
    ran = tpu(tools, "bash", "-c", "echo worker $WORKER in $(basename $PWD)")
    assert ran.returncode == 0, ran.stderr
    assert "worker 0 in kd_jax" in ran.stdout and "worker 1 in kd_jax" in ran.stdout
    assert verbs(tools) == ["create", "scp", "ssh", "ssh", "delete"]
    create = next(call for call in tools.calls() if "create" in call)
    assert {"kd", "--node-id=kd", "--accelerator-type=v5litepod-16", "--zone=us-west4-a", "--async"} <= set(create)
    assert (tmp_path / "home" / "worker1" / "kd_jax" / "kd_jax" / "main" / "study.py").is_file()


def test_a_preempted_command_runs_again_on_the_slice_that_is_there(tools):
    ran = tpu(tools, "bash", "-c", "touch again.$WORKER.$$; (($(ls again.* | wc -l) > 1)) || exit 75")
    assert ran.returncode == 0, ran.stderr
    assert verbs(tools) == ["create", "scp", "ssh", "ssh", "scp", "ssh", "ssh", "delete"]


def test_a_slice_that_is_taken_away_is_asked_for_again(tools):
    """The connection breaks, and the request is suspended, after which nothing else can be made of it."""
    lost = "if [[ ! -e ../../lost ]]; then touch ../../lost; echo SUSPENDED >../../state; kill -9 $PPID; fi"
    ran = tpu(tools, "bash", "-c", lost)
    assert ran.returncode == 0, ran.stderr
    assert verbs(tools) == ["create", "scp", "ssh", "ssh", "delete", "create", "scp", "ssh", "ssh", "delete"]


def test_a_failure_on_one_worker_is_the_end_and_leaves_the_slice(tools):
    ran = tpu(tools, "bash", "-c", "exit $((2 * WORKER))")
    assert ran.returncode == 2
    assert verbs(tools) == ["create", "scp", "ssh", "ssh"]


def test_processes_of_an_earlier_start_are_ended_before_new_ones_begin(tools, tmp_path):
    folder = tmp_path / "home" / "worker0" / "kd_jax"
    folder.mkdir(parents=True)
    orphan = subprocess.Popen(["sleep", "60"])
    (folder / "run.pid").write_text(str(orphan.pid))
    (tmp_path / "home" / "state").write_text("ACTIVE\n")

    reaper = threading.Thread(target=orphan.wait)  # else it stays a zombie, which counts as a process
    reaper.start()
    ran = tpu(tools, "true")
    reaper.join(timeout=30)
    assert ran.returncode == 0, ran.stderr
    assert orphan.returncode == -signal.SIGTERM
    assert verbs(tools) == ["scp", "ssh", "ssh", "delete"]  # the slice was there


def test_a_slice_dry_run_prints_everything_in_order():
    ran = launch("tpu_pod.sh", "--dry-run", "--spot", "--delete", "--create", "--internal-ips", *TPU, *COMMAND)
    lines = ran.stdout.splitlines()
    words = [shlex.split(line) for line in lines if line.startswith("gcloud")]
    assert [name for one in words for name in ("create", "describe", "scp", "ssh", "delete") if name in one[:6]] == [
        *("create", "describe", "scp", "ssh", "ssh", "delete")
    ]
    assert {"--spot", "--internal-ips", "--runtime-version=v2-alpha-tpuv5-lite"} <= set(words[0])
    run = next(word for word in words[4] if word.startswith("--command="))
    assert shlex.join(COMMAND) in run.replace("\\ ", " ").replace(
        "--config=configs/a b.py", "'--config=configs/a b.py'"
    )
    assert all("--worker=all" in one for one in words[2:5])


# GKE: launch/gke.sh


def rendered(*arguments: str) -> dict:
    ran = launch("gke.sh", "--dry-run", *GKE, *arguments)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("# kubectl apply -f -\n")
    return yaml.safe_load(ran.stdout)


# Of JobSet v1alpha2 and the parts of batch/v1 Job and of a pod that are used: {key: type, or keys below; "?" marks what
# may be missing}; a list of one stands for any number. From the published types and the Kubernetes API reference.
SCHEMA = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "namespace": str, "annotations?": dict},
    "spec": {
        "network?": {"enableDNSHostnames?": bool, "subdomain?": str, "publishNotReadyAddresses?": bool},
        "failurePolicy?": {
            "maxRestarts?": int,
            "rules?": [
                {
                    "name": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                    "action": re.compile("FailJobSet|RestartJobSet|RestartJobSetAndIgnoreMaxRestarts"),
                    "onJobFailureReasons?": [
                        re.compile(
                            "BackoffLimitExceeded|DeadlineExceeded|FailedIndexes|MaxFailedIndexesExceeded|PodFailurePolicy"
                        )
                    ],
                    "targetReplicatedJobs?": [str],
                }
            ],
        },
        "replicatedJobs": [
            {
                "name": str,
                "replicas?": int,
                "template": {
                    "spec": {
                        "parallelism?": int,
                        "completions?": int,
                        "completionMode?": re.compile("Indexed|NonIndexed"),
                        "backoffLimit?": int,
                        "podFailurePolicy?": {
                            "rules": [
                                {
                                    "action": re.compile("FailJob|Ignore|Count|FailIndex"),
                                    "onExitCodes?": {
                                        "containerName?": str,
                                        "operator": re.compile("In|NotIn"),
                                        "values": [int],
                                    },
                                    "onPodConditions?": [{"type": str, "status": re.compile("True|False|Unknown")}],
                                }
                            ]
                        },
                        "template": {
                            "spec": {
                                "restartPolicy": re.compile("Never"),  # podFailurePolicy allows no other
                                "terminationGracePeriodSeconds?": int,
                                "nodeSelector?": dict,
                                "tolerations?": [{"key": str, "operator": str, "value?": str, "effect?": str}],
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "workingDir?": str,
                                        "command?": [str],
                                        "resources?": {"limits": dict},
                                        "volumeMounts?": [{"name": str, "mountPath": str}],
                                    }
                                ],
                                "volumes?": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def breaches(value, schema, place="") -> list[str]:
    """Where a document does not follow a schema of the form above."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{place}: no mapping"]
        known = {key.rstrip("?"): below for key, below in schema.items()}
        problems = [f"{place}.{key}: unknown" for key in value if key not in known]
        problems += [f"{place}.{key}: missing" for key in schema if not key.endswith("?") and key not in value]
        for key, below in known.items():
            if key in value:
                problems += breaches(value[key], below, f"{place}.{key}")
        return problems
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{place}: no list"]
        return [line for index, one in enumerate(value) for line in breaches(one, schema[0], f"{place}[{index}]")]
    if isinstance(schema, re.Pattern):
        return [] if isinstance(value, str) and schema.fullmatch(value) else [f"{place}: {value!r}"]
    if isinstance(schema, type):
        return [] if type(value) is schema else [f"{place}: {value!r} is no {schema.__name__}"]
    return [] if value == schema else [f"{place}: {value!r}"]


def test_the_check_of_the_schema_finds_what_is_wrong():
    one = rendered("--gpu", "b", "--chips", "8", *COMMAND)
    assert breaches(one, SCHEMA) == []
    one["spec"]["replicatedJobs"][0]["replicas"] = "1"
    one["spec"]["failurePolicy"]["rules"][0]["action"] = "Restart"
    one["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"].pop("containers")
    one["spec"]["parallelism"] = 1
    assert len(breaches(one, SCHEMA)) == 4


@pytest.mark.parametrize(
    "options",
    [
        ["--tpu", "tpu-v5-lite-podslice", "--topology", "4x4", "--pods", "4"],
        ["--gpu", "nvidia-h100-80gb", "--pods", "2", "--chips", "8", "--spot", "--volume", "claim:/data"],
        ["--gpu", "nvidia-l4", "--chips", "1", "--namespace", "team", "--restarts", "0", "--grace", "30"],
    ],
)
def test_the_jobset_follows_its_schema(options):
    one = rendered(*options, *COMMAND)
    assert breaches(one, SCHEMA) == []
    assert "${" not in json.dumps(one)


def pod_of(document: dict) -> dict:
    return document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def test_a_slice_gets_its_labels_and_one_pod_a_host():
    one = rendered("--tpu", "tpu-v5-lite-podslice", "--topology", "4x4", "--pods", "4", *COMMAND)
    job, pod = one["spec"]["replicatedJobs"][0]["template"]["spec"], pod_of(one)
    assert job["parallelism"] == job["completions"] == 4 and job["completionMode"] == "Indexed"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"] == COMMAND
    assert list(one["metadata"]["annotations"].values()) == ["cloud.google.com/gke-nodepool"]


def test_preemptions_restart_without_being_counted():
    one = rendered("--gpu", "b", *COMMAND)
    (rule,) = one["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"])
    job = one["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["backoffLimit"] == 0
    codes, conditions = job["podFailurePolicy"]["rules"]
    assert codes["onExitCodes"]["values"] == [75] and conditions["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert codes["onExitCodes"]["containerName"] == pod_of(one)["containers"][0]["name"]


def test_pods_with_gpus_are_told_where_they_belong(tmp_path):
    odd = 'say "hi\\ there" $HOME ${NAME} & done'
    command = ["bash", "-c", 'printf "%s\\n" "$@"', "x", odd]
    one = rendered("--gpu", "b", "--pods", "2", *command)
    ran = subprocess.run(
        pod_of(one)["containers"][0]["command"],
        capture_output=True,
        text=True,
        env={**os.environ, "JOB_COMPLETION_INDEX": "1"},
    )
    assert ran.stdout.splitlines() == [odd, "--coordinator=kd-workers-0-0.kd:8476", "--processes=2", "--process=1"]
    assert one["metadata"]["annotations"] == {}
    assert pod_of(rendered("--gpu", "b", *command))["containers"][0]["command"] == command  # alone


def test_gke_applies_what_it_prints(tools, tmp_path):
    tools.make("kubectl", f"cat >{tmp_path / 'applied'}")
    ran = launch("gke.sh", *GKE, "--gpu", "b", *COMMAND, **tools.environment)
    assert ran.returncode == 0, ran.stderr
    assert tools.calls() == [["kubectl", "apply", "-f", "-"]]
    assert yaml.safe_load((tmp_path / "applied").read_text()) == rendered("--gpu", "b", *COMMAND)


def test_flags_that_launchers_add_are_known_to_every_command():
    ran = subprocess.run(
        [sys.executable, "-m", "kd_jax.main.prepare", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    for flag in ("--coordinator", "--processes", "--process"):
        assert flag in ran.stdout + ran.stderr


def commands_in_docs() -> list[list[str]]:
    """The calls of launchers in the code blocks of docs/launch.md."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "launch.md").read_text(), re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("bash launch/")]


@pytest.mark.parametrize("words", commands_in_docs(), ids=lambda words: words[0])
def test_the_commands_of_the_docs_can_be_given(words, tools, planned):
    script = words[0].removeprefix("launch/")
    if script == "slurm_study.sh":
        words = [*[word for word in words if not word.startswith("--workdir")], *planned]
    ran = launch(script, "--dry-run", *words[1:], **tools.environment)
    assert ran.returncode == 0, ran.stderr


def test_the_docs_call_every_launcher():
    assert {words[0].removeprefix("launch/") for words in commands_in_docs()} == set(SCRIPTS)
