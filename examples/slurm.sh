#!/bin/bash
# Trains under SLURM on one node or several, and continues after every preemption or time limit:
#
#     sbatch examples/slurm.sh mixer_s16_std --data.train /data/imagenet-train.beton --data.val /data/imagenet-val.beton
#     sbatch --nodes 2 examples/slurm.sh mixer_s16_std --budget.gpu-hours 64 --data.train /data/imagenet-train.beton
#
# run.batch is the global batch: sixteen GPUs train on the batch that one would train on. SLURM sends SIGUSR1 to every
# process two minutes before the time limit (a site that preempts sends it too, or SIGTERM). The run then saves after the
# current step and exits with code 3, and this script requeues the job. Any other code ends the job. (srun passes the
# code on; torchrun ends with 1 instead, and then a run is complete where its folder holds summary.json.) Hours in the
# queue are not charged to the budget; what a failing node had not saved is counted as lost.

#SBATCH --job-name=std-fast
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=08:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -u
if [ $# -lt 1 ]; then
    echo "usage: sbatch $0 RECIPE [--section.key value ...]" >&2
    exit 2
fi

# The folder must be the same after a requeue; the job's number is.
out=${STD_FAST_OUT:-runs/slurm-${SLURM_JOB_ID:?"start this with sbatch"}}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# One process for each GPU, each with the cores of its task.
# shellcheck disable=SC2016 # expanded in the task
srun --kill-on-bad-exit=1 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec std-fast train "$@" --data.threads "$SLURM_CPUS_PER_TASK"
' task "$@" --run.out "$out" --resume
code=$?

if [ "$code" -eq 3 ]; then
    echo "saved; requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
