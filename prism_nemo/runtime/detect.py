"""What is installed, decided by the symbol that is needed and never by a package's name.

A name proves nothing here: PyPI's ``apex`` is another project, and any module of that name makes Megatron-Core believe
in fused kernels; the bare ``transformer-engine`` package holds nothing, and importing it raises RuntimeError, which
Megatron's ``except ImportError`` does not catch. So the symbol is imported, and whatever that raises is an answer.

`look` imports in a child process: a compiled extension for another torch may end the process that loads it, and a half
imported package must not stay in this one. `load` imports here, for those who are about to use the symbol.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

_SECONDS = 180

_PROBE = """
import importlib, json, sys
module, name = sys.argv[1:]
try:
    found = importlib.import_module(module)
    problem = None if hasattr(found, name) else f"{module} has no {name}"
except BaseException as error:
    problem = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(problem))
"""


@dataclass(frozen=True)
class Package:
    """An optional package and the symbol that decides whether it is the one meant.

    Attributes:
        name: What people call it.
        module: Module that holds the symbol.
        symbol: What is used of it.
        distribution: Whose version to report.
    """

    name: str
    module: str
    symbol: str
    distribution: str

    @property
    def deciding(self) -> str:
        """The symbol's full name."""
        return f"{self.module}.{self.symbol}"


TRANSFORMER_ENGINE = Package("Transformer Engine", "transformer_engine.pytorch", "Linear", "transformer-engine")
APEX = Package("Apex", "apex.optimizers", "FusedAdam", "apex")
MAMBA_SSM = Package("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined", "mamba-ssm")
CAUSAL_CONV1D = Package("causal_conv1d", "causal_conv1d", "causal_conv1d_fn", "causal-conv1d")
VLLM = Package("vLLM", "vllm", "LLM", "vllm")


@dataclass(frozen=True)
class Finding:
    """What became of looking for a package.

    Attributes:
        package: What was looked for.
        status: ``found``; ``missing``: nothing of that name; ``wrong``: something of that name without the symbol;
            ``broken``: importing it failed otherwise.
        version: Of the distribution, if there is one.
        problem: Why it cannot be used.
    """

    package: Package
    status: str
    version: str | None = None
    problem: str | None = None

    @property
    def usable(self) -> bool:
        """Whether the symbol can be imported."""
        return self.status == "found"


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_present(package: Package) -> bool:
    """Whether there is any module of the top name; imports nothing."""
    top = package.module.partition(".")[0]
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):  # ValueError: already in sys.modules, without a spec
        return False


def look(package: Package) -> Finding:
    """Find out whether the symbol can be imported, in a child process; nothing is imported into this one."""
    version = version_of(package.distribution)
    if not is_present(package):
        return Finding(package, "missing", version)
    command = [sys.executable, "-c", _PROBE, package.module, package.symbol]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=_child_environment())
    except subprocess.TimeoutExpired:
        return Finding(package, "broken", version, f"importing it took more than {_SECONDS} s")
    if child.returncode != 0:
        return Finding(package, "broken", version, f"importing it ended the process (exit {child.returncode})")
    problem = json.loads(child.stdout.splitlines()[-1])
    if problem is None:
        return Finding(package, "found", version)
    return Finding(package, _status(package, problem), version, " ".join(problem.split())[:200])


def _status(package: Package, problem: str) -> str:
    """A module or symbol that is not there: another project of that name. Anything else: the right one, not working."""
    top = package.module.partition(".")[0]
    absent = f"No module named '{top}" in problem and problem.startswith("ModuleNotFoundError")
    return "wrong" if absent or " has no " in problem or "cannot import name" in problem else "broken"


def _child_environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def load(package: Package) -> Any | None:
    """The symbol, or None where it cannot be imported, for whatever reason."""
    if not is_present(package):
        return None
    try:
        return getattr(importlib.import_module(package.module), package.symbol)
    except Exception:  # the empty transformer-engine raises RuntimeError, a missing library OSError
        return None
