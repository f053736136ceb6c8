"""Errors that people read, and the exit code that each one means.

The exit codes are part of the command contract: 0 done, 1 the work failed, 2 the input or the configuration is wrong
and nothing was started, 75 stopped early with a checkpoint saved (run the same command again).
"""

from __future__ import annotations


class PrismError(Exception):
    """The work failed. The message says what, where, and what to do about it."""

    exit_code = 1


class InputError(PrismError):
    """The input or the configuration is wrong; raised before any work starts. The message names the file or key."""

    exit_code = 2


class StoppedEarly(PrismError):
    """Stopped on request (signal, time limit) after saving a checkpoint; the same command continues."""

    exit_code = 75
