#!/usr/bin/env bash
# Makes the virtual environment, unless it is there already and up to date.
#
#   scripts/setup_environment.sh [EXTRAS] [DIRECTORY]
#
# EXTRAS are those of setup.py, such as `test` or `cuda`; none by default. DIRECTORY is .venv by default.
# PYTHON names the interpreter; by default the first of python3, python3.12, python3.13, python3.11 that is 3.11 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=${1:-}
directory=${2:-.venv}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.13 python3.11}; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer with venv was found (tried: ${PYTHON:-python3 python3.12 python3.13 python3.11})." >&2
  echo "Install one (on Debian and Ubuntu also python3-venv), or name it: PYTHON=/path/to/python $0" >&2
  return 1
}

# Installed again only when what setup.py asks for has changed.
stamp="$directory/.installed${extras:+-$extras}"
wanted=$(cksum setup.py pyproject.toml)
if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi

python=$(find_python)
if [[ ! -x $directory/bin/python ]]; then
  echo "Making $directory with $("$python" --version)"
  "$python" -m venv "$directory"
fi
echo "Installing dialog_jax${extras:+ with [$extras]} into $directory (a few minutes the first time)"
"$directory/bin/python" -m pip install -qq --disable-pip-version-check --editable ".${extras:+[$extras]}"
printf '%s\n' "$wanted" >"$stamp"
