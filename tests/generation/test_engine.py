"""Continuous batching changes when a token is computed, never which one.

The reference is always a full forward of the training model, or the same request served alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_workers import (
    against_forward,
    around_an_update,
    capacity_of,
    gaps_with_mistake,
    in_layout,
    overflowing,
    refusals,
    requests_of,
    rounding_of_bf16,
    stop_text,
    twice,
    with_and_without_kernels,
    with_little_memory,
    write,
)
from generation_workers import in_one_process
from tiny_models import save_tiny

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.generation import parity
from prism_nemo.generation.choose import choose, largest
from prism_nemo.generation.requests import Request, SamplingParams, Uniforms, request_seed
from prism_nemo.generation.rows import Prompt, Sequence, rearranged
from prism_nemo.runtime.launch import launch

FAMILIES = ("llama", "mistral-window", "granite", "granite-hybrid", "granite-hybrid-one-group", "nemotron-h")
PROMPTS = [[(7 * i + 3 * j) % 97 + 4 for j in range(n)] for i, n in enumerate((5, 1, 17, 9, 2, 17, 16, 12))]
# Few slots: every row of the cache is used again and again, by longer and shorter responses.
OPTIONS: list[dict[str, Any]] = [{"slots": 256}, {"slots": 5}, {"slots": 11, "prefill_tokens": 20}]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    return {case: str(save_tiny(case, root / case)) for case in FAMILIES}


@pytest.fixture(scope="session")
def alone(families: dict[str, str]) -> dict[str, Any]:
    """By family, for each of OPTIONS the responses in one process with the log-probabilities of a full forward."""
    return dict(zip(families, launch(against_forward, list(families.values()), PROMPTS, OPTIONS), strict=True))


@pytest.mark.parametrize("case", FAMILIES)
def test_a_row_used_again_knows_nothing_of_the_response_before(case: str, alone: dict[str, Any]) -> None:
    """Log-probabilities of every token, sampled or not, are those of a full forward over its own prompt and response.

    fp32 rounding through four layers is 1e-6 of the logits, which here reach 30; a stale key or state shows at 1e-1.
    """
    for written, scores in alone[case]:
        for (tokens, logprobs, _), (wanted, greedy) in zip(written, scores, strict=True):
            assert greedy
            assert len(tokens) == len(logprobs)
            assert logprobs == pytest.approx(wanted, abs=5e-5)


@pytest.mark.parametrize("case", FAMILIES)
def test_tokens_do_not_depend_on_slots_or_neighbours(case: str, alone: dict[str, Any]) -> None:
    first = [(tokens, finished) for tokens, _, finished in alone[case][0][0]]
    for written, _ in alone[case][1:]:
        assert [(tokens, finished) for tokens, _, finished in written] == first
    assert len({len(tokens) for tokens, _ in first}) > 5
    assert any(finished for _, finished in first)
    assert any(len(tokens) == 1 for tokens, _ in first)


LAYOUTS = {
    "tp2": ParallelConfig(2),
    "tp2-sp": ParallelConfig(2, sequence_parallel=True),
    "pp2": ParallelConfig(1, 2),
    "pp4": ParallelConfig(1, 4),
    "tp2-pp2": ParallelConfig(2, 2),
    "dp2": ParallelConfig(data_parallel_size=2),
}


@pytest.mark.parametrize("layout", [pytest.param(n, marks=pytest.mark.slow) if n == "pp4" else n for n in LAYOUTS])
def test_every_layout_writes_what_one_process_writes(
    layout: str, families: dict[str, str], alone: dict[str, Any]
) -> None:
    """On every rank. Sampled tokens too: their random numbers belong to the request."""
    parallel = LAYOUTS[layout]
    # Sums over ranks take most of the time here; families differ in their layers, not in the order of messages. One
    # slot is one lane for two stages.
    also = {"tp2": ["llama", "granite", "granite-hybrid-one-group"], "pp2": ["llama"]}
    cases = ["nemotron-h", *also.get(layout, [])]
    slots = [1 if case == "llama" and layout == "pp2" else 7 for case in cases]
    args = ([families[case] for case in cases], parallel, PROMPTS, slots)
    everyone = launch(in_layout, *args, processes=parallel.world_size)
    assert len(everyone) == parallel.world_size
    for found in everyone:
        assert found == everyone[0]
        for case, written in zip(cases, found, strict=True):
            for (tokens, logprobs, done), (wanted, wanted_logprobs, wanted_done) in zip(
                written, alone[case][0][0], strict=True
            ):
                assert (tokens, done) == (wanted, wanted_done)
                assert logprobs == pytest.approx(wanted_logprobs, abs=5e-5)


@pytest.mark.parametrize("case", ["llama", "mistral-window", "nemotron-h"])
def test_torchs_kernels_write_what_those_for_cpu_write(case: str, families: dict[str, str]) -> None:
    """The path of GPUs, in bands of rows, on CPU."""
    own, torchs = launch(in_one_process, families[case], with_and_without_kernels, PROMPTS)
    assert [(tokens, done) for tokens, _, done in own] == [(tokens, done) for tokens, _, done in torchs]
    for (_, logprobs, _), (_, wanted, _) in zip(own, torchs, strict=True):
        assert logprobs == pytest.approx(wanted, abs=5e-5)


def test_the_order_of_requests_changes_nothing(families: dict[str, str]) -> None:
    forward, backward = launch(in_one_process, families["nemotron-h"], twice, requests_of(PROMPTS))
    assert [tokens for tokens, _, _ in forward] == [tokens for tokens, _, _ in backward]


@pytest.mark.parametrize("case", ["granite-hybrid", "llama"])
def test_an_engine_sees_weights_that_changed_since_its_last_call(case: str, families: dict[str, str]) -> None:
    """An optimizer step changes them in place; whatever the engine derived from the old ones would sample from a policy
    that is no more.
    """
    before, after, new = launch(in_one_process, families[case], around_an_update, requests_of(PROMPTS))
    assert after == new
    assert before != after


def test_no_requests_give_no_responses(families: dict[str, str]) -> None:
    assert launch(in_one_process, families["llama"], write, []) == []


def test_a_text_stops_a_response(families: dict[str, str]) -> None:
    """Though it lies across two tokens."""
    free, stopped, text = launch(in_one_process, families["llama"], stop_text, PROMPTS[0], 6)
    assert text == "".join(f"<{token}>" for token in free[0][5:7])
    assert stopped[0] == free[0][:7]
    assert stopped[2]
    assert not free[2]


@pytest.mark.parametrize("packed", [True, False])
def test_caches_are_bounded_and_sized_to_what_is_written(packed: bool, families: dict[str, str]) -> None:
    """The longest request needs 17 + 24 tokens; 100 tokens of cache are two rows of them."""
    for options, most in (({"slots": 6}, (6, 41)), ({"slots": 6, "cache_tokens": 100}, (2, 41))):
        rows, columns = launch(in_one_process, families["llama"], capacity_of, PROMPTS, options, packed)
        assert rows == most[0]
        assert columns <= most[1]


@pytest.mark.parametrize("case", ["llama", "nemotron-h"])
def test_no_more_responses_are_written_than_memory_has_room_for(case: str, families: dict[str, str]) -> None:
    """In half of the free memory; the same tokens come out, and what a row is said to take is what it takes."""
    plenty = launch(in_one_process, families[case], with_little_memory, PROMPTS, 1000.0)
    little = launch(in_one_process, families[case], with_little_memory, PROMPTS, 3.5)
    assert plenty[1] == 3 * len(PROMPTS)
    assert little[1] == 3
    assert [r.tokens for r in little[0]] == [r.tokens for r in plenty[0]]
    assert little[2] == 0
    nothing = launch(in_one_process, families[case], with_little_memory, PROMPTS, 0.9)
    assert "Lower max_new_tokens" in nothing[3]


def test_bad_requests_are_refused(families: dict[str, str]) -> None:
    cases = [
        (Request([], SamplingParams(3)), "request 0: an empty prompt"),
        (Request([4, 149], SamplingParams(3)), "a token outside the model's vocabulary of 149"),
        (Request([4], SamplingParams(0)), "max_new_tokens: 0"),
        (Request([4], SamplingParams(3, temperature=-1.0)), "temperature: -1.0"),
        (Request([4], SamplingParams(3, top_p=0.0)), "top_p: 0.0"),
        (Request([4], SamplingParams(3, top_k=-1)), "top_k: -1"),
        (Request([4], SamplingParams(3, seed=-1)), "seed: -1"),
        (Request([4], SamplingParams(3, stop_texts=("a",))), "stop_texts need an engine with `decode`"),
        (Request([4] * 3, SamplingParams(126)), "do not fit the model's"),
    ]
    said = launch(in_one_process, families["llama"], refusals, [request for request, _ in cases])
    for (_, message), found in zip(cases, said, strict=True):
        assert message in found
    with pytest.raises(InputError, match="request 0: an empty prompt"):
        launch(in_one_process, families["llama"], write, [cases[0][0]])


def test_logits_that_are_not_numbers_are_an_error(families: dict[str, str]) -> None:
    with pytest.raises(PrismError, match="request 0: the logits after 5 tokens are not finite"):
        launch(in_one_process, families["llama"], overflowing, PROMPTS[0])


def test_in_bf16_the_decoder_rounds_as_training_does(tmp_path: Path) -> None:
    """Log-probabilities in bf16 against those in fp32 of the same bf16 weights.

    The training forward in bf16 rounds the same values at the same places, so that its own distance from fp32 is what
    bf16 allows. Both are root mean squares over hundreds of tokens of the same distribution of errors; the factor 1.3
    leaves room for sums that are taken in another order and then rounded the other way. Two such errors that were
    independent would lie sqrt(2) times as far from each other as from fp32.
    """
    cases = ("llama", "granite-hybrid-one-group", "nemotron-h")
    paths = [str(save_tiny(case, tmp_path / case, torch.bfloat16)) for case in cases]
    found = launch(rounding_of_bf16, paths, PROMPTS)
    for case, (decoded, trained, between, count) in zip(cases, found, strict=True):
        assert count > 100, case
        assert decoded < 1.3 * trained, case
        assert between < 1.3 * 2**0.5 * trained, case


# fp32 rounding of a residual stream of size 10 to 100; a factor of 1.01 on one addition shows at 1e-2.
ROUNDING = 5e-4


@pytest.mark.parametrize(
    ("case", "layout", "mistakes"),
    [
        ("llama", "one", [("Attention", "step", 2), ("Attention", "prefill", 1), ("MLP", "inner", 3)]),
        ("nemotron-h", "one", [("Mamba", "step", 5), ("Mamba", "prefill", 0), ("Attention", "step", 3)]),
        ("llama", "tp2-pp2", [("Attention", "step", 2)]),
        ("nemotron-h", "tp2-sp", [("Mamba", "step", 2)]),
        pytest.param("nemotron-h", "pp2", [("Mamba", "step", 6), ("MLP", "inner", 1)], marks=pytest.mark.slow),
    ],
)
def test_the_layer_that_parts_is_named(
    case: str, layout: str, mistakes: list[tuple[str, str, int]], families: dict[str, str]
) -> None:
    parallel = LAYOUTS.get(layout, ParallelConfig())
    tokens = [(11 * i) % 97 + 4 for i in range(22)]
    right, *wrong = launch(
        gaps_with_mistake, families[case], parallel, tokens, [None, *mistakes], processes=parallel.world_size
    )
    layers = 4 if case == "llama" else 8
    names = ["embedding", *(f"decoder.layers.{i}" for i in range(layers)), "output_layer"]
    assert [name for name, _ in right] == names
    assert max(gap for _, gap in right) < ROUNDING
    for (_, _, layer), gaps in zip(mistakes, wrong, strict=True):
        assert [name for name, _ in gaps] == names
        assert next(name for name, gap in gaps if gap > ROUNDING) == f"decoder.layers.{layer}"


def test_gaps_are_listed_as_layers_follow_each_other() -> None:
    """Layer 10 comes after layer 2, so that the first gap in the list is where the passes part."""
    names = ["embedding", *(f"decoder.layers.{i}" for i in range(12)), "output_layer"]
    assert sorted(set(names), key=parity._place) == names


def test_a_gap_that_is_not_a_number_is_infinite() -> None:
    """Compared with a threshold, NaN would pass."""
    assert parity._gap(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 1.0])) == float("inf")
    assert parity._gap(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.5


def test_the_first_of_equal_logits_is_the_largest() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).round()  # full of ties
    assert torch.equal(largest(logits), torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits]))


def test_a_row_is_drawn_from_its_own_logits_and_number() -> None:
    """Mixed parameters in one batch, against one row at a time, and against a cumulative sum in fp64."""
    logits = 3 * torch.randn(40, 300, generator=torch.Generator().manual_seed(1))
    uniforms = torch.rand(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64).tolist()
    kinds = [(1.0, 1.0, 0), (0.0, 1.0, 0), (0.7, 1.0, 5), (1.4, 0.6, 0), (1.0, 0.8, 9)]
    sampling = [SamplingParams(1, *kinds[i % 5]) for i in range(40)]
    tokens, logprobs = choose(logits, sampling, uniforms)
    for i, s in enumerate(sampling):
        one, _ = choose(logits[i : i + 1], [s], [uniforms[i]])
        assert one.item() == tokens[i]
        row = logits[i].double()
        assert logprobs[i].item() == pytest.approx(row.log_softmax(-1)[tokens[i]].item(), abs=1e-5)
        if s.temperature == 0:
            assert tokens[i] == row.argmax()
            continue
        p = (row / s.temperature).softmax(-1)
        order = p.argsort(descending=True)
        if s.top_k:
            p[order[s.top_k :]] = 0
            p /= p.sum()
        kept = int((p[order].cumsum(0) < s.top_p).sum()) + 1
        p[order[kept:]] = 0
        sums = p.cumsum(0) / p.sum()
        assert tokens[i] == int((sums <= uniforms[i]).sum())


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-53])
def test_the_ends_of_the_distribution_are_tokens_of_positive_weight(uniform: float) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, 130:140] = torch.tensor([0.1 * i for i in range(10)])
    chosen, _ = choose(logits, [SamplingParams(1)], [uniform])
    assert chosen.item() == (130 if uniform == 0.0 else 139)


def test_seeds_and_numbers_of_requests_are_unrelated() -> None:
    seeds = {request_seed(seed, step, i) for seed in range(3) for step in range(3) for i in range(50)}
    assert len(seeds) == 450
    first, second = Uniforms(request_seed(0, 0, 0)), Uniforms(request_seed(0, 0, 1))
    a, b = ([stream.at(i) for i in range(300)] for stream in (first, second))
    assert all(0 <= x < 1 for x in a + b)
    assert len(set(a) | set(b)) == 600
    again = Uniforms(request_seed(0, 0, 0))
    assert [again.at(i) for i in range(300)] == a


def test_gaps_are_closed_with_few_moves_and_bands_stay_in_order() -> None:
    def sequence(row: int, length: int) -> Sequence:
        s = Sequence(row, Request([1], SamplingParams(99)), Prompt([1]))
        s.row, s.tokens = row, [0] * length
        return s

    kept = [sequence(row, 100 - row) for row in range(12) if row not in (1, 5)]
    order = rearranged(kept, 4)
    assert sorted(s.index for s in order) == sorted(s.index for s in kept)
    # Gap 1 gets row 4, the longest of the second band; the gaps 4 and 5 get rows 8 and 9; nothing else moves.
    assert [s.index for s in order] == [0, 4, 2, 3, *order_of(order, 4, 6), 6, 7, *order_of(order, 8, 10)]
    assert {s.index for s in order[4:6]} == {8, 9}
    assert {s.index for s in order[8:10]} == {10, 11}
    assert rearranged([], 4) == []


def order_of(order: list[Sequence], first: int, end: int) -> list[int]:
    return [s.index for s in order[first:end]]
