#!/usr/bin/env bash
# One slice of a chain: run the command, and queue the job again if there is more to do and the slice got further.
#
#   chain.sh RUN_DIR COMMAND...
#
# What the command's exit code leads to:
#   0    done                                     the job ends well, jobs that wait for it start
#   2    the input is wrong, nothing was started  the job ends; the same again would end the same
#   75   stopped with a checkpoint (time limit)   queued again, if its newest checkpoint is newer than before
#   else failed, killed, a node died              queued again if it got further; without that once more, for a bad
#                                                 node is one reason; then the job ends
# How often a slice got no further is kept in RUN_DIR/chain, one number in a file, so that a person can read it.
set -uo pipefail
run_dir=${1:?RUN_DIR}
shift

# Step of the newest whole checkpoint; 0 if there is none. A folder without a manifest is one that was never finished.
newest_step() {
    local manifest step=0
    for manifest in "$run_dir"/checkpoints/step_*/manifest.json; do
        [ -f "$manifest" ] || continue
        manifest=${manifest%/manifest.json}
        [[ ${manifest##*/step_} =~ ^[0-9]+$ ]] || continue
        manifest=$((10#${manifest##*/step_}))
        [ "$manifest" -le "$step" ] || step=$manifest
    done
    echo "$step"
}

number() { cat "$run_dir/chain/$1" 2>/dev/null || echo 0; }
keep() { mkdir -p "$run_dir/chain" && echo "$2" >"$run_dir/chain/$1"; }
say() { echo "prism-nemo chain: $*" >&2; }

again() {
    local restarts=$(($(number restarts) + 1))
    if [ "$restarts" -gt "${PRISM_NEMO_MAX_RESTARTS:-100}" ]; then
        say "$run_dir was started again ${PRISM_NEMO_MAX_RESTARTS:-100} times (PRISM_NEMO_MAX_RESTARTS); not once more"
        exit 1
    fi
    keep restarts "$restarts"
    # Slurm ends this script soon after; what it still says must not be lost to that.
    trap '' TERM
    if [ -z "${SLURM_JOB_ID:-}" ] || ! scontrol requeue "$SLURM_JOB_ID"; then
        say "the job could not be queued again (no Slurm, or --no-requeue); start the same command to continue"
        exit 75
    fi
    say "queued again as job $SLURM_JOB_ID (restart $restarts)"
    exclude
    exit 75
}

# Nodes that slurm/health.sh found bad; a job's own list can be changed once it waits again, which it does now.
exclude() {
    local nodes
    nodes=$(cat "$run_dir/chain/bad_nodes" 2>/dev/null) || return 0
    for _ in 1 2 3 4 5; do
        if scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$nodes"; then
            say "without $nodes"
            return 0
        fi
        sleep 1
    done
    say "$nodes could not be excluded; if it is chosen again: scontrol update JobId=$SLURM_JOB_ID ExcNodeList=$nodes"
}

before=$(newest_step)
# A slice that left this behind was ended without a word: its node died, or Slurm killed and queued it again by itself.
if [ -f "$run_dir/chain/started" ] && [ "$(number started)" -ge "$before" ]; then
    stalled=$(($(number stalled) + 1))
    keep stalled "$stalled"
    say "the slice before this one was ended from outside and left no new checkpoint ($stalled in a row)"
    if [ "$stalled" -ge 3 ]; then
        say "not tried again; once the reason is found: rm -r $run_dir/chain, and start it again"
        rm -f "$run_dir/chain/started"
        exit 1
    fi
fi
keep started "$before"
"$@"
code=$?
rm -f "$run_dir/chain/started"
after=$(newest_step)

case $code in
    0)
        keep stalled 0
        exit 0
        ;;
    2)
        say "the input is wrong (the message is above); not queued again"
        exit 2
        ;;
esac
if [ "$after" -gt "$before" ]; then
    keep stalled 0
    say "exit code $code at step $after, from step $before"
    again
fi
stalled=$(($(number stalled) + 1))
keep stalled "$stalled"
if [ "$code" -eq 75 ]; then
    say "stopped at step $after, where it started: the next slice would get no further. Give it more time, or save" \
        "more often (checkpoint.save_interval); then: rm -r $run_dir/chain, and start it again"
    exit 1
fi
if [ "$stalled" -ge 2 ]; then
    say "exit code $code, and no new checkpoint since step $after for the second time in a row; not queued again." \
        "The message is above; once it is mended: rm -r $run_dir/chain, and start it again"
    exit 1
fi
say "exit code $code at step $after, where it started; once more, in case it was the node"
again
