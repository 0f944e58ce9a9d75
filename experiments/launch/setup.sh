#!/bin/bash
# Makes a bare Linux machine ready: setup.sh EXTRA [SERVER:/SHARE]. A second time it does nothing.
# EXTRA is tpu, cuda12 or ''. The NFS share is mounted at /runs: it outlives the machine, and several hosts see the same.
set -euo pipefail
cd "$(dirname "$0")/../.."
fail() {
    echo "error: $*" >&2
    exit 2
}
[[ ${1-} =~ ^([a-z0-9-]+(,[a-z0-9-]+)*)?$ ]] || fail "the first argument is $1; it is tpu, cuda12 or ''."
[[ -z ${2-} || $2 =~ ^([A-Za-z0-9][-A-Za-z0-9.]*|\[[0-9a-fA-F:]+\]):/([^/[:cntrl:]][^[:cntrl:]]*)?$ ]] ||
    fail "the second argument is $2; it is SERVER:/PATH of an NFS share."
# Whether this user may write to the share; the server decides, whatever the permissions look like here.
writable() {
    local probe
    probe=$(mktemp /runs/.setup.XXXXXX 2>/dev/null) && rm -f "$probe"
}
if [ -n "${2-}" ] && ! mountpoint -q /runs; then
    command -v mount.nfs >/dev/null || { sudo apt-get update -qq && sudo apt-get install -qq -y nfs-common; }
    sudo mkdir -p /runs
    # In version 3 the locks of a machine that vanished stay. By default a host remembers for a while that a file was not
    # there, and misses what another has written meanwhile.
    # No program of the share runs as another user, and no file of it is a device.
    sudo mount -t nfs -o nfsvers=4.1,lookupcache=positive,nosuid,nodev "$2" /runs
    if ! writable; then
        # A new share is root's. It becomes this user's alone; one that is somebody's stays so.
        [ "$(stat -c %u /runs)" != 0 ] || sudo chown "$(id -u):$(id -g)" /runs || true
        writable || fail "this user ($(id -u)) may not write to $2, which belongs to user $(stat -c %u /runs): let the \
server's export or a group allow it (docs/launch.md)."
    fi
fi
# The images of TPU VMs have a Python too old for ctrl_jax; uv brings its own.
export PATH="$HOME/.local/bin:$PATH"
command -v uv >/dev/null || python3 -m pip install --user --quiet uv
uv python install --quiet 3.12
make setup EXTRA="${1-}" PYTHON="$(uv python find 3.12)"
