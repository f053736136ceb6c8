#!/usr/bin/env bash
# Is this node fit for the job? One process on each node (slurm/stage.sh). Prints one line, "ok NODE" or
# "bad NODE: why", and exits 0 either way: the job decides what to do.
#
#   health.sh RUN_DIR GPUS        GPUS: how many this node must have; 0 for none
set -uo pipefail
run_dir=${1:?RUN_DIR} gpus=${2:?GPUS}
node=${SLURMD_NODENAME:-$(hostname -s)}
bad=()

if [ "$gpus" -gt 0 ]; then
    if ! command -v nvidia-smi >/dev/null; then
        bad+=("no nvidia-smi: the driver is not there")
    else
        ask() { nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null; }
        found=$(ask index | wc -l)
        [ "$found" -ge "$gpus" ] || bad+=("$found GPUs, $gpus are needed")
        errors=$(ask ecc.errors.uncorrected.volatile.total | awk '$1 + 0 > 0' | wc -l)
        [ "$errors" -eq 0 ] || bad+=("$errors GPUs with uncorrected memory errors")
        hot=$(ask clocks_throttle_reasons.hw_slowdown | grep -c '^Active' || true)
        [ "$hot" -eq 0 ] || bad+=("$hot GPUs slowed down by heat or power")
        # A card that somebody left at a fixed low clock makes all others wait for it.
        slow=$(ask clocks.applications.graphics,clocks.max.graphics |
            awk -F', *' '$1 ~ /^[0-9]/ && $1 < 0.6 * $2' | wc -l)
        [ "$slow" -eq 0 ] || bad+=("$slow GPUs set to less than 60 % of their highest clock")
    fi
fi

probe="$run_dir/.health-$node-$$"
if ! mkdir -p "$run_dir" 2>/dev/null || ! : 2>/dev/null >"$probe"; then
    bad+=("$run_dir cannot be written: read-only, full, or not mounted here")
else
    # A file's time is the file server's clock: nodes that differ from it differ from each other.
    skew=$(($(date +%s) - $(stat -c %Y "$probe")))
    [ "${skew#-}" -le 5 ] || bad+=("its clock differs from the file server's by $skew s")
    rm -f "$probe"
    free=$(df -Pk "$run_dir" | awk 'NR == 2 { print int($4 / 1e6) }')
    least=${PRISM_NEMO_DISK_GB:-0}
    [ "$free" -ge "$least" ] || bad+=("$free GB free in $run_dir, $least are asked for")
fi
# Checkpoints are written by a process beside each rank, which wants room in /dev/shm.
shared=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print int($4 / 1e3) }')
[ "${shared:-1000}" -ge 500 ] || bad+=("${shared} MB free in /dev/shm")

if [ "${#bad[@]}" -eq 0 ]; then
    echo "ok $node"
else
    (IFS=';' && echo "bad $node: ${bad[*]}")
fi
