#!/usr/bin/env bash
# Runs one command on this machine with all of its accelerators, and starts it again when it was preempted.
#
# Usage: bash launch/node.sh [OPTION ...] COMMAND ...
#
#   bash launch/node.sh .venv/bin/python -m kd_jax.main.study --config=configs/FILE.py --workdir=DIR --config.mesh.fsdp=8
#
#   --gpus LIST    only these GPUs of the machine, by number: 0,1,2,3
#   --restarts N   starts again at most N times after exit code 75 (100)
#   --pause S      seconds before each (5)
#   --dry-run      prints the command in place of running it
#
# One process has all GPUs, which is JAX's way and needs nothing but the mesh in the config; a process for each GPU is what
# launch/processes.sh --gpus starts. SIGTERM and SIGINT are passed on: the command saves and the script ends with its exit code,
# 75, without starting it again, so that whoever runs the script (systemd: RestartForceExitStatus=75) can do so.

set -uo pipefail

PREEMPTED=75

fail() {
  echo "launch/node.sh: $1; see --help" >&2
  exit 2
}

number() { # number OPTION VALUE
  if ! [[ "$2" =~ ^[0-9]+$ ]]; then fail "$1 takes a number, not '$2'"; fi
}

gpus="" restarts=100 pause=5 dry_run=""
while (($#)); do
  case "$1" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --) shift && break ;;
    -*) (($# > 1)) || fail "$1 has no value" ;;
    *) break ;;
  esac
  case "$1" in
    --gpus) gpus=$2 && [[ "$gpus" =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus takes numbers joined by commas, not '$2'" ;;
    --restarts) restarts=$2 && number --restarts "$restarts" ;;
    --pause) pause=$2 && number --pause "$pause" ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift 2
done
(($#)) || fail "the command is missing"
if [[ -n "$gpus" ]]; then set -- env "CUDA_VISIBLE_DEVICES=$gpus" "$@"; fi
if [[ -n "$dry_run" ]]; then
  printf '%q ' "$@"
  echo
  exit
fi

child="" stopped=""
# shellcheck disable=SC2329 # called by the trap
on_signal() {
  stopped=1
  if [[ -n "$child" ]]; then kill -TERM "$child" 2>/dev/null; fi
}
trap on_signal TERM INT

while true; do
  "$@" &
  child=$!
  while true; do # a signal interrupts `wait` before the command has ended
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  child=""
  if ((code != PREEMPTED || restarts == 0)) || [[ -n "$stopped" ]]; then exit "$code"; fi
  restarts=$((restarts - 1))
  echo "launch/node.sh: preempted; starting again, $restarts more times at the most" >&2
  sleep "$pause" &
  wait $!
  if [[ -n "$stopped" ]]; then exit "$code"; fi
done
