#!/usr/bin/env bash
# Runs one command as a JobSet on a GKE cluster, on a TPU slice or on nodes with GPUs; it is started again when it was preempted.
#
# Usage: bash launch/gke.sh --name NAME --image IMAGE (--tpu TYPE --topology T | --gpu TYPE) [OPTION ...] COMMAND ...
#
#   bash launch/gke.sh --name kd --image REGISTRY/kd_jax:1 --tpu tpu-v5-lite-podslice --topology 4x4 --pods 4 --chips 4 \
#       python -m kd_jax.main.distill --config=configs/FILE.py --workdir=gs://BUCKET/DIR
#
#   --name NAME        of the JobSet: lower-case letters, digits and hyphens
#   --image IMAGE      that holds the repository in --folder with its packages installed
#   --tpu TYPE         value of the node label cloud.google.com/gke-tpu-accelerator, with
#   --topology T       that of cloud.google.com/gke-tpu-topology
#   --gpu TYPE         value of the node label cloud.google.com/gke-accelerator, such as nvidia-h100-80gb
#   --pods N           pods, one on each node: the hosts of the slice, or nodes with GPUs (1)
#   --chips N          TPU chips or GPUs of each node (4)
#   --spot             on Spot nodes
#   --namespace N      of Kubernetes (default)
#   --volume CLAIM:DIR a persistent volume claim to mount in every pod
#   --folder DIR       the repository in the image (/kd_jax)
#   --restarts N       restarts after failures that are no preemption (3); preemptions are not counted
#   --grace S          seconds between SIGTERM and the end of a pod (300)
#   --dry-run          prints the rendered YAML and the call of kubectl in place of making it
#
# Needs kubectl with the cluster's credentials, and the JobSet controller installed in the cluster. Watch: kubectl get jobset NAME,
# kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=NAME --prefix. End: kubectl delete jobset NAME.

set -euo pipefail

fail() {
  echo "launch/gke.sh: $1; see --help" >&2
  exit 2
}

number() { # number OPTION VALUE LEAST
  if ! [[ "$2" =~ ^[0-9]+$ ]] || (($2 < $3)); then fail "$1 takes a number of at least $3, not '$2'"; fi
}

name="" image="" tpu="" topology="" gpu="" pods=1 chips=4 spot="" namespace=default volume="" folder=/kd_jax
restarts=3 grace=300 dry_run=""

while (($#)); do
  case "$1" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    --spot) spot=1 && shift && continue ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --) shift && break ;;
    -*) (($# > 1)) || fail "$1 has no value" ;;
    *) break ;;
  esac
  case "$1" in
    --name) name=$2 ;;
    --image) image=$2 ;;
    --tpu) tpu=$2 ;;
    --topology) topology=$2 ;;
    --gpu) gpu=$2 ;;
    --pods) pods=$2 && number --pods "$pods" 1 ;;
    --chips) chips=$2 && number --chips "$chips" 1 ;;
    --namespace) namespace=$2 ;;
    --volume) volume=$2 ;;
    --folder) folder=$2 ;;
    --restarts) restarts=$2 && number --restarts "$restarts" 0 ;;
    --grace) grace=$2 && number --grace "$grace" 1 ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift 2
done
(($#)) || fail "the command is missing"
# Kubernetes allows 63 characters for a pod's host name, NAME-workers-0-INDEX.
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name is 1 to 40 lower-case letters, digits and hyphens, not '$name'"
[[ -n "$image" ]] || fail "--image is missing"
if [[ -n "$tpu" && -n "$gpu" || -z "$tpu$gpu" ]]; then fail "give one of --tpu and --gpu"; fi
if [[ -n "$tpu" && -z "$topology" ]]; then fail "--topology is missing"; fi
if [[ -n "$volume" && ! "$volume" =~ ^[^:/]+:/.+$ ]]; then fail "--volume is CLAIM:DIR, not '$volume'"; fi

string() { # string TEXT: as JSON, which is YAML too
  local text=$1
  text=${text//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "$text"
}

list() { # list WORD ...: of strings
  local word before=""
  printf '['
  for word in "$@"; do
    printf '%s' "$before"
    string "$word"
    before=", "
  done
  printf ']'
}

annotations="{}" tolerations="[]" selector="" mounts="[]" volumes="[]" command=("$@")
if [[ -n "$tpu" ]]; then
  # The pods of the job get the nodes of one node pool, which is one TPU slice, to themselves. GKE tells each its place.
  annotations='{"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}'
  selector="\"cloud.google.com/gke-tpu-accelerator\": $(string "$tpu"), \"cloud.google.com/gke-tpu-topology\": $(string "$topology")"
  resource=google.com/tpu
else
  selector="\"cloud.google.com/gke-accelerator\": $(string "$gpu")"
  resource=nvidia.com/gpu
  if ((pods > 1)); then
    # shellcheck disable=SC2016 # for the shell of the container
    join='exec "$@" --process="$JOB_COMPLETION_INDEX"'
    command=(bash -c "$join" kd_jax "$@" "--coordinator=$name-workers-0-0.$name:8476" "--processes=$pods")
  fi
fi
if [[ -n "$spot" ]]; then
  selector+=', "cloud.google.com/gke-spot": "true"'
  tolerations='[{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}]'
fi
if [[ -n "$volume" ]]; then
  mounts="[{\"name\": \"shared\", \"mountPath\": $(string "${volume#*:}")}]"
  volumes="[{\"name\": \"shared\", \"persistentVolumeClaim\": {\"claimName\": $(string "${volume%%:*}")}}]"
fi

yaml=$(<"$(dirname "${BASH_SOURCE[0]}")/gke/jobset.yaml")
fill() { # fill VARIABLE VALUE
  yaml=${yaml//"\${$1}"/"$2"}
}
fill NAME "$(string "$name")"
fill NAMESPACE "$(string "$namespace")"
fill ANNOTATIONS "$annotations"
fill RESTARTS "$restarts"
fill PODS "$pods"
fill GRACE "$grace"
fill NODE_SELECTOR "{$selector}"
fill TOLERATIONS "$tolerations"
fill IMAGE "$(string "$image")"
fill FOLDER "$(string "$folder")"
fill LIMITS "{$(string "$resource"): $chips}"
fill MOUNTS "$mounts"
fill VOLUMES "$volumes"
fill COMMAND "$(list "${command[@]}")" # last, since it may hold anything

if [[ -n "$dry_run" ]]; then
  printf '%s\n' "$yaml"
  echo "# kubectl apply -f -"
  exit
fi
command -v kubectl >/dev/null || fail "there is no kubectl here; install it and get the cluster's credentials"
kubectl apply -f - <<<"$yaml"
