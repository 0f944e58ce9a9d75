#!/bin/bash
# What tpu_vm.sh starts on every worker: worker.sh JOB EXPERIMENT [OPTIONS ...].
# A connection that breaks leaves its process behind, which holds the chips; the next start ends it first.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p .cache
before=$(cat .cache/worker.pid 2>/dev/null || true)
[[ $before =~ ^[1-9][0-9]*$ ]] || before=''
lives() { [ -n "$before" ] && grep -qs ctrl_jax "/proc/$before/cmdline"; }
if lives; then
    kill -TERM "$before"
    for ((second = 0; second < 120; second++)); do
        lives || break
        sleep 1
    done
    ! lives || kill -KILL "$before"
fi
echo $$ >.cache/worker.pid # exec keeps the number
exec .venv/bin/python -m ctrl_jax "$@"
