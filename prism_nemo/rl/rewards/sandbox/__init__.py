"""Runs untrusted Python programs with hard limits: `Sandbox.run` is the door, the other files are its walls."""

from prism_nemo.rl.rewards.sandbox.limits import MODES, Execution, SandboxLimits
from prism_nemo.rl.rewards.sandbox.sandbox import Sandbox

__all__ = ["MODES", "Execution", "Sandbox", "SandboxLimits"]
