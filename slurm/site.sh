# shellcheck shell=bash
# What a site must change. Every job reads this file; a value that is in the environment already is kept, so that
# one job can differ: PRISM_NEMO_CONTAINER=other.sqsh sbatch slurm/mid_8b.sh
#
# Account and partition are read by sbatch itself: set them once in your shell's start-up file
#   export SBATCH_ACCOUNT=my_project SBATCH_PARTITION=gpu
# or give them on the command line: sbatch --account=my_project --partition=gpu slurm/mid_8b.sh

# How the software comes about: modules and a virtual environment, or nothing where a container brings it along.
site_activate() {
    # module load cuda/13.0
    if [ -f .venv/bin/activate ]; then
        # shellcheck disable=SC1091
        source .venv/bin/activate
    fi
}

# A container image: a .sqsh file or registry reference for pyxis (srun --container-image), a .sif file for Apptainer.
# Empty for none. Mounts are as the runtime wants them, commas between them; the repository is always mounted.
: "${PRISM_NEMO_CONTAINER:=}"
: "${PRISM_NEMO_CONTAINER_RUNTIME:=pyxis}" # pyxis or apptainer
: "${PRISM_NEMO_MOUNTS:=}"

# Folder of data, checkpoints and runs, on a file system that all nodes see.
: "${PRISM_NEMO_ROOT:=study}"

# What a node must have before a job starts on it (slurm/health.sh).
: "${PRISM_NEMO_DISK_GB:=500}"    # free in the run directory; a checkpoint of 24B with its optimizer takes 330 GB
: "${PRISM_NEMO_MIN_BUS_GB:=0}"   # all-reduce GB/s within a node; 0: only compared with the other nodes
: "${PRISM_NEMO_HEALTH:=on}"      # off: start without looking

# Network interface of the nodes' own traffic, such as ib0 or ^lo,docker (^: all but); empty lets NCCL choose.
: "${PRISM_NEMO_INTERFACE:=}"

# Slurm's own limits of a chain (slurm/chain.sh).
: "${PRISM_NEMO_MAX_RESTARTS:=100}"

export PRISM_NEMO_CONTAINER PRISM_NEMO_CONTAINER_RUNTIME PRISM_NEMO_MOUNTS PRISM_NEMO_ROOT PRISM_NEMO_DISK_GB
export PRISM_NEMO_MIN_BUS_GB PRISM_NEMO_HEALTH PRISM_NEMO_INTERFACE PRISM_NEMO_MAX_RESTARTS
