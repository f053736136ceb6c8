#!/usr/bin/env bash
# Mid-train mistral-small-24b on the study's MCS mixture: 26.2B tokens on 64 H100s (h100x64).
# From the repository's folder: sbatch slurm/mid_24b.sh [key=value ...]
# What a site must change is in slurm/site.sh.
#SBATCH --job-name=mid-24b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# To the ranks, this many seconds before the limit: they finish the step, save, and exit with 75.
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -uo pipefail
cd "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/site.sh
source slurm/site.sh || exit 2

exec bash slurm/stage.sh prism-nemo midtrain recipes/midtrain.py model=mistral-small-24b hardware=h100x64 \
    checkpoint="$PRISM_NEMO_ROOT/checkpoints/mistral-small-24b" data="$PRISM_NEMO_ROOT/data/mistral-small-24b/mcs" \
    run_dir="$PRISM_NEMO_ROOT/runs/mistral-small-24b-mcs" "$@"
