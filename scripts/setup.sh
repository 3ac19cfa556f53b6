#!/bin/sh
# Makes the virtual environment in $VENV and installs trimtab with the tested versions.
set -eu
PYTHON="${PYTHON:-python3}"
VENV="${VENV:-.venv}"
if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  found=$("$PYTHON" -c 'import sys; print("Python " + sys.version.split()[0])' 2>/dev/null || echo nothing that runs)
  echo "trimtab needs Python 3.11 or newer, found ${found} as '${PYTHON}'; point make at another one: make PYTHON=python3.12 ..." >&2
  exit 2
fi
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
if [ -n "${TORCH_INDEX_URL:-}" ]; then
  "$VENV/bin/python" -m pip install -q --disable-pip-version-check --index-url "$TORCH_INDEX_URL" "torch==2.13.0"
fi
echo "Installing trimtab and what it needs into $VENV (a few minutes the first time) ..."
"$VENV/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt "torch==2.13.0"
"$VENV/bin/python" -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[test,lint,docs]"
