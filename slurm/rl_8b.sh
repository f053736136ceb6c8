#!/usr/bin/env bash
# RL with verifiable rewards on the mid-trained granite-3.3-8b: 1,000 steps on 32 H100s (h100x32).
# From the repository's folder: sbatch slurm/rl_8b.sh [key=value ...]
# What a site must change is in slurm/site.sh.
#SBATCH --job-name=rl-8b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# To the ranks, half an hour before the limit: a step writes and judges 1,024 answers before it can stop.
#SBATCH --signal=USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail
cd "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/site.sh
source slurm/site.sh || exit 2

exec bash slurm/stage.sh prism-nemo rl recipes/rl.py model=granite-3.3-8b hardware=h100x32 \
    checkpoint="$PRISM_NEMO_ROOT/runs/granite-3.3-8b-mcs/checkpoints/step_00025000" \
    tokenizer="$PRISM_NEMO_ROOT/hf/granite-3.3-8b" prompts="$PRISM_NEMO_ROOT/prompts/unbalanced" mixture=mcs \
    run_dir="$PRISM_NEMO_ROOT/runs/granite-3.3-8b-mcs-rl-mcs" "$@"
