#!/usr/bin/env bash
# Runs a study as SLURM jobs: an array for each group of stages that may run at once, each waiting for those it needs.
#
# Usage: bash launch/slurm_study.sh [OPTION ...] --config=configs/FILE.py --workdir=DIR [--config.KEY=VALUE ...]
#
#   bash launch/slurm_study.sh --gpus 1 --at-once 8 --sbatch "--partition=gpu --time=4:00:00" --sbatch-cpu "--partition=cpu" \
#       --config=configs/massive_wikipedia.py --workdir=runs/massive
#
#   --at-once N           stages of an array that run at once (8)
#   --sbatch OPTIONS      options of sbatch for stages that compute on accelerators
#   --sbatch-cpu OPTIONS  for the others, prepare and the report; without it those of --sbatch
#   --nodes N, --gpus N, --per-gpu   of each stage on accelerators, as for launch/slurm.sh
#   --cpus N, --warning S, --restarts N, --logs DIR   of each job, as for launch/slurm.sh
#   --python PYTHON       the interpreter (.venv/bin/python)
#   --dry-run             writes the plan, and prints the calls of sbatch in place of making them
#
# The plan is WORKDIR/plan.json, of which finished stages are left out. When a stage fails, those that need it are cancelled and
# the others go on: mend it and run this again. Progress: python -m kd_jax.main.study ... --status

set -euo pipefail

fail() {
  echo "launch/slurm_study.sh: $1; see --help" >&2
  exit 2
}

at_once=8 on_accelerator="" on_cpu="" python=.venv/bin/python workdir="" dry_run=""
shape=() common=() study=()

while (($#)); do
  case "$1" in
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    --per-gpu) shape+=(--per-gpu) && shift && continue ;;
    --dry-run) dry_run=--dry-run && shift && continue ;;
    --plan | --status | --stage | --stage=*) fail "$1 is given by this script" ;;
    --config=* | --config.*=*) study+=("$1") && shift && continue ;;
    --workdir=*) workdir=${1#*=} && study+=("$1") && shift && continue ;;
    --nodes | --gpus | --cpus | --warning | --restarts | --logs | --at-once | --sbatch | --sbatch-cpu | --python)
      (($# > 1)) || fail "$1 has no value"
      ;;
    *) fail "unknown option '$1'" ;;
  esac
  case "$1" in
    --nodes | --gpus) shape+=("$1" "$2") ;;
    --cpus | --warning | --restarts | --logs) common+=("$1" "$2") ;;
    --at-once) at_once=$2 ;;
    --sbatch) on_accelerator=$2 ;;
    --sbatch-cpu) on_cpu=$2 ;;
    --python) python=$2 ;;
  esac
  shift 2
done
[[ " ${study[*]} " == *" --config="* ]] || fail "--config=configs/FILE.py is missing"
[[ -n "$workdir" ]] || fail "--workdir=DIR is missing"
[[ "$workdir" != *://* ]] || fail "--workdir is a folder on a filesystem that all nodes share, not '$workdir'"

cd "$(dirname "${BASH_SOURCE[0]}")/.."
command=("$python" -m kd_jax.main.study "${study[@]}")
JAX_PLATFORMS=cpu "${command[@]}" --plan >&2 || fail "the study cannot be planned, as said above"

declare -A ids
submitted=()
while IFS=$'\t' read -r name needs device keys; do
  options=(--name "$name" --at-once "$at_once" "${common[@]}")
  if [[ "$device" == cpu ]]; then
    options+=(--sbatch "${on_cpu:-$on_accelerator}")
  else
    options+=(--sbatch "$on_accelerator" "${shape[@]}")
  fi
  if [[ "$needs" != - ]]; then
    after=""
    IFS=, read -r -a names <<<"$needs"
    for need in "${names[@]}"; do after+=${after:+:}${ids[$need]}; done
    options+=(--after "$after")
  fi
  read -r -a stages <<<"$keys"
  for key in "${stages[@]}"; do options+=(--each "--stage=$key"); done
  if [[ -n "$dry_run" ]]; then
    bash launch/slurm.sh --dry-run "${options[@]}" "${command[@]}" </dev/null
    ids[$name]="ID_OF_$name"
    continue
  fi
  if ! ids[$name]=$(bash launch/slurm.sh "${options[@]}" "${command[@]}" </dev/null); then
    if ((${#submitted[@]})); then echo "submitted before: scancel ${submitted[*]}" >&2; fi
    fail "$name was not submitted, as said above"
  fi
  submitted+=("${ids[$name]}")
  echo "${ids[$name]} $name: ${#stages[@]} stages"
done <"$workdir/plan.tsv"
