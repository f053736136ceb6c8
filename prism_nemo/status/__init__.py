"""Where runs stand: read from their directories, and from Slurm where there is one. Nothing here imports torch."""
