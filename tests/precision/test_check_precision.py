"""What is refused before anything starts, and what Megatron is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from precision_workers import MODEL_FOR_CAUSAL_LM_MAPPING
from tiny_models import CASES

from prism_nemo.config import (
    MidtrainConfig,
    ParallelConfig,
    PrecisionConfig,
    RecomputeConfig,
    load_yaml,
    resolve,
    to_yaml,
)
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, architecture_from_hf
from prism_nemo.precision.check import check_precision, megatron_fields, recipes_of
from prism_nemo.runtime import cuda


def architecture(case: str = "llama", **changes: Any) -> Architecture:
    cls, values = CASES[case]
    config = {**cls(**{**values, **changes}).to_dict(), "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[cls].__name__]}
    return architecture_from_hf(config, "test")


def check(
    case: str = "llama", distributed: bool = True, recompute: RecomputeConfig | None = None, **settings: Any
) -> None:
    sizes = {"head_dim": 16} if case == "llama" else {}
    recompute = recompute or RecomputeConfig()
    check_precision(PrecisionConfig(**settings), architecture(case, **sizes), ParallelConfig(), distributed, recompute)


def gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], engine: bool = True) -> None:
    monkeypatch.setattr(cuda, "capability", lambda: capability)
    monkeypatch.setattr(cuda, "has_transformer_engine", lambda: engine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8_recipe": "blokwise"}, "'blokwise' is unknown; did you mean 'blockwise'"),
        ({"fp8_recipe": "nonsense"}, "choose one of delayed, tensorwise, blockwise, mxfp8"),
        ({"fp8": "emulated"}, "did you mean 'emulate'"),
        ({"dtype": "fp16"}, "precision.dtype: 'fp16' is unknown"),
        ({"fp8_format": "e5m2"}, "precision.fp8_format: 'e5m2' is unknown"),
        ({"fp8_amax_compute_algo": "mean"}, "choose one of most_recent, max"),
        ({"fp8_amax_history_len": 0}, "must be at least 1"),
        ({"fp8": "on"}, "on needs Transformer Engine, and there is no CUDA device"),
        ({"fp8_param_gather": True}, "needs precision.fp8=on, not off"),
        ({"fp8": "emulate", "fp8_param_gather": True}, "needs precision.fp8=on, not emulate"),
        ({"fp8": "on", "dtype": "fp32"}, "goes with dtype bf16"),
        ({"fp8": "on", "fp8_param_gather": True, "distributed": False}, "needs use_distributed_optimizer"),
        ({"fp8": "on", "case": "granite-hybrid"}, "not available for hybrids"),
        ({"fp8": "emulate", "first_last_layers_bf16": True}, "the delayed recipe cannot leave layers out"),
        (
            {"fp8": "emulate", "fp8_recipe": "mxfp8", "first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 5},
            "num_layers_at_end_in_bf16: 5 is not between 0 and 4",
        ),
        ({"fp8_recipe": "blockwise"}, "fp8_recipe: blockwise has no effect with precision.fp8=off"),
        ({"fp8_format": "e4m3"}, "fp8_format: e4m3 has no effect with precision.fp8=off"),
        ({"first_last_layers_bf16": True}, "first_last_layers_bf16: True has no effect with precision.fp8=off"),
        ({"fp8_margin": 2}, "fp8_margin: 2 has no effect with precision.fp8=off"),
        ({"fp8_amax_history_len": 16}, "fp8_amax_history_len: 16 has no effect with precision.fp8=off"),
        ({"fp8_amax_compute_algo": "max"}, "fp8_amax_compute_algo: max has no effect with precision.fp8=off"),
        (
            {"fp8": "emulate", "fp8_recipe": "mxfp8", "fp8_margin": 1},
            "fp8_margin: 1 has no effect with precision.fp8_recipe=mxfp8; change that, or leave this at 0",
        ),
        (
            {"fp8": "emulate", "fp8_recipe": "tensorwise", "fp8_amax_history_len": 9},
            "fp8_amax_history_len: 9 has no effect with precision.fp8_recipe=tensorwise",
        ),
        (
            {"fp8": "emulate", "num_layers_at_start_in_bf16": 2},
            "num_layers_at_start_in_bf16: 2 has no effect without precision.first_last_layers_bf16",
        ),
    ],
)
def test_refused(settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "capability", lambda: None)
    monkeypatch.setattr(cuda, "has_transformer_engine", lambda: False)
    with pytest.raises(InputError, match=message) as refused:
        check(**settings)
    assert refused.value.exit_code == 2


def test_settings_with_an_effect_pass() -> None:
    check()
    check(fp8="emulate", fp8_margin=1, fp8_amax_history_len=4, fp8_amax_compute_algo="max", fp8_format="e4m3")
    check(fp8="emulate", fp8_recipe="mxfp8", first_last_layers_bf16=True, num_layers_at_start_in_bf16=2)


def test_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, (9, 0), engine=False)
    with pytest.raises(InputError, match="its layers cannot be imported"):
        check(fp8="on")
    gpu(monkeypatch, (9, 0))
    for recipe in ("delayed", "tensorwise", "blockwise"):
        check(fp8="on", fp8_recipe=recipe)
    with pytest.raises(
        InputError, match=r"needs a Blackwell GPU .*capability 9\.0, which has delayed and tensorwise and"
    ):
        check(fp8="on", fp8_recipe="mxfp8")
    gpu(monkeypatch, (8, 0))
    with pytest.raises(InputError, match="which has no FP8"):
        check(fp8="on")
    gpu(monkeypatch, (10, 0))
    with pytest.raises(InputError, match="with mxfp8 Megatron-Core gathers"):
        check(fp8="on", fp8_recipe="mxfp8", fp8_param_gather=True)
    with pytest.raises(InputError, match="is not a multiple of 32"):
        check(fp8="on", fp8_recipe="mxfp8")
    assert recipes_of((8, 9)) == ["delayed", "tensorwise"]
    assert recipes_of((7, 5)) == []


def test_delayed_scales_and_recomputation() -> None:
    """Only where linear layers are recomputed, and only with scales that move."""
    linears = RecomputeConfig("full"), RecomputeConfig("selective", modules=["core_attn", "mlp"])
    for recompute in linears:
        with pytest.raises(InputError, match="delayed scales move"):
            check(fp8="emulate", recompute=recompute)
        check(fp8="emulate", fp8_recipe="mxfp8", recompute=recompute)
        check(recompute=recompute)
    check(fp8="emulate", recompute=RecomputeConfig("selective"))


def test_emulation_needs_nothing() -> None:
    for case in ("llama", "granite-hybrid", "nemotron-h"):
        for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
            check(case, fp8="emulate", fp8_recipe=recipe)


def test_what_megatron_is_told() -> None:
    """All of it with Transformer Engine; nothing of FP8 under emulation, which would come on top of it."""
    settings: dict[str, Any] = {
        "fp8_recipe": "blockwise", "fp8_format": "e4m3", "fp8_param_gather": True, "fp8_margin": 1,
        "fp8_amax_history_len": 7, "fp8_amax_compute_algo": "max", "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 3,
    }  # fmt: skip
    told = megatron_fields(PrecisionConfig(fp8="on", **settings))
    assert told["fp8"] == "e4m3"
    assert told["fp8_param"] is True
    for name in settings.keys() - {"fp8_format", "fp8_param_gather"}:
        assert told[name] == settings[name]
    for off in ("off", "emulate"):
        assert not any(name.startswith("fp8") for name in megatron_fields(PrecisionConfig(fp8=off, **settings)))


@pytest.mark.parametrize(("text", "value"), [("on", "on"), ("off", "off"), ("emulate", "emulate")])
def test_on_and_off_are_words_not_booleans(text: str, value: str, tmp_path: Path) -> None:
    """YAML reads a bare on as true; through an override, a file and a written config it is what was meant."""
    config = resolve(MidtrainConfig, {"run_dir": "x", "data": {"path": "y"}}, [f"precision.fp8={text}"])
    assert config.precision.fp8 == value
    file = tmp_path / "config.yaml"
    for content in (to_yaml(config), f"run_dir: x\ndata: {{path: y}}\nprecision:\n  fp8: {text}\n"):
        file.write_text(content)
        assert resolve(MidtrainConfig, load_yaml(file, MidtrainConfig)).precision == config.precision
