#!/usr/bin/env bash
# Starts several processes of one command on this machine, as one job: to try on one machine what several hosts will run.
#
# Usage: bash launch/processes.sh [OPTION ...] COMMAND ...
#
#   bash launch/processes.sh -n 4 .venv/bin/python -m kd_jax.main.study --config=configs/quickstart.py --workdir=runs/four
#
#   -n N           processes (2)
#   --devices D    virtual CPU devices in each process (as many as it finds); for trials without accelerators
#   --gpus         one GPU for each process, by number; without it every process sees all of them
#   --restarts N   starts the job again, at most N times, when it ends with exit code 75: preempted, and its state is saved (0)
#   --dry-run      prints the commands in place of running them
#
# --coordinator, --processes and --process are added to the command, with a free port of this machine. Every line of output begins
# with the number of its process. SIGTERM and SIGINT are passed on to all, and the job is then not started again. When one process
# fails, the others have 20 seconds to end by themselves before they are killed. The exit code is that of the first that failed.

set -uo pipefail

processes=2 devices="" gpus="" restarts=0 dry_run=""

fail() {
  echo "launch/processes.sh: $1; see --help" >&2
  exit 2
}

number() { # number OPTION VALUE LEAST
  if ! [[ "$2" =~ ^[0-9]+$ ]] || (($2 < $3)); then fail "$1 takes a number of at least $3, not '$2'"; fi
}

while (($#)); do
  case "$1" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    -n) processes=${2:-} && number -n "$processes" 1 && shift 2 ;;
    --devices) devices=${2:-} && number --devices "$devices" 1 && shift 2 ;;
    --gpus) gpus=1 && shift ;;
    --restarts) restarts=${2:-} && number --restarts "$restarts" 0 && shift 2 ;;
    --dry-run) dry_run=1 && shift ;;
    --) shift && break ;;
    -*) fail "unknown option '$1'" ;;
    *) break ;;
  esac
done
(($#)) || fail "the command is missing"

PREEMPTED=75
GRACE=20 # seconds

children=()
stopped=""

free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 30000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break # nobody answers there
  done
  echo "$port"
}

pass_on() { # pass_on SIGNAL: to every process that still runs
  local child
  for child in "${children[@]}"; do
    kill "-$1" "$child" 2>/dev/null
  done
}

# shellcheck disable=SC2329 # called by the trap
on_signal() {
  stopped=1
  pass_on TERM
}

start() { # start PROCESS PORT COMMAND ...
  local process=$1 port=$2 settings=()
  shift 2
  if ((processes > 1)); then
    set -- "$@" "--coordinator=localhost:$port" "--processes=$processes" "--process=$process"
  fi
  if [[ -n "$devices" ]]; then
    settings+=("XLA_FLAGS=${XLA_FLAGS:-} --xla_force_host_platform_device_count=$devices")
  fi
  if [[ -n "$gpus" ]]; then settings+=("JAX_LOCAL_DEVICE_IDS=$process"); fi
  if [[ -n "$dry_run" ]]; then
    if ((${#settings[@]})); then printf '%q ' env "${settings[@]}"; fi
    printf '%q ' "$@"
    echo
    return
  fi
  env PYTHONUNBUFFERED=1 "${settings[@]}" "$@" > >(exec sed -u "s/^/[$process] /") 2> >(exec sed -u "s/^/[$process] /" >&2) &
  children+=($!)
}

ended() { # ended CHILD: whether it has ended
  ! kill -0 "$1" 2>/dev/null
}

job() { # job COMMAND ...: runs all processes once and returns the exit code of the first that fails, or 0
  local port process child code=0 status until running
  port=$(free_port)
  children=()
  for ((process = 0; process < processes; process++)); do start "$process" "$port" "$@"; done
  [[ -z "$dry_run" ]] || return 0
  until=""
  while true; do
    running=()
    for child in "${children[@]}"; do
      if ended "$child"; then
        wait "$child"
        status=$?
        if ((status != 0 && code == 0)); then
          code=$status
          until=$((SECONDS + GRACE))
          # A preempted process saves first, together with the others.
          if ((status == PREEMPTED)); then until=$((SECONDS + 3 * GRACE)); fi
        fi
      else
        running+=("$child")
      fi
    done
    children=("${running[@]}")
    ((${#children[@]})) || return "$code"
    if [[ -n "$until" ]] && ((SECONDS >= until)); then pass_on KILL; fi
    sleep 0.1
  done
}

trap on_signal TERM INT
while true; do
  job "$@"
  code=$?
  if ((code != PREEMPTED || restarts == 0)) || [[ -n "$stopped" ]]; then break; fi
  restarts=$((restarts - 1))
  echo "preempted; starting again, $restarts more times at the most" >&2
done
wait # for what the processes printed last
exit "$code"
