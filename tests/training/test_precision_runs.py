"""Whole stages in bf16 and with emulated FP8: they learn, they resume bit for bit, and what stays in bf16 is bf16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CASES
from tiny_training import LAYOUTS, STEPS, column, midtrain_config, numbers
from training_workers import midtrain_interrupted
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prism_nemo.config import MidtrainConfig, PrecisionConfig, RLConfig
from prism_nemo.errors import InputError, StoppedEarly
from prism_nemo.rl.train import check as check_rl
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import check, midtrain

BF16 = PrecisionConfig(dtype="bf16")


def run(config: MidtrainConfig) -> list[float]:
    launch(midtrain, config, processes=config.parallel.world_size)
    return column(config.run_dir, "loss")


@pytest.fixture(scope="module")
def bf16(data: Path, initial: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return run(midtrain_config(tmp_path_factory.mktemp("bf16") / "run", data, initial, precision=BF16))


def test_bf16_follows_fp32(bf16: list[float], run_of: Callable[..., Path]) -> None:
    """bf16 rounds each value by up to 2^-9, relatively; errors of different tokens average out in the loss, so the loss
    is closer than 2^-8 of its value. Without fp32 masters and gradients the runs part within a few steps."""
    fp32 = column(run_of("TP1"), "loss")
    assert len(bf16) == len(fp32) == STEPS
    assert bf16 != fp32
    assert all(abs(a - b) < 2.0**-8 * b for a, b in zip(bf16, fp32, strict=True))
    assert bf16[-1] < bf16[0] / 2


def hybrid() -> dict[str, Any]:
    cls, values = CASES["granite-hybrid"]
    changed = {**values, "max_position_embeddings": 64}
    return {**cls(**changed).to_dict(), "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[cls].__name__]}


@pytest.mark.parametrize("kind", [pytest.param("bf16 DP2", marks=pytest.mark.slow), "hybrid bf16 DP2", "delayed TP2"])
def test_stopped_runs_continue_bit_for_bit(kind: str, data: Path, initial: Path, tmp_path: Path) -> None:
    """With the distributed optimizer over two ranks; a hybrid, whose mixers have parameters that Megatron's optimizer
    would mix up if some stayed fp32; and delayed scales, which come from passes before the stop."""
    precision = BF16
    changes: dict[str, Any] = {"train_steps": 5, "parallel": LAYOUTS[kind.split()[-1]]}
    if kind.startswith("hybrid"):
        changes["model"] = hybrid()
    if kind.startswith("delayed"):
        precision = PrecisionConfig(
            dtype="bf16", fp8="emulate", fp8_recipe="delayed", fp8_amax_history_len=3, fp8_amax_compute_algo="max"
        )
    start = None if "model" in changes else initial
    whole, parts = (midtrain_config(tmp_path / n, data, start, precision=precision, **changes) for n in ("a", "b"))
    run(whole)
    with pytest.raises(StoppedEarly, match="stopped at step 3 "):
        launch(midtrain_interrupted, parts, 3, "stop", processes=2)
    run(parts)
    assert numbers(parts.run_dir) == numbers(whole.run_dir)


def test_layers_that_stay_in_bf16_are_untouched(bf16: list[float], data: Path, initial: Path, tmp_path: Path) -> None:
    """All four layers asked to stay: the run is the bf16 run, bit for bit. Two of four: it is not."""

    def losses(name: str, at_start: int, at_end: int) -> list[float]:
        precision = PrecisionConfig(
            dtype="bf16", fp8="emulate", fp8_recipe="mxfp8", first_last_layers_bf16=True,
            num_layers_at_start_in_bf16=at_start, num_layers_at_end_in_bf16=at_end,
        )  # fmt: skip
        return run(midtrain_config(tmp_path / name, data, initial, precision=precision, train_steps=3))

    assert losses("all", 2, 2)[:2] == bf16[:2]
    some = losses("some", 1, 1)
    assert some[0] != bf16[0]
    assert abs(some[0] - bf16[0]) < 0.05 * bf16[0]


def test_stages_check_it_before_they_start(data: Path, initial: Path, tmp_path: Path) -> None:
    """Megatron-Core itself would train without FP8 where Transformer Engine is missing."""
    on = PrecisionConfig(fp8="on", dtype="fp32")
    with pytest.raises(InputError, match="on goes with dtype bf16"):
        check(midtrain_config(tmp_path / "run", data, initial, precision=on))
    for precision, message in ((on, "on goes with"), (PrecisionConfig(fp8="emulate"), "not available for RL")):
        with pytest.raises(InputError, match=message):
            check_rl(RLConfig("run", str(initial), "tokenizer", ["arithmetic"], precision=precision))
