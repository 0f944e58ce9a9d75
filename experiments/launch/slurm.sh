#!/bin/bash
# A job on Slurm that goes on by itself after a preemption or at its time limit:
#
#   sbatch --gpus-per-node 1 --time 12:00:00 experiments/launch/slurm.sh train bon_helpful_hh --runs-dir /shared/runs
#
# On several GPUs or nodes start one process a GPU, and let each see all GPUs of its node:
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 experiments/launch/slurm.sh train bon_helpful_hh ...
#
# A sweep is a job a point:
#
#   make sweep EXP=bon_helpful_hh ARGS="--runs-dir /shared/runs --write-jobs jobs"
#   for job in jobs/*.sh; do sbatch --gpus-per-node 1 experiments/launch/slurm.sh "$job"; done
#
#SBATCH --job-name=ctrl_jax
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
# SIGTERM to the processes, not to this script, five minutes before the limit: they save and end with code 75.
#SBATCH --signal=TERM@300
set -uo pipefail

if [ $# -eq 0 ]; then
    echo 'error: the job is missing, such as: sbatch experiments/launch/slurm.sh train bon_helpful_hh' >&2
    exit 2
fi
cd -- "${SLURM_SUBMIT_DIR:-.}" || exit
# The script of a point is given by its path; a file that happens to be called train is none.
if [[ $1 == */* && -f $1 ]]; then
    job=("$@")
else
    job=(.venv/bin/python -m ctrl_jax "$@")
fi
# Where one process is lost, the others notice and end by themselves; two minutes later the rest is killed. Not at once:
# all need their time to save after SIGTERM, and a kill would hide their code 75.
srun --kill-on-bad-exit=0 --wait=120 "${job[@]}"
code=$?
# 75 also where a process was lost; an error that only looks like that would come back after every start.
restarts=${SLURM_RESTART_COUNT:-0}
[[ $restarts =~ ^[0-9]+$ ]] || restarts=0
if [ $code -eq 75 ] && [ "$restarts" -ge 20 ]; then
    echo 'slurm: ended with code 75, and was started again 20 times before: the log tells why. The same sbatch goes on.' >&2
elif [ $code -eq 75 ]; then
    echo "slurm: ended with code 75, to go on; queued again"
    scontrol requeue "$SLURM_JOB_ID" && exit 0
fi
exit $code
