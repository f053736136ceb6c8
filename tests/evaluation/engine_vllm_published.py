"""What the slow tests of the vLLM engine run in processes of their own, with the published vLLM."""

from __future__ import annotations

from typing import Any

import engine_vllm_calls
import vllm_published


def both(*args: Any) -> tuple[Any, Any, int]:
    """What vLLM and our engine answer; vLLM's longest length."""
    vllm_published.use()
    return engine_vllm_calls.both(*args)
