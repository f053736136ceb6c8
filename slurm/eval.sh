#!/usr/bin/env bash
# Evaluate a model with the study's suites, one array task each: sbatch slurm/eval.sh CHECKPOINT [option ...]
# Another size than 8B: give --tp and --dp as well. From the repository's folder; what a site must change is in
# slurm/site.sh.
#SBATCH --job-name=eval
#SBATCH --array=0-2
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=12:00:00
# Every batch of answers is kept: an evaluation that is ended goes on where it was, without a signal.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -uo pipefail
cd "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/site.sh
source slurm/site.sh || exit 2

model=${1:?the checkpoint or Hugging Face folder}
shift
suites=(reasoning retention longcontext)
suite=${suites[${SLURM_ARRAY_TASK_ID:-0}]}
# The folder is named after the run, not only after the step: step_00025000 of two runs are two models.
name=$(basename "${model%/checkpoints/*}")
exec bash slurm/stage.sh prism-nemo eval "$model" --suite "$suite" --tp 2 --dp 4 \
    --out "$PRISM_NEMO_ROOT/evaluations/$name-$suite" "$@"
