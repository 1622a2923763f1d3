#!/usr/bin/env bash
# Checks and measures kd_jax on one GPU in at most eight minutes, without downloading anything: the kernels against plain
# attention, the distillation step of mmbert_small to 17 M in bfloat16 with fused and plain attention, and the benchmark's
# step against PyTorch.
#
# Usage: bash launch/gpu_check.sh [--python=PYTHON] [--workdir=DIR] [--cpu]
#
#   --python=PYTHON   interpreter with jax and its CUDA plugin, and PyTorch for the comparison (default: .venv/bin/python)
#   --workdir=DIR     where results go (default: runs/gpu_check): gpu.json, benchmark/step.json, and summary.txt with the tables
#   --cpu             tries the script itself on a CPU, at tiny sizes and without the benchmark
#
# Prepare the environment before:  bash launch/environment.sh --dev, then  .venv/bin/python -m pip install
# -c requirements.txt -e ".[cuda]" torch==2.13.0 . The lock's jax and newer ones work. A part that fails does not keep
# the others from running; the exit code is then 1.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=.venv/bin/python
workdir=runs/gpu_check
device=gpu
for argument in "$@"; do
  case "$argument" in
    --python=?*) python="${argument#--python=}" ;;
    --workdir=?*) workdir="${argument#--workdir=}" ;;
    --cpu) device=cpu ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    *)
      echo "launch/gpu_check.sh: unknown argument $argument; see --help" >&2
      exit 2
      ;;
  esac
done

export HF_HUB_OFFLINE=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
if [[ "$device" == gpu ]] && ! "$python" -c 'import jax; raise SystemExit(jax.default_backend() != "gpu")'; then
  echo "launch/gpu_check.sh: jax of $python finds no GPU; install jax[cuda13], or try --cpu; see --help" >&2
  exit 2
fi

mkdir -p "$workdir"
: >"$workdir/summary.txt"
failed=0

part() { # part NAME SECONDS COMMAND ...: runs it with a time limit; its output also goes to the summary
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  printf '\n== %s\n' "$name" | tee -a "$workdir/summary.txt"
  if ! timeout "$limit" "$@" 2>"$workdir/$name.log" | tee -a "$workdir/summary.txt"; then
    printf '%s failed; see %s\n' "$name" "$workdir/$name.log" | tee -a "$workdir/summary.txt"
    failed=1
  fi
  printf '%s: %d s\n' "$name" $((SECONDS - start)) | tee -a "$workdir/summary.txt"
}

tiny=()
limit=180
if [[ "$device" == cpu ]]; then
  limit=0 # none
  tiny=(--config.rows.length=64 --config.compile_check.rows=2)
  for model in teacher student; do
    for key in vocab_size=64 num_layers=2 hidden_size=32 num_heads=2 intermediate_size=32; do
      tiny+=("--config.$model.$key")
    done
  done
fi

if [[ "$device" == gpu ]]; then
  part tests 150 env KD_JAX_TEST_PLATFORMS=cuda,cpu "$python" -m pytest -m gpu -n 0 -q tests/models/test_attention_kernels.py
fi
part distill "$limit" "$python" -m benchmarks.gpu --config=configs/paper_scale.py:mmbert_small_17m --workdir="$workdir" \
  --config.compile_check.rows=64 "${tiny[@]}"
if [[ "$device" == gpu ]]; then
  # Losses of PyTorch's bfloat16 and ours agree to two digits.
  part benchmark 150 env JAX_PLATFORMS=cpu "$python" -m benchmarks --config=configs/benchmark.py \
    --workdir="$workdir/benchmark" --config.benchmark.sections="('step',)" --config.benchmark.device=gpu \
    --config.compute_dtype=bfloat16 --config.benchmark.tolerance=0.05 --config.benchmark.rounds=3 \
    --config.benchmark.gemm_size=8192
fi
exit "$failed"
