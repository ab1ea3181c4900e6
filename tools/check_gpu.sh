#!/usr/bin/env bash
# bash tools/check_gpu.sh [--work-dir DIR]
# Runs everything once on this machine's GPU and compares with its CPU; docs/install.md, "GPU", says how to read the table.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python || command -v python3) ||
  { echo "error: there is no Python: 'make setup' makes $root/.venv, or put one on the PATH" >&2; exit 2; }
PYTHONPATH=$root/projects${PYTHONPATH:+:$PYTHONPATH} exec "$python" "$root/tools/check_gpu/run.py" "$@"
