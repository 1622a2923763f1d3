#!/usr/bin/env bash
# Installs what is needed (once), then runs a whole study on the embedded data: a published teacher, students distilled over
# three transfer sets, baselines, and the report. About seven minutes on two idle CPU cores once the packages are installed.
#
# Usage: bash launch/quickstart.sh [--config.KEY=VALUE ...]
#
# Arguments go to kd_jax.main.study. The results are in runs/quickstart; started again, finished stages are skipped and a broken
# one resumes. It ends by printing the table of results and the path of the report.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  -h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

bash launch/environment.sh --demo
# Large pages: XLA maps its temporary memory anew for every step on a CPU, and faults are a tenth of a step's time.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
exec .venv/bin/python -m kd_jax.main.study --config=configs/quickstart.py --workdir=runs/quickstart "$@"
