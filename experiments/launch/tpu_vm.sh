#!/bin/bash
# Runs a job on a Cloud TPU of any size, from the queue to the last checkpoint, and deletes the TPU at the end.
#
#   experiments/launch/tpu_vm.sh --name bon --zone us-west4-a --type v5litepod-256 --spot \
#       --share 10.0.0.2:/runs -- train bon_helpful_hh --policy.kl-budget 2
#
# It asks for the TPU as a queued resource, waits until it is active, copies the tracked files of this checkout to all
# workers, installs there, and runs the command after `--` on all of them at once. Where the TPU is preempted, it is
# deleted and asked for anew, and the same command goes on from the last checkpoint on the share. The script lives as
# long as the job, so run it in tmux; if it is killed, the same call finds the TPU again and goes on.
#
# Exit code: the job's; 2 for a mistake in the call; 1 where the TPU was not to be had in --tries tries.
set -euo pipefail
cd "$(dirname "$0")/../.."

usage() {
    cat <<'END'
tpu_vm.sh --name NAME --zone ZONE --type TYPE --share SERVER:/PATH [options] -- JOB EXPERIMENT [OPTIONS ...]

  --name NAME        of the queued resource and of its node
  --zone ZONE        such as us-west4-a
  --type TYPE        the accelerator type: v5litepod-256, v5p-128, v6e-64, v4-32 ...
  --share PATH       where runs are kept: an NFS share, such as Filestore's, which all workers mount at /runs; what is on
                     a worker's own disk is lost with it
  --runtime VERSION  of the TPU's software; by default what fits the type
  --project PROJECT  by default gcloud's own
  --spot             cheaper, and may be taken away at any time
  --before COMMAND   what each worker runs in the checkout before the job, such as: ln -sfn /runs/models models
  --tries N          how often to start, where the TPU is preempted or the connection breaks (20)
  --poll SECONDS     between two looks at the queue (30)
  --keep             do not delete the TPU at the end
  --dry-run          print every command, in order, and run none
END
}

fail() {
    echo "error: $*" >&2
    exit 2
}

# Its arguments as a shell would take them.
quoted() {
    local word separator=''
    for word; do
        [[ $word =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
        printf '%s%s' "$separator" "$word"
        separator=' '
    done
}

name='' zone='' type='' share='' runtime='' project='' spot='' before='' tries=20 poll=30 keep='' dry=''
while [ $# -gt 0 ]; do
    case $1 in
        --name | --zone | --type | --share | --runtime | --project | --before | --tries | --poll)
            [ $# -gt 1 ] || fail "$1 needs a value."
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        --spot | --keep)
            printf -v "${1#--}" %s yes
            shift
            ;;
        --dry-run)
            dry=yes
            shift
            ;;
        --help | -h)
            usage
            exit
            ;;
        --)
            shift
            break
            ;;
        *) fail "there is no option $1; --help lists them. The job comes after --." ;;
    esac
done
for needed in name zone type share; do
    [ -n "${!needed}" ] || fail "--$needed is missing; --help lists the options."
done

# Refuses an option's value that is not as it should be: some become parts of commands, here and on the workers.
check() {
    local LC_ALL=C # where a-z are 26 letters
    [[ -z ${!1} || ${!1} =~ ^$2$ ]] || fail "--$1 is $(quoted "${!1}"); $3"
}
check name '[a-z]([-a-z0-9]{0,61}[a-z0-9])?' 'a name has a to z, 0 to 9 and -, and begins with a letter.'
check zone '[a-z]+[-a-z0-9]*' 'a zone is such as us-west4-a.'
check type '[a-z][-a-z0-9]*' 'an accelerator type is such as v5litepod-256.'
check runtime '[a-z][-a-z0-9.]*' "see 'gcloud compute tpus tpu-vm versions list'."
check project '[a-z][-a-z0-9.:]*' 'give the ID of a project.'
check share '([A-Za-z0-9][-A-Za-z0-9.]*|\[[0-9a-fA-F:]+\]):/([^/[:cntrl:]][^[:cntrl:]]*)?' \
    'it has to be SERVER:/PATH of an NFS share. A bucket has neither locks nor files that grow.'
check tries '[1-9][0-9]{0,4}' 'give a number from 1 on.'
check poll '[1-9][0-9]{0,4}' 'give whole seconds, from 1 on.'
[ $# -ge 2 ] || fail "the job is missing: give it after --, such as: -- train bon_helpful_hh"
if [ -z "$runtime" ]; then
    case $type in
        v6e-*) runtime=v2-alpha-tpuv6e ;;
        v5p-*) runtime=v2-alpha-tpuv5 ;;
        v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
        v4-*) runtime=tpu-ubuntu2204-base ;;
        *) fail "no runtime is known for $type; give --runtime, see 'gcloud compute tpus tpu-vm versions list'." ;;
    esac
fi
place=(--zone="$zone" ${project:+--project="$project"})
queue=(gcloud compute tpus queued-resources)
node=(gcloud compute tpus tpu-vm)
code_archive=.cache/launch/$name.tar.gz
exec 3>&1 # where commands are printed, also from within $(...)

say() { echo "tpu_vm: $*" >&2; }

# Prints a command, and runs it unless this is a dry run.
run() {
    echo "+ $(quoted "$@")" >&3
    [ -n "$dry" ] || "$@"
}

# Likewise for what only looks; a real run prints the answers instead.
look() {
    if [ -n "$dry" ]; then run "$@"; else "$@"; fi
}

# ACTIVE where the TPU can be used; NONE where there is none, UNKNOWN where gcloud could not tell; otherwise the state of
# the queued resource, or of its node, which tells of a preemption first.
state() {
    local answer found
    if ! answer=$(look "${queue[@]}" describe "$name" "${place[@]}" --format='value(state.state)' 2>"$errors"); then
        if grep -qi 'not.found' "$errors"; then
            answer=NONE
        else
            cat "$errors" >&2
            answer=UNKNOWN
        fi
    elif [ "${answer:=$assumed}" = ACTIVE ]; then
        found=$(look "${node[@]}" describe "$name" "${place[@]}" --format='value(state)') || found=UNKNOWN
        case $found in
            PREEMPTED | TERMINATED) answer=SUSPENDED ;;
            READY | '') ;;
            *) answer=$found ;;
        esac
    fi
    echo "$answer"
}

delete() { run "${queue[@]}" delete "$name" "${place[@]}" --force --quiet; }

# Waits until the TPU is active, asking for it where there is none. 1 where it was taken away, and is deleted now.
acquire() {
    local now last=''
    while :; do
        now=$(state)
        [ "$now" = "$last" ] || [ -n "$dry" ] || say "$name is $now"
        last=$now
        case $now in
            ACTIVE)
                there=yes
                return
                ;;
            NONE)
                run "${queue[@]}" create "$name" --node-id="$name" "${place[@]}" --accelerator-type="$type" \
                    --runtime-version="$runtime" ${spot:+--spot} || exit
                there=yes prepared='' assumed=ACTIVE
                [ -z "$dry" ] || continue
                ;;
            FAILED | SUSPENDED)
                delete || true
                there='' prepared=''
                return 1
                ;;
        esac
        sleep "$poll"
    done
}

on_workers() { run "${node[@]}" ssh "$name" "${place[@]}" --worker=all --command="$1"; }

# shellcheck disable=SC2016 # bash -c expands its argument
prepare() {
    run mkdir -p .cache/launch &&
        run bash -c 'git ls-files -z --cached --others --exclude-standard | tar -czf "$1" --null -T -' tar "$code_archive" &&
        run "${node[@]}" scp "$code_archive" "$name:ctrl_jax.tar.gz" "${place[@]}" --worker=all &&
        on_workers 'mkdir -p ctrl_jax && tar -xzf ctrl_jax.tar.gz -C ctrl_jax' &&
        on_workers "ctrl_jax/experiments/launch/setup.sh tpu $(quoted "$share")" &&
        if [ -n "$before" ]; then on_workers "cd ctrl_jax && $before"; fi &&
        prepared=yes
}

there='' prepared='' assumed='' errors=/dev/null
if [ -n "$dry" ]; then assumed=NONE; else errors=$(mktemp); fi
# However it ends, no TPU is left to be paid for.
trap '[ -z "$there" ] || [ -n "$keep" ] || delete || say "$name could not be deleted: do it by hand."' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
for ((try = 1; try <= tries; try++)); do
    acquire || continue
    code=0
    if [ -n "$prepared" ] || prepare; then
        on_workers "ctrl_jax/experiments/launch/worker.sh $(quoted "$@" --distributed --runs-dir /runs)" || code=$?
    else
        code=$?
    fi
    [ $code -ne 0 ] || exit 0
    # 75: the job was told to stop, and saved. 255: the connection broke.
    if [ $code -ne 75 ] && [ $code -ne 255 ]; then
        sleep "$poll" # a preemption is seen by the job before it is seen in the state
        [ "$(state)" != ACTIVE ] || exit $code
    fi
    say "try $try of $tries ended with code $code; it goes on from the last checkpoint."
    sleep "$poll"
done
say "given up after $tries tries; the same call goes on."
exit 1
