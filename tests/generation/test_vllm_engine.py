"""The vLLM backend, with a stand-in for vLLM that computes with transformers: another implementation of every layer."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vllm_workers as workers
from tiny_models import save_tiny
from vllm_calls import same_greedy

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.generation import vllm as module
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.runtime.launch import launch

CASES = ("llama-tied", "granite-hybrid-one-group")


@pytest.fixture(scope="module")
def hf_dirs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A dense and a hybrid model."""
    root = tmp_path_factory.mktemp("models")
    return [str(save_tiny(case, root / case)) for case in CASES]


@pytest.mark.parametrize("parallel", [ParallelConfig(2, 1), ParallelConfig(1, 2)], ids=lambda value: value.describe())
def test_it_writes_what_the_native_engine_writes(parallel: ParallelConfig, hf_dirs: list[str], tmp_path: Path) -> None:
    """Greedy, before and after all weights moved by 5 %; on every rank."""
    everyone = launch(workers.native_and_vllm, hf_dirs, parallel, str(tmp_path / "vllm"), processes=2)
    assert everyone[0] == everyone[1]
    for pairs in everyone[0]:
        same_greedy(pairs)


@pytest.fixture(scope="module")
def one(hf_dirs: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """See `vllm_workers.one_process`."""
    return launch(workers.one_process, *hf_dirs, str(tmp_path_factory.mktemp("one") / "vllm"))


def test_how_vllm_is_started(one: dict[str, Any]) -> None:
    options = one["options"]
    assert (options["dtype"], options["max_model_len"], options["gpu_memory_utilization"]) == ("float32", 64, 0.25)
    assert (options["tensor_parallel_size"], options["generation_config"]) == (1, "vllm")
    assert options["logprobs_mode"] == "raw_logprobs"
    assert options["mamba_ssm_cache_dtype"] == "auto"
    assert one["hybrid options"]["mamba_ssm_cache_dtype"] == "float32"
    assert one["config"]["architectures"] == ["LlamaForCausalLM"]
    assert one["config"]["dtype"] == "float32"
    assert one["random state kept"]


def test_requests_are_passed_on(one: dict[str, Any]) -> None:
    first, second, again, large = one["asked"]
    assert first.stop_token_ids == [5, 6, 7]
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k, first.logprobs) == (20, 1.0, 1.0, -1, 0)
    assert first.ignore_eos
    assert not first.detokenize
    assert (first.seed, second.seed, again.seed) == (11, 12, 11)
    assert 0 <= large.seed < 2**63
    tokens = [tokens for tokens, _, _ in one["sampled"]]
    assert tokens[0] == tokens[2]
    assert tokens[0] != tokens[1]
    (hot,) = one["asked hot"]
    assert (hot.temperature, hot.top_p, hot.top_k, hot.seed) == (0.5, 0.9, 9, 4)
    assert one["nothing"] == []


def test_a_response_is_finished_when_its_last_token_stops_it(one: dict[str, Any]) -> None:
    for tokens, logprobs, finished in one["sampled"]:
        assert len(tokens) == len(logprobs)
        assert finished == (tokens[-1] in (5, 6, 7))
        assert finished or len(tokens) == 20
        assert not set(tokens[:-1]) & {5, 6, 7}


def test_log_probabilities_are_those_of_temperature_1(one: dict[str, Any]) -> None:
    found, expected = one["hot"]
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("before refit", "PrismError: vLLM's weights are random until the first refit"),
        ("stop texts", "InputError: request 0: stop_texts"),
        ("too long", "InputError: a prompt of 60 tokens and max_new_tokens 5 do not fit the model's 64"),
        ("no prompt", "InputError: request 0: an empty prompt"),
        ("vocabulary", "InputError: request 0: a token outside the model's vocabulary of 149"),
    ],
)
def test_what_it_refuses(case: str, message: str, one: dict[str, Any]) -> None:
    assert one[case].startswith(message)


def test_a_refit_or_a_response_that_is_not_what_it_should_be_is_an_error(hf_dirs: list[str], tmp_path: Path) -> None:
    found = launch(workers.faulty, hf_dirs[0], str(tmp_path / "vllm"))
    stale = "PrismError: vLLM's weights are stale: the trainer's changed and vLLM's did not, in"
    for fault, message in {
        "none": "no error",
        "stale": f"{stale} embedding, final norm and output layer, layer 0, layer 1, layer 2;",
        "one stale layer": f"{stale} layer 1;",
        "skips a tensor": "PrismError: vLLM did not take the trainer's weights: 'model.norm.weight' and 0 more",
        "stops early": "PrismError: vLLM did not take the trainer's weights: ",
        "keeps its cache": "PrismError: vLLM kept its cache of prompts",
        "out of order": "PrismError: vLLM answered request 0 out of order",
        "no log-probabilities": "PrismError: vLLM's response to request 0 has 3 tokens, 0 log-probabilities",
        "not finite": "PrismError: request 0: vLLM's log-probabilities are not finite",
    }.items():
        assert found.pop(fault).startswith(message), fault
    assert not found


def test_ranks_that_sample_different_tokens_are_stopped(hf_dirs: list[str], tmp_path: Path) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    messages = launch(workers.ranks_part, hf_dirs[0], parallel, str(tmp_path / "vllm"), processes=2)
    assert all(message.startswith("PrismError: vLLM's ranks sampled different tokens") for message in messages)


@pytest.fixture
def architecture(hf_dirs: list[str], monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """Of the dense model (4 heads, 2 key/value heads), on a machine with vLLM and a GPU."""
    monkeypatch.setattr(module, "is_present", lambda package: True)
    monkeypatch.setattr(module, "capability", lambda: (9, 0))
    return read_hf_config(Path(hf_dirs[0]))


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(1, 1, 3),
        ParallelConfig(2, 1, 3),
        ParallelConfig(1, 2),
        ParallelConfig(2, 2),
        ParallelConfig(1, 4),
    ],
    ids=lambda value: value.describe(),
)
def test_layouts_that_vllm_can_follow(parallel: ParallelConfig, architecture: Architecture) -> None:
    module.check_vllm(architecture, parallel, 0.3)


def test_layouts_that_vllm_cannot_follow(architecture: Architecture, hf_dirs: list[str]) -> None:
    with pytest.raises(InputError, match=r"TP1 PP2 DP2: .*use parallel\.pipeline_model_parallel_size=1"):
        module.check_vllm(architecture, ParallelConfig(1, 2, 2), 0.3)
    with pytest.raises(InputError, match=r"into 8 parts .*these do: \[1, 2, 4\]"):
        module.check_vllm(architecture, ParallelConfig(2, 4), 0.3)
    hybrid = read_hf_config(Path(hf_dirs[1]))
    module.check_vllm(hybrid, ParallelConfig(2, 2), 0.3)
    mamba = hybrid.mamba
    assert mamba is not None
    with pytest.raises(InputError, match=r"into 4 parts .*these do: \[1, 2\]"):
        module.check_vllm(replace(hybrid, mamba=replace(mamba, groups=2)), ParallelConfig(2, 2), 0.3)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_memory_shares_that_mean_nothing(share: float, architecture: Architecture) -> None:
    with pytest.raises(InputError, match=r"rollout\.vllm_memory_share"):
        module.check_vllm(architecture, ParallelConfig(), share)


def test_without_the_package_or_a_gpu(architecture: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "capability", lambda: None)
    with pytest.raises(InputError, match=r"vllm needs a CUDA device .*rollout\.backend=native"):
        module.check_vllm(architecture, ParallelConfig(), 0.3)
    monkeypatch.undo()
    stand_in = str(Path(__file__).parents[1] / "stand_in")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != stand_in])
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(InputError, match=r"vllm is not installed; pip install 'prism-nemo\[vllm\]'"):
        module.check_vllm(architecture, ParallelConfig(), 0.3)
