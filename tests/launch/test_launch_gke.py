"""launch/gke.sh: the JobSet that it renders, against its schema."""

import json
import os
import re
import subprocess

import pytest
import yaml

from tests.support.launchers import COMMAND, GKE, Tools, launch


@pytest.fixture
def tools(tmp_path):
    return Tools(tmp_path)


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
