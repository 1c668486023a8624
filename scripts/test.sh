#!/usr/bin/env bash
# Runs the tests, in an environment made for them if need be.
#
#   ./scripts/test.sh                    what a change needs: a few minutes on two cores
#   ./scripts/test.sh --all              all tests
#   ./scripts/test.sh PYTEST ARGUMENTS   such as `-x`, or the tests that a path or -k names: -k score tests/scripts
#
# The exit code is pytest's: not zero if a test fails. PYTHON names the interpreter to make the environment with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export TRANSFORMERS_NO_ADVISORY_WARNINGS=1

tier=(-m "not full")
models=()
arguments=()
for argument in "$@"; do
  case $argument in
    --all) tier=() && models=(--gemma) && continue ;;
    -k* | -m*) tier=() ;;
    *) if [[ -e ${argument%%::*} ]]; then tier=(); fi ;;
  esac
  arguments+=("$argument")
done

scripts/setup_environment.sh test
.venv/bin/python scripts/prepare_demo.py "${models[@]}" --assets_dir=assets
# A worker has a file for itself, whose tests share what they have prepared and compiled.
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -q "${tier[@]}" "${arguments[@]}"
