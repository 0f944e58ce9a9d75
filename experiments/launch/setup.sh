#!/bin/bash
# Makes .venv on a bare Linux machine: setup.sh [tpu | cuda12]. A second time it does nothing.
# The images of TPU VMs have a Python too old for ctrl_jax, so uv brings its own.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
uv python install --quiet 3.12
make setup EXTRA="${1-}" PYTHON="$(uv python find 3.12)"
