#!/usr/bin/env bash
# The whole way of Mistral-Small-24B: mid-train, RL, evaluate, report. It queues four jobs, each after the one before.
#   bash slurm/prism_24b.sh [sbatch option ...]        such as --account=A --partition=P
# With sbatch it does the same from a job of a minute, where the head node is not to be used.
#SBATCH --job-name=prism-24b
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:05:00
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-.}}"
# shellcheck source=slurm/site.sh
source slurm/site.sh

# A job that this one queues must not take its size from this one: sbatch reads these before the script's own lines.
for name in "${!SBATCH_@}" "${!SLURM_@}"; do
    case $name in
        SBATCH_ACCOUNT | SBATCH_PARTITION | SBATCH_QOS | SBATCH_RESERVATION | SLURM_CONF) ;;
        *) unset "$name" ;;
    esac
done

# --kill-on-invalid-dep: without it, a job whose predecessor failed would wait for ever.
after() { sbatch --parsable --kill-on-invalid-dep=yes --dependency="afterok:$1" "${@:2}"; }

mid=$(sbatch --parsable "$@" slurm/mid_24b.sh)
rl=$(after "${mid%%;*}" "$@" slurm/rl_24b.sh)
name=mistral-small-24b-mcs-rl-mcs
last=$PRISM_NEMO_ROOT/runs/$name/checkpoints/step_00001000
evaluations=$(after "${rl%%;*}" "$@" slurm/eval.sh "$last" --tp 4 --dp 2)
pages=$PRISM_NEMO_ROOT/reports
mkdir -p "$pages"
found=("$PRISM_NEMO_ROOT/runs/mistral-small-24b-mcs" "$PRISM_NEMO_ROOT/runs/$name")
for suite in reasoning retention longcontext; do
    found+=("$PRISM_NEMO_ROOT/evaluations/$name-$suite")
done
report=$(after "${evaluations%%;*}" "$@" slurm/report.sh "${found[@]}" --out "$pages/$name.html")
echo "mid-training ${mid%%;*}, RL ${rl%%;*}, evaluations ${evaluations%%;*}, report ${report%%;*}:" \
    "squeue --me, prism-nemo status, and in the end $pages/$name.html"
