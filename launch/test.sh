#!/usr/bin/env bash
# Installs what is needed (once), then runs all tests but the slow and the long ones. About twelve minutes on two idle CPU
# cores, twice that on busy ones.
#
# Usage: bash launch/test.sh [PYTEST ARGUMENT ...]      e.g.  -k masking,  or two at a time:  -n 2 --dist loadfile
#
# Tests that need larger data look for it in the folder named by KD_JAX_DATA, and are skipped with a message without it.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  -h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit
    ;;
esac

bash launch/environment.sh --dev
exec .venv/bin/python -m pytest -m "not slow and not long" -n 2 --dist loadfile "$@"
