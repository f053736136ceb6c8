"""The RL stage with the published vLLM as its sampler, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_published_stage as workers
from test_vllm_rollouts import run_config
from tiny_training import column, numbers, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig, PrecisionConfig
from prism_nemo.rl.parity import PARITY_LIMIT
from prism_nemo.runtime import DTYPES
from prism_nemo.runtime.launch import launch

pytestmark = [pytest.mark.slow, workers.vllm_published.needed]


@pytest.mark.parametrize(
    ("parallel", "dtype"),
    [(ParallelConfig(1, 1, 2), "fp32"), (ParallelConfig(2), "fp32"), (ParallelConfig(), "bf16")],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_the_sampler_follows_the_policy(
    parallel: ParallelConfig, dtype: str, policy: dict[str, str], tmp_path: Path
) -> None:
    """At every step, also after going on from a checkpoint, in another process with another copy of the weights.

    In fp32 the two differ by rounding, 1e-6, where one update moves a log-probability by 1e-1; in bf16 by 1e-2.
    """
    sizes = {"vocab_size": 101, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2}
    import_hf(write_llama(tmp_path / "hf", seed=3, std=0.1, **sizes), tmp_path / "wide", ParallelConfig())
    wide = {**policy, "init_from": str(tmp_path / "wide")}
    for steps in (2, 4):
        config = run_config(
            wide, tmp_path / "run", parallel=parallel, precision=PrecisionConfig(dtype=dtype), train_steps=steps
        )
        launch(workers.train, config, processes=parallel.world_size)
    run = tmp_path / "run"
    assert [line["step"] for line in numbers(run)] == [1, 2, 3, 4]
    assert max(column(run, "logprob_gap")) < (1e-4 if dtype == "fp32" else PARITY_LIMIT[DTYPES[dtype]])
    assert len(set(column(run, "reward"))) > 1
