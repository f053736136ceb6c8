"""The vLLM backend with the published vLLM, on the CPU: every family, every layout, weights loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm_published
from tiny_models import save_tiny
from vllm_calls import same_greedy

from prism_nemo.config import ParallelConfig
from prism_nemo.runtime.launch import launch

pytestmark = [pytest.mark.slow, vllm_published.needed]


@pytest.mark.parametrize(
    ("case", "parallel"),
    [
        ("llama", ParallelConfig(1, 1, 2)),
        ("llama-tied", ParallelConfig(1, 2)),
        ("mistral-window", ParallelConfig()),
        ("granite", ParallelConfig(2)),
        ("granite-4", ParallelConfig()),
        ("granite-hybrid-rope", ParallelConfig()),
        ("granite-hybrid-one-group", ParallelConfig(2)),
        ("nemotron-h", ParallelConfig()),
        ("nemotron-h-other-pattern", ParallelConfig(2)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.describe(),
)
def test_it_writes_what_the_native_engine_writes(case: str, parallel: ParallelConfig, tmp_path: Path) -> None:
    """Greedy, before and after all weights moved by 5 %; on every rank, replicas with prompts of their own."""
    folder = str(save_tiny(case, tmp_path / "hf", **vllm_published.wide(case)))
    calls = ([folder], parallel, str(tmp_path / "vllm"))
    by_rank = launch(vllm_published.native_and_vllm, *calls, processes=parallel.world_size)
    assert len(by_rank) == parallel.world_size
    for (pairs,) in by_rank:
        same_greedy(pairs)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """See `vllm_published.one_process`."""
    root = tmp_path_factory.mktemp("one")
    hf_dir = save_tiny("llama", root / "hf", head_dim=32, max_position_embeddings=512)
    return launch(vllm_published.one_process, str(hf_dir), str(root / "vllm"))


def test_the_generators_of_the_process_go_on(one: dict[str, Any]) -> None:
    assert one["random state kept"]


def test_nothing_is_written_with_random_weights(one: dict[str, Any]) -> None:
    assert one["before refit"].startswith("PrismError: vLLM's weights are random until the first refit")


def test_a_seed_gives_a_response_and_a_stop_token_ends_it(one: dict[str, Any]) -> None:
    responses = one["sampled"]
    assert responses[0][0] == responses[2][0]
    assert len({tuple(tokens) for tokens, _, _ in responses}) == len(responses) - 1
    for tokens, logprobs, finished in responses:
        assert len(tokens) == len(logprobs)
        assert finished == (tokens[-1] in (5, 6, 7))
        assert finished or len(tokens) == 60
        assert not set(tokens[:-1]) & {5, 6, 7}
    assert {finished for _, _, finished in responses} == {True, False}


def test_log_probabilities_are_those_of_temperature_1(one: dict[str, Any]) -> None:
    found, expected = one["hot"]
    assert found == pytest.approx(expected, abs=1e-4)
    likeliest, greedy = one["likeliest"]
    assert likeliest == greedy


def test_prompts_that_vllm_keeps_are_read_again_after_a_change(one: dict[str, Any]) -> None:
    """Of 401 tokens, some of which it keeps: read anew, read from what it kept, and after the weights changed."""
    for name in ("long", "long, after a change"):
        native, first, again = one[name]
        assert first[0][0] == again[0][0] == native[0][0]
        for read in (first, again):
            for (_, a, _), (_, b, _) in zip(native, read, strict=True):
                assert a == pytest.approx(b, abs=1e-4)
    assert one["long"][0][0][1] != pytest.approx(one["long, after a change"][0][0][1], abs=1e-2)
