# shellcheck shell=bash
# Where a container is used (slurm/site.sh): `container`, options of srun, and `inside`, what stands before the command.
# Sourced after site.sh, in the repository's folder.
# shellcheck disable=SC2034 # read by the scripts that source this one
container=()
inside=()
if [ -n "$PRISM_NEMO_CONTAINER" ]; then
    mounts=$PWD:$PWD${PRISM_NEMO_MOUNTS:+,$PRISM_NEMO_MOUNTS}
    case $PRISM_NEMO_CONTAINER_RUNTIME in
        pyxis)
            container=(--container-image="$PRISM_NEMO_CONTAINER" --container-mounts="$mounts")
            # The home folder would bring its own Python packages along.
            container+=(--container-workdir="$PWD" --no-container-mount-home)
            ;;
        apptainer) inside=(apptainer exec --nv --no-home --bind "$mounts" --pwd "$PWD" "$PRISM_NEMO_CONTAINER") ;;
        *)
            echo "site.sh: PRISM_NEMO_CONTAINER_RUNTIME=$PRISM_NEMO_CONTAINER_RUNTIME; use pyxis or apptainer" >&2
            return 2
            ;;
    esac
fi
