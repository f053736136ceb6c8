#!/usr/bin/env bash
# One process of a stage: says which rank it is in the way that torch reads. Started by srun (slurm/stage.sh).
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# The signal before the time limit must not end a process that still imports; the stage takes it over when it is ready,
# and it also knows the limit itself (SLURM_JOB_END_TIME).
trap '' USR1
exec "$@"
