#!/usr/bin/env bash
# Makes the virtual environment .venv and installs the locked packages into it.
#
# Usage: bash launch/environment.sh [--demo | --dev | --docs] [--venv=DIR]
#
#   --demo       also what the embedded data and teacher need (requirements-demo.txt instead of requirements.txt)
#   --dev        that, and what the tests and linters need (requirements-dev.txt)
#   --docs       only what builds the site of docs/ (requirements-docs.txt), into .venv-docs
#   --venv=DIR   make it in this folder instead, e.g. for a second interpreter: --venv=.venv-3.13
#
# Nothing is installed if the lock, or one that contains it, was installed last. An interrupted installation starts over.
# Everything then runs from the repository's root with .venv/bin/python -m ...
#
# KD_JAX_PYTHON names the interpreter, Python 3.11 to 3.13; without it the first suitable one on PATH is taken. The locks hold
# the newest packages that each of them can have: jax 0.10 on 3.11, newer on 3.12 and 3.13.
# For a GPU or a TPU, add afterwards:  .venv/bin/python -m pip install -c requirements.txt -e ".[cuda]"  (or ".[tpu]")

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "launch/environment.sh: $1" >&2
  exit 1
}

lock=requirements.txt
venv=""
for argument in "$@"; do
  case "$argument" in
    --demo | --dev | --docs)
      [[ "$lock" == requirements.txt ]] || fail "give one of --demo, --dev and --docs; see --help"
      lock="requirements-${argument#--}.txt"
      ;;
    --venv=?*) venv="${argument#--venv=}" ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) fail "unknown argument $argument; see --help" ;;
  esac
done
if [[ -z "$venv" ]]; then
  venv=.venv
  if [[ "$lock" == requirements-docs.txt ]]; then venv=.venv-docs; fi
fi
if [[ -e "$venv" && ! -e "$venv/pyvenv.cfg" && ! -e "$venv/installing" && -n "$(ls -A "$venv")" ]]; then
  fail "--venv=$venv holds something else than a virtual environment; choose another folder"
fi

version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

suits() {
  case "$(version "$1")" in
    3.11 | 3.12 | 3.13) "$1" -c 'import ensurepip, venv' 2>/dev/null ;;
    *) return 1 ;;
  esac
}

find_python() {
  local name
  if [[ -n "${KD_JAX_PYTHON:-}" ]]; then
    suits "$KD_JAX_PYTHON" || fail "KD_JAX_PYTHON=$KD_JAX_PYTHON is not Python 3.11 to 3.13 with the venv module; name one that is"
    echo "$KD_JAX_PYTHON"
    return
  fi
  for name in python3 python3.13 python3.12 python3.11 python; do
    if suits "$name"; then
      echo "$name"
      return
    fi
  done
  fail "found no Python 3.11 to 3.13 with the venv module on PATH; install one (on Debian or Ubuntu: apt-get install \
python3-venv) or set KD_JAX_PYTHON to its path"
}

if [[ -n "${KD_JAX_PYTHON:-}" && -x $venv/bin/python && "$(version "$KD_JAX_PYTHON")" != "$(version "$venv/bin/python")" ]]; then
  fail "$venv holds Python $(version "$venv/bin/python"), which KD_JAX_PYTHON=$KD_JAX_PYTHON is not; remove $venv first, or choose \
another with --venv"
fi

# The copy of the lock inside the environment is written last, so it is there only when all of it was installed.
if [[ -x $venv/bin/python ]] && cmp -s "$lock" "$venv/installed/$lock"; then
  exit
fi

if [[ -e $venv/installing ]] || ! suits "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  echo "Making the virtual environment $venv with Python $(version "$python")"
  "$python" -m venv --clear "$venv"
fi

echo "Installing the packages of $lock into $venv (a few minutes, this once; log in $venv/install.log)"
touch "$venv/installing"
# Not compiled to bytecode: most modules are never imported, and the others are compiled on import.
if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile -r "$lock" >"$venv/install.log" 2>&1; then
  rm "$venv/installing"
  grep -v '^Ignoring' "$venv/install.log" | tail -n 10 >&2
  fail "pip could not install $lock; the end of $venv/install.log is above"
fi
rm "$venv/installing"
mkdir -p "$venv/installed"
case "$lock" in # each contains those before it
  requirements-demo.txt) cp requirements.txt "$venv/installed/" ;;
  requirements-dev.txt) cp requirements.txt requirements-demo.txt "$venv/installed/" ;;
esac
cp "$lock" "$venv/installed/"
echo "Installed in ${SECONDS} s"
