#!/usr/bin/env bash
# One page about runs, evaluations and analyses: sbatch slurm/report.sh DIRECTORY... [--out FILE]
# Needs no GPU. From the repository's folder; what a site must change is in slurm/site.sh.
#SBATCH --job-name=report
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:30:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
set -euo pipefail
cd "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-.}}"
# shellcheck source=slurm/site.sh
source slurm/site.sh
# shellcheck source=slurm/container.sh
source slurm/container.sh
site_activate
srun --ntasks=1 "${container[@]}" "${inside[@]}" prism-nemo report "$@"
