"""launch/tpu_pod.sh, where gcloud is a stand-in with two workers."""

import shlex
import signal
import subprocess
import threading

import pytest

from tests.support.launchers import COMMAND, TPU, Tools, launch


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


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
