#!/bin/bash
# Trains on a machine that may be taken away (spot, pre-emptible), and continues when it, or another one, is back:
#
#     examples/spot.sh RECIPE --budget.gpu-hours 8 --run.out /mnt/shared/runs/mine [--section.key value ...]
#
# --run.out must outlive the machine (a network disk, a mounted bucket). Start this script at boot (cron @reboot, a
# systemd unit, cloud-init): a run that is complete is left as it is and ends with 0. Clouds send SIGTERM when the
# machine shuts down, which reaches the run; if it is cut off without notice, it continues from its last checkpoint, and
# the time in between counts as lost in its ledger. Exit codes: 0 done; 3 saved, start again; anything else needs you.
# For several GPUs put torchrun in place of std-fast below; it ends with 1 for 3: look for summary.json in the folder.

set -u
if [ $# -lt 1 ]; then
    echo "usage: $0 RECIPE --run.out FOLDER [--section.key value ...]" >&2
    exit 2
fi

# Exit code of a process; a trapped signal ends bash's `wait` early, so wait again.
await() {
    local code
    while true; do
        signalled=0
        wait "$1"
        code=$?
        if [ "$signalled" -eq 0 ]; then return "$code"; fi
    done
}

stopped=0
trap 'signalled=1; stopped=1; kill -TERM "$run" 2>/dev/null' TERM INT USR1
while true; do
    std-fast train "$@" --resume &
    run=$!
    await "$run"
    code=$?
    if [ "$code" -ne 3 ] || [ "$stopped" -eq 1 ]; then
        exit "$code" # done, a mistake, or the machine goes away
    fi
    echo "saved; starting again" >&2 # only the run got the signal
done
