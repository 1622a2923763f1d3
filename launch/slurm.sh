#!/usr/bin/env bash
# Runs one command as a SLURM job on one or several nodes, and puts the job back into the queue when it was preempted.
#
# Usage: bash launch/slurm.sh [OPTION ...] COMMAND ...
#
#   bash launch/slurm.sh --nodes 4 --gpus 8 --sbatch "--partition=gpu --time=24:00:00" \
#       .venv/bin/python -m kd_jax.main.distill --config=configs/FILE.py --workdir=DIR
#
#   --nodes N         nodes (1)
#   --gpus N          GPUs on each node (0)
#   --cpus N          CPUs of each process (as many as SLURM gives without being asked, often one)
#   --per-gpu         a process for each GPU; without it a process for each node, which has all of its GPUs
#   --name NAME       of the job (kd_jax)
#   --sbatch OPTIONS  more options for sbatch, separated by spaces: --partition, --account, --time, --mem
#   --warning S       so many seconds before the time limit the processes get SIGTERM, save and end with exit code 75 (300)
#   --restarts N      times that the job puts itself back into the queue at the most (100)
#   --logs DIR        where output goes, a file for each job (runs/slurm)
#   --after IDS       job ids, joined by colons, that must have ended well before
#   --each WORD       again and again: an array, of which each job has one of the words as last argument of the command
#   --at-once N       jobs of an array that run at once (all)
#   --dry-run         prints the call of sbatch in place of making it
#
# Prints the job's id. The repository must be on a filesystem that all nodes share: the command runs in its folder.
# A job that is cancelled, fails, or is not told in time, is not put back; its command, started again, resumes.

set -uo pipefail

PREEMPTED=75

fail() {
  echo "launch/slurm.sh: $1; see --help" >&2
  exit 2
}

number() { # number OPTION VALUE LEAST
  if ! [[ "$2" =~ ^[0-9]+$ ]] || (($2 < $3)); then fail "$1 takes a number of at least $3, not '$2'"; fi
}

# What sbatch runs: launch/slurm.sh --inside RESTARTS WORDS WORD ... COMMAND ...
inside() {
  local restarts=$1 words=$2 job=$SLURM_JOB_ID count=${SLURM_RESTART_COUNT:-0} code ended=""
  shift 2
  local each=("${@:1:words}")
  shift "$words"
  if ((words)); then set -- "$@" "${each[${SLURM_ARRAY_TASK_ID:-0}]}"; fi
  if [[ -n "${SLURM_ARRAY_JOB_ID:-}" ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
  # The warning before the time limit goes to the processes alone. SIGTERM to this shell means that the job is taken away.
  trap 'ended=1' TERM
  echo "$(date -u +%FT%TZ) job $job on $SLURM_JOB_NODELIST, start $((count + 1)): $(printf '%q ' "$@")"
  # srun does not take this from sbatch by itself.
  if [[ -n "${SLURM_CPUS_PER_TASK:-}" ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  # A process that is through waits for the others; after two minutes something is wrong with them.
  srun --kill-on-bad-exit=0 --wait=120 "$@"
  code=$?
  echo "$(date -u +%FT%TZ) exit code $code"
  if ((code != PREEMPTED)); then exit "$code"; fi
  if [[ -n "$ended" ]]; then
    # SLURM requeues a preempted job and not a cancelled one, and only if the job has not ended before by itself.
    echo "the job is taken away; waiting for SLURM"
    sleep 600
    exit "$code"
  fi
  if ((count >= restarts)); then
    echo "launch/slurm.sh: preempted, but it was started again $restarts times already (--restarts)" >&2
    exit "$code"
  fi
  echo "preempted: back into the queue"
  scontrol requeue "$job" || echo "launch/slurm.sh: SLURM does not requeue $job; submit it again" >&2
  exit "$code"
}

if [[ "${1:-}" == --inside ]]; then
  shift
  inside "$@"
fi

nodes=1 gpus=0 cpus="" per_gpu="" name=kd_jax more="" warning=300 restarts=100 logs=runs/slurm after="" at_once="" dry_run=""
each=()

while (($#)); do
  case "$1" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    --per-gpu) per_gpu=1 && shift && continue ;;
    --dry-run) dry_run=1 && shift && continue ;;
    --) shift && break ;;
    -*) (($# > 1)) || fail "$1 has no value" ;;
    *) break ;;
  esac
  case "$1" in
    --nodes) nodes=$2 && number --nodes "$nodes" 1 ;;
    --gpus) gpus=$2 && number --gpus "$gpus" 0 ;;
    --cpus) cpus=$2 && number --cpus "$cpus" 1 ;;
    --name) name=$2 ;;
    --sbatch) more=$2 ;;
    --warning) warning=$2 && number --warning "$warning" 1 ;;
    --restarts) restarts=$2 && number --restarts "$restarts" 0 ;;
    --logs) logs=$2 ;;
    --after) after=$2 ;;
    --each) each+=("$2") ;;
    --at-once) at_once=$2 && number --at-once "$at_once" 1 ;;
    *) fail "unknown option '$1'" ;;
  esac
  shift 2
done
(($#)) || fail "the command is missing"
if [[ -n "$per_gpu" ]] && ((gpus == 0)); then fail "--per-gpu: there are no GPUs; give --gpus N"; fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ "$logs" != /* ]]; then logs=$root/$logs; fi
tasks=1
if [[ -n "$per_gpu" ]]; then tasks=$gpus; fi
output=%x-%j.out
if ((${#each[@]} > 1)); then output=%x-%A_%a.out; fi

call=(sbatch --parsable "--job-name=$name" "--chdir=$root" "--nodes=$nodes" "--ntasks-per-node=$tasks")
if ((gpus)); then call+=("--gpus-per-node=$gpus"); fi
if [[ -n "$cpus" ]]; then call+=("--cpus-per-task=$cpus"); fi
call+=(--requeue --open-mode=append "--signal=TERM@$warning" "--output=$logs/$output")
if ((${#each[@]} > 1)); then call+=("--array=0-$((${#each[@]} - 1))${at_once:+%$at_once}"); fi
# A job whose forerunner failed would wait for ever.
if [[ -n "$after" ]]; then call+=("--dependency=afterok:$after" --kill-on-invalid-dep=yes); fi
read -r -a words <<<"$more"
call+=("${words[@]}" "$root/launch/slurm.sh" --inside "$restarts" "${#each[@]}" "${each[@]}" "$@")

if [[ -n "$dry_run" ]]; then
  printf '%q ' "${call[@]}"
  echo
  exit
fi
command -v sbatch >/dev/null || fail "there is no sbatch here; run it on a machine that submits to SLURM"
mkdir -p "$logs" || fail "cannot make the folder $logs for the logs"
id=$("${call[@]}") || fail "sbatch refused the job, as said above"
echo "${id%%;*}" # with several clusters it is ID;CLUSTER
