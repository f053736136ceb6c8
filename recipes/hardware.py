"""GPUs and how a model of 8B to 24B is laid out on them. The study does not state its layout; these are ours."""

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError

HARDWARE = {
    "cpu": ParallelConfig(),
    "cpu2": ParallelConfig(data_parallel_size=2),
    "h100x8": ParallelConfig(tensor_model_parallel_size=4, data_parallel_size=2, sequence_parallel=True),
    "h100x64": ParallelConfig(
        tensor_model_parallel_size=4, pipeline_model_parallel_size=2, data_parallel_size=8, sequence_parallel=True
    ),
}


def layout_of(hardware: str) -> ParallelConfig:
    """The layout for a name.

    Raises:
        InputError: If there is none; lists those there are.
    """
    if hardware not in HARDWARE:
        raise InputError(f"hardware '{hardware}' is unknown; choose one of {', '.join(HARDWARE)}")
    return HARDWARE[hardware]
