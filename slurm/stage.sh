#!/usr/bin/env bash
# Any stage as a job: sbatch [--nodes=N ...] slurm/stage.sh prism-nemo midtrain config.yaml
# The other scripts of this folder are this one with a fixed size and command. Submit from the repository's folder.
#SBATCH --job-name=prism-nemo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
# To the ranks, ten minutes before the limit: they save, and exit with 75.
#SBATCH --signal=USR1@600
#SBATCH --requeue
# One log for the whole chain, in the folder that sbatch was called in; a restart adds to it.
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail
cd "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
if [ ! -f slurm/chain.sh ]; then
    echo "stage.sh: $PWD is not the repository; submit from its folder, or set PRISM_NEMO_HOME to it" >&2
    exit 2
fi
if [ $# -eq 0 ]; then
    echo "stage.sh: give the command, such as: sbatch slurm/stage.sh prism-nemo midtrain config.yaml" >&2
    exit 2
fi
# shellcheck source=slurm/site.sh
source slurm/site.sh
# shellcheck source=slurm/network.sh
source slurm/network.sh
site_activate

# Where the stage writes: run_dir=..., the run_dir of a configuration, or --out.
run_dir="" previous=""
for argument in "$@"; do
    case $argument in
        run_dir=*) run_dir=${argument#run_dir=} ;;
        *.yaml) [ ! -f "$argument" ] || run_dir=${run_dir:-$(sed -n 's/^run_dir: *//p' "$argument" | head -n 1)} ;;
    esac
    [ "$previous" != --out ] || run_dir=$argument
    previous=$argument
done
if [ -z "$run_dir" ]; then
    echo "stage.sh: no run_dir=..., no configuration with one, no --out in: $*" >&2
    exit 2
fi

# shellcheck source=slurm/container.sh
source slurm/container.sh || exit 2

# Every node is looked at first. A bad one is named, written down and left out of the next attempt.
# shellcheck disable=SC2317 # called by chain.sh
healthy() {
    [ "$PRISM_NEMO_HEALTH" = on ] || return 0
    local report gpus=${SLURM_GPUS_ON_NODE:-0}
    report=$(srun --ntasks-per-node=1 --ntasks="$SLURM_JOB_NUM_NODES" bash slurm/health.sh "$run_dir" "$gpus" 2>&1) || {
        echo "prism-nemo health: the check itself failed: $report" >&2
        return 1
    }
    if ! grep -q '^bad ' <<<"$report" && [ "${SLURM_NTASKS:-1}" -gt 1 ]; then
        report+=$'\n'$(srun "${container[@]}" "${inside[@]}" bash slurm/rank.sh python slurm/allreduce.py 2>&1) ||
            report+=$'\n'"bad all: ranks could not reach each other"
    fi
    grep -E '^(ok|bad|all) ' <<<"$report" | sed 's/^/prism-nemo health: /' >&2
    grep -q '^bad ' <<<"$report" || return 0
    grep -v -E '^(ok|bad|all) ' <<<"$report" | tail -n 20 >&2
    mkdir -p "$run_dir/chain" 2>/dev/null
    # Told to Slurm by chain.sh. A reason that all nodes share, such as a full disk, is no node's fault.
    if [ "$(grep -c '^bad ' <<<"$report")" -lt "$SLURM_JOB_NUM_NODES" ]; then
        sed -n 's/^bad \([^ :]*\):.*/\1/p' <<<"$report" | grep -v '^all$' | sort -u | paste -sd, \
            >"$run_dir/chain/bad_nodes"
    fi
    return 1
}

# shellcheck disable=SC2317 # called by chain.sh
slice() {
    healthy || return 1
    # A rank that is gone ends the others after ten minutes, not at the time limit; at once would cut off a save.
    srun --wait=600 "${container[@]}" "${inside[@]}" bash slurm/rank.sh "$@"
}

echo "prism-nemo: job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, restart ${SLURM_RESTART_COUNT:-0}: $*" >&2
if [ -d "$run_dir" ] || mkdir -p "$run_dir" 2>/dev/null; then
    # For `prism-nemo status`: which job this is, and where it logs.
    printf '{"job": "%s", "nodes": "%s", "restarts": %s, "log": "%s"}\n' "$SLURM_JOB_ID" "$SLURM_JOB_NODELIST" \
        "${SLURM_RESTART_COUNT:-0}" "${SLURM_SUBMIT_DIR:-$PWD}/${SLURM_JOB_NAME:-prism-nemo}-$SLURM_JOB_ID.out" \
        >"$run_dir/slurm.json"
fi
source slurm/chain.sh "$run_dir" slice "$@"
