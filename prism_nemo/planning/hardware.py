"""GPUs as data, each figure with its source, and everything that is assumed rather than known, in one place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from prism_nemo.config import resolve
from prism_nemo.errors import InputError


@dataclass(frozen=True)
class GPU:
    """One GPU as its vendor describes it. Peaks are dense: the datasheets' figures with sparsity are halved.

    Attributes:
        name: As people write it.
        memory_bytes: Capacity. The datasheets' GB are read as 10^9, the smaller reading.
        bf16_flops: Dense BF16 tensor-core FLOP/s.
        fp8_flops: Dense FP8 tensor-core FLOP/s; None where there is no FP8.
        memory_bandwidth: HBM bytes/s.
        nvlink_bandwidth: NVLink bytes/s, sum of both directions.
        network_bandwidth: Bytes/s and direction of the network port beside each GPU in the vendor's own machine.
        capability: CUDA compute capability, which decides the FP8 recipes (CUDA C++ Programming Guide).
        sources: Where the figures are stated.
    """

    name: str
    memory_bytes: float
    bf16_flops: float
    fp8_flops: float | None
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    capability: tuple[int, int]
    sources: tuple[str, ...]


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU(
            "a100",
            memory_bytes=80e9,
            bf16_flops=312e12,
            fp8_flops=None,
            memory_bandwidth=2.039e12,
            nvlink_bandwidth=600e9,
            network_bandwidth=25e9,  # 8 x 200 Gb/s
            capability=(8, 0),
            sources=("NVIDIA A100 Tensor Core GPU datasheet (A100 80GB SXM)", "NVIDIA DGX A100 datasheet (network)"),
        ),
        GPU(
            "h100",
            memory_bytes=80e9,
            bf16_flops=989e12,  # 1,979 with sparsity
            fp8_flops=1979e12,  # 3,958 with sparsity
            memory_bandwidth=3.35e12,
            nvlink_bandwidth=900e9,
            network_bandwidth=50e9,  # 8 x 400 Gb/s
            capability=(9, 0),
            sources=("NVIDIA H100 Tensor Core GPU datasheet (H100 SXM)", "NVIDIA DGX H100 datasheet (network)"),
        ),
        GPU(
            "h200",
            memory_bytes=141e9,
            bf16_flops=989e12,
            fp8_flops=1979e12,
            memory_bandwidth=4.8e12,
            nvlink_bandwidth=900e9,
            network_bandwidth=50e9,
            capability=(9, 0),
            sources=("NVIDIA H200 Tensor Core GPU datasheet (H200 SXM)", "NVIDIA DGX H200 datasheet (network)"),
        ),
        GPU(
            "b200",
            memory_bytes=180e9,  # 1,440 GB in 8
            bf16_flops=2250e12,  # half of FP8
            fp8_flops=4500e12,  # 72 PFLOP/s with sparsity in 8
            memory_bandwidth=8e12,  # 64 TB/s in 8
            nvlink_bandwidth=1800e9,
            network_bandwidth=50e9,
            capability=(10, 0),
            sources=(
                "NVIDIA DGX B200 datasheet (eight B200; network)",
                "NVIDIA Blackwell architecture brief (NVLink 5)",
            ),
        ),
    )
}


def find_gpu(name: str) -> GPU:
    """The GPU of that name.

    Raises:
        InputError: If there is none.
    """
    key = name.lower()
    if key not in GPUS:
        near = difflib.get_close_matches(key, GPUS, n=1, cutoff=0.3)
        advice = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"--gpu '{name}' is unknown; {advice}known: {', '.join(GPUS)}")
    return GPUS[key]


@dataclass
class Assumptions:
    """What no datasheet says. None of these was measured by this project; each can be set with ``--assume key=value``.

    Attributes:
        gemm_efficiency: Share of the BF16 peak that large matrix products reach.
        fp8_efficiency: Share of the FP8 peak that they reach in FP8: twice the work in the time that reads the same.
        attention_efficiency: Share that the attention kernel reaches.
        scan_efficiency: Share that the matrix products inside Mamba's scan reach: they are small.
        memory_efficiency: Share of the HBM bandwidth that elementwise kernels reach.
        nvlink_efficiency: Share of NVLink's bandwidth in one direction that collectives reach.
        network_efficiency: The same for the network.
        gpus_per_node: GPUs that NVLink connects.
        reserved_bytes: Per GPU, for the CUDA context, NCCL's buffers, libraries' workspaces.
        fragmentation: Share of the activations that the caching allocator loses.
    """

    gemm_efficiency: float = 0.65
    fp8_efficiency: float = 0.5
    attention_efficiency: float = 0.45
    scan_efficiency: float = 0.2
    memory_efficiency: float = 0.8
    nvlink_efficiency: float = 0.75
    network_efficiency: float = 0.8
    gpus_per_node: int = 8
    reserved_bytes: float = 4e9
    fragmentation: float = 0.1

    def to_dict(self) -> dict[str, float]:
        """As plain values."""
        return asdict(self)


def assumptions(overrides: Iterable[str] = ()) -> Assumptions:
    """The assumptions with ``key=value`` overrides.

    Raises:
        InputError: For an unknown key, or a value that is no share of anything.
    """
    found = resolve(Assumptions, overrides=overrides, source="--assume")
    for name, value in found.to_dict().items():
        if name.endswith("efficiency") and not 0 < value <= 1:
            raise InputError(f"--assume {name}={value}: expected a share above 0 and at most 1")
    if found.gpus_per_node < 1 or found.reserved_bytes < 0 or found.fragmentation < 0:
        raise InputError("--assume: gpus_per_node must be at least 1, reserved_bytes and fragmentation at least 0")
    return found
