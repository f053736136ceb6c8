"""What this machine offers, which kernel each part will use here, and what is missing; shown by `prism-nemo doctor`."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import psutil
import torch

from prism_nemo.errors import InputError
from prism_nemo.precision.check import recipes_of
from prism_nemo.rl.rewards.sandbox import MODES, Sandbox
from prism_nemo.runtime.detect import (
    APEX,
    CAUSAL_CONV1D,
    MAMBA_SSM,
    TRANSFORMER_ENGINE,
    VLLM,
    Finding,
    Package,
    look,
    version_of,
)

MEGATRON = Package("Megatron-Core", "megatron.core.tensor_parallel", "ColumnParallelLinear", "megatron-core")
FLASH_ATTN = Package("flash-attn", "flash_attn", "flash_attn_func", "flash-attn")

# Package -> what it is used for, and how to get it.
_PACKAGES: dict[Package, tuple[str, str]] = {
    MEGATRON: ("the engine", "pip install prism-nemo (it is required)"),
    TRANSFORMER_ENGINE: ("layers, FP8, optimizer on GPUs", "pip install 'prism-nemo[gpu]' (CUDA machines only)"),
    APEX: (
        "optimizer, if the former is missing",
        "build it from github.com/NVIDIA/apex, or take NVIDIA's PyTorch container; never `pip install apex`",
    ),
    MAMBA_SSM: ("recurrence of hybrids on GPUs", "pip install --no-build-isolation mamba-ssm"),
    CAUSAL_CONV1D: ("convolution of hybrids on GPUs", "pip install --no-build-isolation causal-conv1d"),
    FLASH_ATTN: ("Transformer Engine's attention", "pip install --no-build-isolation flash-attn"),
    VLLM: ("rollouts on GPUs, if rollout.backend=vllm", "pip install 'prism-nemo[vllm]'"),
    Package("NeMo-Run", "nemo_run", "SlurmExecutor", "nemo-run"): ("launching", "pip install 'prism-nemo[nemo]'"),
    Package("TensorBoard", "tensorboard", "summary", "tensorboard"): ("monitoring", "pip install tensorboard"),
    Package("Weights & Biases", "wandb", "init", "wandb"): ("monitoring", "pip install wandb"),
    Package("MLflow", "mlflow", "log_metrics", "mlflow"): ("monitoring", "pip install mlflow"),
}
_NEEDS_GPU = (TRANSFORMER_ENGINE, APEX, MAMBA_SSM, CAUSAL_CONV1D, FLASH_ATTN)

# Command -> name, how it tells its version, what it is used for, how to get it.
_TOOLS: dict[str, tuple[str, list[str], str, str]] = {
    "sbatch": ("Slurm", ["--version"], "jobs on a cluster", "run on a login node of the cluster"),
    "bwrap": ("bubblewrap", ["--version"], "the sandbox of code rewards", "apt-get install bubblewrap"),
}


@dataclass(frozen=True)
class Item:
    """Something that was looked for.

    Attributes:
        name: What people call it.
        status: ``found``, ``missing``, ``wrong`` (another project of that name) or ``broken``.
        version: If it has one.
        decided_by: The symbol or command that decided.
        use: What it is used for.
        problem: Why it cannot be used.
        install: How to get it.
        wanted: Whether this machine would use it.
    """

    name: str
    status: str
    version: str | None
    decided_by: str
    use: str
    problem: str | None
    install: str
    wanted: bool


@dataclass(frozen=True)
class Kernel:
    """What computes one part of training on this machine, and what decided it."""

    part: str
    kernel: str
    because: str


@dataclass(frozen=True)
class Device:
    """A CUDA device; memory in GiB; recipes that its matrix units have."""

    name: str
    memory_gib: float
    capability: str
    fp8_recipes: list[str]


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    machine: dict[str, str]
    devices: list[Device]
    items: list[Item]
    kernels: list[Kernel]
    fp8: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with the names of what is missing or unusable here."""
        return {**asdict(self), "missing": [item.name for item in self.missing]}

    @property
    def missing(self) -> list[Item]:
        """What this machine would use and has not, and what is installed and cannot be used."""
        return [i for i in self.items if i.status in ("wrong", "broken") or (i.status == "missing" and i.wanted)]


def diagnose() -> Diagnosis:
    """Look at everything; packages are imported in child processes only."""
    cuda = torch.cuda.is_available()
    with ThreadPoolExecutor(2) as pool:
        findings = list(pool.map(look, _PACKAGES))
    usable = {finding.package.name for finding in findings if finding.usable} if cuda else set()
    items = [_item(finding, cuda) for finding in findings]
    return Diagnosis(
        _machine(),
        [_device(index) for index in range(torch.cuda.device_count())] if cuda else [],
        [*items, *(_tool(command) for command in _TOOLS)],
        [*kernels(cuda, usable), _sandbox()],
        _fp8(cuda, usable),
    )


def kernels(cuda: bool, usable: set[str]) -> list[Kernel]:
    """Which kernel computes each part.

    Args:
        cuda: Whether there is a CUDA device.
        usable: Names of the packages whose symbols were found.
    """
    te, apex = "Transformer Engine" in usable, "Apex" in usable
    device = "there is no CUDA device" if not cuda else "CUDA device"

    def pick(package: str, yes: str, no: str) -> tuple[str, str]:
        if package in usable:
            return yes, f"{package} was found"
        return no, f"{package} was not found" if cuda else device

    rows: list[tuple[str, str, str]] = [
        ("attention", *pick("Transformer Engine", "Transformer Engine's fused attention", "torch SDPA")),
        ("attention of hybrids", "torch SDPA", "they have layers of their own"),
        (
            "norm",
            *pick("Transformer Engine", "Transformer Engine's RMSNorm, fused", "torch RMSNorm"),
        ),
        ("linear", *pick("Transformer Engine", "Transformer Engine's", "Megatron-Core's, on torch.matmul")),
        ("linear of hybrids", "Megatron-Core's, on torch.matmul", "they have layers of their own"),
        ("SSD scan", *pick("mamba_ssm", "mamba_ssm's Triton kernel", "torch, chunk by chunk")),
        ("convolution", *pick("causal_conv1d", "causal_conv1d's kernel", "torch")),
        ("cross entropy", "prism-nemo's (fp32), Megatron-Core's (bf16)", "neither needs a package"),
    ]
    if te or not apex:
        optimizer = pick("Transformer Engine", "Transformer Engine's FusedAdam", "torch's fused AdamW")
        clipping = pick("Transformer Engine", "Transformer Engine's multi-tensor kernels", "torch, tensor by tensor")
    else:
        optimizer = ("Apex's FusedAdam", "Apex was found, Transformer Engine was not")
        clipping = ("Apex's multi-tensor kernels", optimizer[1])
    rows += [("optimizer", *optimizer), ("gradient clipping", *clipping)]
    return [Kernel(*row) for row in rows]


def _sandbox() -> Kernel:
    """Which sandbox code rewards would have, decided by running a program in it."""
    problems = []
    for mode in MODES:
        try:
            with Sandbox(mode=mode, ready=0, warn=False) as sandbox:
                sandbox.check()
        except InputError as error:
            problems.append(str(error))
            continue
        name = mode if mode == MODES[0] else f"{mode}, which is weaker and must be chosen: rewards.sandbox={mode}"
        return Kernel("sandbox of code rewards", name, "; ".join(problems) or "a program ran in it")
    return Kernel("sandbox of code rewards", "none: code rewards are refused", "; ".join(problems))


def _machine() -> dict[str, str]:
    memory = psutil.virtual_memory().total / 2**30
    return {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'built without CUDA'}",
        "transformers": version_of("transformers") or "missing",
        "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {memory:.1f} GiB of memory",
    }


def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    found = (properties.major, properties.minor)
    memory = round(properties.total_memory / 2**30, 1)
    return Device(properties.name, memory, f"{found[0]}.{found[1]}", recipes_of(found))


def _item(finding: Finding, cuda: bool) -> Item:
    package = finding.package
    use, install = _PACKAGES[package]
    problem = finding.problem
    if package is TRANSFORMER_ENGINE and finding.status == "broken" and "empty" in (problem or ""):
        install = (
            f"pip uninstall transformer-engine (Megatron-Core cannot be imported beside it); on GPUs then {install}"
        )
    elif package is MEGATRON and "transformer-engine" in (problem or ""):
        install = "see Transformer Engine, which keeps it from being imported"
    elif package is APEX and finding.status == "wrong":
        problem = f"another project of that name ({problem})"
        install = f"pip uninstall apex (Megatron-Core takes it for NVIDIA's); if wanted, {install}"
    wanted = cuda or package not in _NEEDS_GPU
    if package in (FLASH_ATTN, VLLM) or use == "monitoring":
        wanted = False
    return Item(package.name, finding.status, finding.version, package.deciding, use, problem, install, wanted)


def _tool(command: str) -> Item:
    name, arguments, use, install = _TOOLS[command]
    path = shutil.which(command)
    status, version, problem = "missing", None, None
    if path is not None:
        try:
            told = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20)
            status, version = "found", (told.stdout or told.stderr).strip().rpartition(" ")[2] or None
            if told.returncode != 0:
                status, problem = "broken", f"{command} {' '.join(arguments)} ended with {told.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            status, problem = "broken", str(error)
    return Item(name, status, version, command, use, problem, install, wanted=True)


def _fp8(cuda: bool, usable: set[str]) -> str:
    emulated = "precision.fp8=emulate: all four recipes, on any device, to measure their effect"
    if not cuda or "Transformer Engine" not in usable:
        reason = "Transformer Engine was not found" if cuda else "there is no CUDA device"
        return f"precision.fp8=on is refused: {reason}. {emulated}."
    names = recipes_of(torch.cuda.get_device_capability())
    return f"precision.fp8=on: {', '.join(names) or 'no recipe on this GPU'} (not for hybrids). {emulated}."
