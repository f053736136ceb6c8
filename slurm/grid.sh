#!/usr/bin/env bash
# The stages of an experiment of one kind as an array: what python -m recipes.grid write has put into stages.json.
#   python -m recipes.grid write context --hardware h100x64
#   sbatch --array=0-2%2 slurm/grid.sh study/stages/stages.json midtrain        at most two at a time
# python -m recipes.grid submit queues all kinds at once, each stage after those that it needs.
#SBATCH --job-name=grid
#SBATCH --array=0
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out
set -uo pipefail
cd "${PRISM_NEMO_HOME:-${SLURM_SUBMIT_DIR:-.}}" || exit 2
# shellcheck source=slurm/site.sh
source slurm/site.sh || exit 2
site_activate

# One argument a line: paths may hold spaces.
mapfile -t command < <(
    python - "${1:?stages.json}" "${2:?kind of stage: midtrain, rl or eval}" "${SLURM_ARRAY_TASK_ID:-0}" <<'PYTHON'
import json, sys

path, verb, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
found = [stage for stage in json.load(open(path)) if stage["command"][1] == verb]
if index >= len(found):
    sys.exit(f"grid.sh: {path} has {len(found)} stages of {verb}; use --array=0-{len(found) - 1}")
print("\n".join(found[index]["command"]))
PYTHON
)
[ "${#command[@]}" -gt 0 ] || exit 2
exec bash slurm/stage.sh "${command[@]}"
