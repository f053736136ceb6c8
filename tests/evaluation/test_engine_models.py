"""Engines are interchangeable: the same prompts, the same answers, the same log-probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_model_workers import everything, here, said_and_stopped
from tiny_models import save_tiny
from tiny_training import character_tokenizer

from prism_nemo.checkpoint.convert import export_hf, import_hf
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.continuations import rows_of
from prism_nemo.evaluation.engines.contract import Continuation
from prism_nemo.evaluation.engines.open import find_model, with_model
from prism_nemo.generation.requests import Request, SamplingParams
from prism_nemo.generation.score import Row
from prism_nemo.runtime.launch import launch

CASES = ("llama", "granite-hybrid", "nemotron-h")


def _some(seed: int, count: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 149, count).tolist()


def _requests() -> list[Request]:
    """Greedy and sampled, of different lengths, two of each prompt, with ends that some responses reach."""
    kinds = [
        SamplingParams(9, 0.0, stop_ids=(5, 6, 7, 8)),
        SamplingParams(14, 1.0, stop_ids=tuple(range(40)), seed=3),
        SamplingParams(6, 0.8, top_p=0.9, seed=4),
        SamplingParams(11, 1.2, top_k=20, seed=5),
    ]
    return [Request(_some(place // 2, 3 + 2 * (place // 2)), kinds[place % 4]) for place in range(12)]


def _continuations() -> list[Continuation]:
    """Questions with options that share examples, one that has to be cut, and a text of nothing known."""
    shots = _some(50, 20)
    found = [
        Continuation(shots + _some(60 + q, 6), _some(70 + 4 * q + o, 1 + o * (q % 2)))
        for q in range(4)
        for o in (0, 1, 2)
    ]
    return [*found, Continuation(_some(90, 127), _some(91, 9)), Continuation([3], _some(92, 40)), found[2]]


REQUESTS, CONTINUATIONS = _requests(), _continuations()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders with their tokenizers."""
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        character_tokenizer(save_tiny(case, root / case))
    return {case: root / case for case in CASES}


@pytest.fixture(scope="module")
def native(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of them as a native checkpoint, and exported again beside it."""
    root = tmp_path_factory.mktemp("native")
    import_hf(folders["llama"], root / "checkpoint", ParallelConfig())
    export_hf(root / "checkpoint", root / "exported")
    return root / "checkpoint"


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path], native: Path) -> dict[str, Any]:
    """By case, what our engine and transformers answer; also our engine from a native checkpoint."""
    places: list[Any] = [
        (str(folders[case]), engine, None) for case in CASES for engine in ("megatron", "transformers")
    ]
    places += [(str(native), "megatron", None), (str(native.parent / "exported"), "transformers", None)]
    found = launch(here, places, REQUESTS, CONTINUATIONS)
    pairs = dict(zip([*CASES, "native"], zip(found[::2], found[1::2], strict=True), strict=True))
    return pairs


@pytest.mark.parametrize("case", [*CASES, "native"])
def test_transformers_gives_the_same_log_probabilities(case: str, answers: dict[str, Any]) -> None:
    """Two implementations in fp32 differ by some 1e-5; each neighbouring place by 1e-1."""
    (_, ours), (_, theirs) = answers[case]
    assert len(ours) == len(theirs) == len(CONTINUATIONS)
    for continuation, own, other in zip(CONTINUATIONS, ours, theirs, strict=True):
        assert own.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert own.tokens == other.tokens == len(continuation.tokens)
        assert own.greedy == other.greedy
    assert len({round(own.logprob, 2) for own in ours}) > 10


@pytest.mark.parametrize("case", [*CASES, "native"])
def test_transformers_writes_the_same_responses(case: str, answers: dict[str, Any]) -> None:
    """Greedy and sampled: random numbers belong to the request."""
    (ours, _), (theirs, _) = answers[case]
    for request, own, other in zip(REQUESTS, ours, theirs, strict=True):
        assert own.prompt == request.prompt
        assert (own.tokens, own.finished) == (other.tokens, other.finished)
        assert own.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert any(own.finished for own in ours)
    assert len({len(own.tokens) for own in ours}) > 3


def test_a_native_checkpoint_answers_as_the_folder_that_it_came_from(answers: dict[str, Any]) -> None:
    assert answers["native"][0] == answers["llama"][0]


@pytest.mark.parametrize(
    "layout",
    [ParallelConfig(2), ParallelConfig(1, 2), ParallelConfig(data_parallel_size=2)],
    ids=lambda p: p.describe(),
)
def test_every_rank_gets_the_answers_of_one_process(
    layout: ParallelConfig, folders: dict[str, Path], native: Path, answers: dict[str, Any]
) -> None:
    """In the order of the questions; from a checkpoint that another layout wrote."""
    path = folders["nemotron-h"] if layout.data_parallel_size > 1 else native
    case = "nemotron-h" if layout.data_parallel_size > 1 else "native"
    found = find_model(path, layout=layout)
    everyone, about = with_model(everything, found, REQUESTS, CONTINUATIONS)
    assert len(everyone) == 2
    assert everyone[0] == everyone[1]
    written, scored = everyone[0]
    wanted_written, wanted_scored = answers[case][0]
    for own, wanted in zip(written, wanted_written, strict=True):
        assert (own.prompt, own.tokens, own.finished) == (wanted.prompt, wanted.tokens, wanted.finished)
    for own, wanted in zip(scored, wanted_scored, strict=True):
        assert own.logprob == pytest.approx(wanted.logprob, abs=2e-4)
        assert (own.tokens, own.greedy) == (wanted.tokens, wanted.greedy)
    assert (about["engine"], about["max_length"], about["path"]) == ("megatron", 128, str(path))


@pytest.fixture(scope="module", params=["megatron", "transformers"])
def asked(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Any:
    """See `engine_model_workers.said_and_stopped`."""
    long, good = SamplingParams(100, 0.0), Request([1], SamplingParams(2, 0.0))
    calls = [
        ("generate", []),
        ("score", []),
        ("generate", [good, Request([1] * 29, long)]),
        ("generate", [good, Request([], long)]),
        ("score", [Continuation([1], [2]), Continuation([], [2])]),
        ("score", [Continuation([1], [])]),
        ("score", [Continuation([1], [2] * 65)]),
        ("score", [Continuation([1], [149])]),
        ("score", [Continuation([1], [2] * 64)]),
    ]
    found = find_model(folders["llama"], request.param, max_length=64)
    return with_model(said_and_stopped, found, calls, [[5 + i, 6, 7] for i in range(30)])


def test_what_cannot_be_answered_is_refused_before_anything_is(asked: Any) -> None:
    wanted = [
        "0 answers",
        "0 answers",
        "do not fit the model's 64 positions",
        "an empty prompt",
        "continuation 1: an empty context",
        "continuation 0: an empty continuation",
        "continuation 0: 65 tokens are to be scored, but the model reads 64",
        "outside the model's vocabulary of 149",
        "1 answers",
    ]
    for own, part in zip(asked[0], wanted, strict=True):
        assert part in own


def test_a_text_ends_a_response(asked: Any) -> None:
    assert asked[1]
    for free, stopped, text, tokens in asked[1]:
        assert len(text) == 2
        assert (stopped.tokens, stopped.finished) == (free.tokens[:tokens], True)
        assert not free.finished


def test_contexts_are_cut_from_the_left_as_lm_eval_cuts_them() -> None:
    """``(context + continuation)[-(max_length + 1) :]``, of which the last token is not read."""
    context, tokens = list(range(10)), [20, 21, 22]
    (row,) = rows_of([Continuation(context, tokens)], 6, 30)
    assert row == Row([6, 7, 8, 9, 20, 21, 22], 4)
    assert rows_of([Continuation(context, tokens)], 12, 30) == [Row(context + tokens, 10)]
    assert rows_of([Continuation(context, tokens)], 3, 30) == [Row([9, 20, 21, 22], 1)]
    with pytest.raises(InputError, match="3 tokens are to be scored, but the model reads 2"):
        rows_of([Continuation(context, tokens)], 2, 30)
