#!/bin/bash
# Trains within a GPU-hour budget under SLURM and goes on after every pre-emption or time limit:
#
#     sbatch examples/slurm_requeue.sh imagenet_mixer --budget.gpu-hours 64 --data.train /data/train.beton
#
# SLURM sends SIGUSR1 two minutes before the time limit (--signal); a site that pre-empts sends it too, or SIGTERM
# (PreemptParameters=send_user_signal). The run then saves after the step that it is in and exits with code 3, for which
# this script puts the job back into the queue. Any other code ends the job. Hours in the queue are nobody's; what a
# node that dies had not saved is counted as lost.

#SBATCH --job-name=std-fast
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
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
gpus=${SLURM_GPUS_ON_NODE:-1}

# A process of its own each, without torchrun's launcher between the signal and the processes that must save.
port=$((20000 + SLURM_JOB_ID % 20000))
pids=()
for ((rank = 0; rank < gpus; rank++)); do
    RANK=$rank LOCAL_RANK=$rank WORLD_SIZE=$gpus MASTER_ADDR=127.0.0.1 MASTER_PORT=$port \
        std-fast train "$@" --run.out "$out" --resume &
    pids+=($!)
done

stop() { kill -TERM "${pids[@]}" 2>/dev/null; }
trap 'signalled=1; stop' USR1 TERM

# As they end, in whatever order: when one fails, the others are stopped at once instead of waiting for it.
code=0
for ((left = gpus; left > 0; left--)); do
    while true; do # a trapped signal ends bash's `wait` early, then it is asked again
        signalled=0
        wait -n
        now=$?
        if [ "$signalled" -eq 0 ] || [ "$now" -le 128 ]; then break; fi
    done
    if [ "$now" -ne 0 ] && { [ "$code" -eq 0 ] || [ "$code" -eq 3 ]; }; then code=$now; fi
    if [ "$now" -ne 0 ] && [ "$now" -ne 3 ]; then stop; fi
done

if [ "$code" -eq 3 ]; then
    echo "saved; back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
