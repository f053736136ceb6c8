#!/usr/bin/env bash
# Mid-train granite-4.0-micro on the study's MCS mixture: 26.2B tokens on 16 H100s (h100x16).
# From the repository's folder: sbatch slurm/mid_3b.sh [key=value ...]
# What a site must change is in slurm/site.sh.
#SBATCH --job-name=mid-3b
#SBATCH --nodes=2
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

exec bash slurm/stage.sh prism-nemo midtrain recipes/midtrain.py model=granite-4.0-micro hardware=h100x16 \
    checkpoint="$PRISM_NEMO_ROOT/checkpoints/granite-4.0-micro" data="$PRISM_NEMO_ROOT/data/granite-4.0-micro/mcs" \
    run_dir="$PRISM_NEMO_ROOT/runs/granite-4.0-micro-mcs" "$@"
