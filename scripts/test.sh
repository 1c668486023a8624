#!/usr/bin/env bash
# Runs all tests, in an environment made for it if need be.
#
#   ./scripts/test.sh [PYTEST ARGUMENTS]        such as: ./scripts/test.sh -k score -x
#
# Exits with pytest's code: not zero if a test fails. PYTHON names the interpreter to make the environment with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export TRANSFORMERS_NO_ADVISORY_WARNINGS=1

scripts/setup_environment.sh test
.venv/bin/python scripts/prepare_demo.py --assets_dir=assets
exec .venv/bin/python -m pytest -n 2 -q tests "$@"
