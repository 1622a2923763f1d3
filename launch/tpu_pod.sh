#!/usr/bin/env bash
# Gets a TPU slice as a queued resource, copies the repository to all of its workers, runs a command on all of them, and gets a
# slice again when it was preempted.
#
# Usage: bash launch/tpu_pod.sh --name NAME --zone ZONE --type TYPE --runtime VERSION [OPTION ...] COMMAND ...
#
#   bash launch/tpu_pod.sh --name kd --zone us-west4-a --type v5litepod-16 --runtime v2-alpha-tpuv5-lite --spot --delete \
#       .venv/bin/python -m kd_jax.main.distill --config=configs/FILE.py --workdir=gs://BUCKET/DIR
#
#   --name NAME        of the queued resource and of its node; one that is there already is used
#   --zone ZONE        of Google Cloud
#   --type TYPE        accelerator type, such as v5litepod-16
#   --runtime VERSION  runtime version that belongs to the type
#   --project PROJECT  of Google Cloud (that of gcloud's configuration)
#   --spot             a Spot slice, which may be preempted at any time
#   --create OPTIONS   more options for `queued-resources create`, separated by spaces: --network=..., --internal-ips
#   --setup COMMAND    on every worker, in the repository's folder, before the command (installs .venv and jax[tpu])
#   --restarts N       starts again at most N times after a preemption (100)
#   --poll S           seconds between two looks at the queue (30)
#   --delete           deletes the queued resource when the command has ended well
#   --dry-run          prints the commands in place of running them
#
# COMMAND is run in the folder kd_jax of every worker's home; what it reads and writes must be on gs:// or a disk that all workers
# mount. Tracked files are copied as they are here. Keep this script running, in tmux for instance: nobody else gets the next slice.
# Started again, it uses the slice that is there, and the command saves, stops and resumes. The exit code is that of the command.

set -uo pipefail

PREEMPTED=75
FOLDER=kd_jax
MARK="kd_jax exit code:" # of a worker, in its output: what gcloud makes of several exit codes is not relied on

fail() {
  echo "launch/tpu_pod.sh: $1; see --help" >&2
  exit 2
}

number() { # number OPTION VALUE LEAST
  if ! [[ "$2" =~ ^[0-9]+$ ]] || (($2 < $3)); then fail "$1 takes a number of at least $3, not '$2'"; fi
}

name="" zone="" type="" runtime="" project="" spot="" more="" restarts=100 poll=30 delete="" dry_run=""
setup='bash launch/environment.sh && .venv/bin/python -m pip install -q -c requirements.txt -e ".[tpu]"'

while (($#)); do
  case "$1" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    --spot) spot=1 && shift && continue ;;
    --delete) delete=1 && shift && continue ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --) shift && break ;;
    -*) (($# > 1)) || fail "$1 has no value" ;;
    *) break ;;
  esac
  case "$1" in
    --name) name=$2 ;;
    --zone) zone=$2 ;;
    --type) type=$2 ;;
    --runtime) runtime=$2 ;;
    --project) project=$2 ;;
    --create) more=$2 ;;
    --setup) setup=$2 ;;
    --restarts) restarts=$2 && number --restarts "$restarts" 0 ;;
    --poll) poll=$2 && number --poll "$poll" 1 ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift 2
done
(($#)) || fail "the command is missing"
for option in name zone type runtime; do
  [[ -n "${!option}" ]] || fail "--$option is missing"
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
place=("--zone=$zone" --quiet)
if [[ -n "$project" ]]; then place+=("--project=$project"); fi
read -r -a words <<<"$more"
queued=(gcloud compute tpus queued-resources)
create=("${queued[@]}" create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" "${place[@]}")
if [[ -n "$spot" ]]; then create+=(--spot); fi
create+=("${words[@]}")
describe=("${queued[@]}" describe "$name" "${place[@]}" "--format=value(state.state)")
remove=("${queued[@]}" delete "$name" --force "${place[@]}")
worker_command=$(printf '%q ' "$@")
ssh=(gcloud compute tpus tpu-vm ssh "$name" --worker=all "${place[@]}")
archive=kd_jax.tar.gz
install="mkdir -p $FOLDER && tar -xzf $archive -C $FOLDER && cd $FOLDER && $setup"
# A lost connection leaves the processes running: those of an earlier start save and end before new ones begin.
# shellcheck disable=SC2016 # for the shell of the worker
earlier='if kill -TERM "$(cat run.pid 2>/dev/null)" 2>/dev/null; then while kill -0 "$(cat run.pid)" 2>/dev/null; do sleep 1; done; fi'
run="cd $FOLDER && { $earlier; $worker_command & echo \$! >run.pid; wait \$!; echo \"$MARK \$?\"; rm -f run.pid; }"

shown() { # shown COMMAND ...: for a shell
  printf '%q ' "$@"
  echo
}

if [[ -n "$dry_run" ]]; then
  shown "${create[@]}"
  shown "${describe[@]}"
  echo "(cd $(printf '%q' "$root") && git ls-files -z | tar --null -T - -czf $archive)"
  shown gcloud compute tpus tpu-vm scp "$archive" "$name:" --worker=all "${place[@]}"
  shown "${ssh[@]}" "--command=$install"
  shown "${ssh[@]}" "--command=$run"
  if [[ -n "$delete" ]]; then shown "${remove[@]}"; fi
  exit
fi
command -v gcloud >/dev/null || fail "there is no gcloud here; install the Google Cloud CLI and log in"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

state() { # the state of the queued resource, or MISSING
  "${describe[@]}" 2>/dev/null || echo MISSING
}

get_slice() { # waits until there is an active slice
  local now last=""
  while true; do
    now=$(state)
    if [[ "$now" != "$last" ]]; then echo "$(date -u +%FT%TZ) queued resource $name: $now" >&2; fi
    last=$now
    case "$now" in
      ACTIVE) return 0 ;;
      MISSING) "${create[@]}" --async || fail "the queued resource cannot be created, as said above" ;;
      # A request whose slice was taken away gets no other one.
      SUSPENDED | FAILED) "${remove[@]}" || fail "the queued resource $name cannot be deleted, as said above" ;;
    esac
    sleep "$poll"
  done
}

install_code() {
  (cd "$root" && git ls-files -z | tar --null -T - -czf "$folder/$archive") || fail "the repository cannot be packed"
  gcloud compute tpus tpu-vm scp "$folder/$archive" "$name:" --worker=all "${place[@]}" && "${ssh[@]}" "--command=$install"
}

run_command() { # the command's exit code: the first that is neither 0 nor 75, or 75, or 255 when a worker gave none, or 0
  local codes code connected worst=0
  "${ssh[@]}" "--command=$run" | tee "$folder/output"
  connected=${PIPESTATUS[0]} # what is run there ends well whatever the command does
  codes=$(sed -n "s/^.*$MARK \([0-9]*\).*$/\1/p" "$folder/output")
  [[ -n "$codes" ]] || return 255
  for code in $codes; do
    if ((code != 0 && (worst == 0 || worst == PREEMPTED))); then worst=$code; fi
  done
  if ((worst == 0 && connected != 0)); then worst=255; fi
  return "$worst"
}

taken_away() { # whether the slice is gone; its state tells a little later than the lost connection
  local look
  for ((look = 0; look < 5; look++)); do
    [[ "$(state)" == ACTIVE ]] || return 0
    sleep "$poll"
  done
  return 1
}

while true; do
  get_slice
  code=255
  problem="the repository could not be installed on all workers"
  if install_code; then
    problem="the connection to the workers is lost; they may still run, and starting this again goes on from there"
    run_command
    code=$?
  fi
  if ((code == 0)); then
    if [[ -n "$delete" ]]; then "${remove[@]}"; fi
    exit 0
  fi
  if ((code != PREEMPTED)) && { ((code != 255)) && [[ "$(state)" == ACTIVE ]] || ! taken_away; }; then
    if ((code == 255)); then echo "launch/tpu_pod.sh: $problem" >&2; fi
    exit "$code"
  fi
  if ((restarts == 0)); then
    echo "launch/tpu_pod.sh: preempted once more than --restarts allows" >&2
    exit "$PREEMPTED"
  fi
  restarts=$((restarts - 1))
  echo "launch/tpu_pod.sh: preempted; starting again, $restarts more times at the most" >&2
  sleep "$poll"
done
