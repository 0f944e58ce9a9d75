#!/bin/bash
# Makes a bare Linux machine ready: setup.sh EXTRA [SERVER:/SHARE]. A second time it does nothing.
# EXTRA is tpu, cuda12 or ''. The NFS share is mounted at /runs: it outlives the machine, and several hosts see the same.
set -euo pipefail
cd "$(dirname "$0")/../.."
if [ -n "${2-}" ] && ! mountpoint -q /runs; then
    command -v mount.nfs >/dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common; }
    sudo mkdir -p /runs
    # In version 3 the locks of a machine that vanished stay. By default a host remembers for a while that a file was not
    # there, and misses what another has written meanwhile.
    sudo mount -t nfs -o nfsvers=4.1,lookupcache=positive "$2" /runs
    [ -w /runs ] || sudo chmod a+rwx /runs
fi
# The images of TPU VMs have a Python too old for ctrl_jax; uv brings its own.
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
uv python install --quiet 3.12
make setup EXTRA="$1" PYTHON="$(uv python find 3.12)"
