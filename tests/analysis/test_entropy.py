"""Entropy and likelihood: of every token against transformers' logits, and whole results where they are known."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_workers import entropies_of
from tiny_llama import edited_copy
from tiny_models import hf_model, save_tiny
from tiny_stages import stages
from tiny_training import character_tokenizer

from prism_nemo.analysis.entropy import (
    EntropySettings,
    _of_answers,
    analyze_entropy,
    by_token,
    entropy_lines,
    given_answers,
)
from prism_nemo.analysis.sampled import AnswerSettings, correct_of, questions_of
from prism_nemo.analysis.token_entropy import Told
from prism_nemo.errors import InputError
from prism_nemo.generation.requests import Response
from prism_nemo.rl.rewards.task import Problem, Score
from prism_nemo.rl.rollout import Rollout
from prism_nemo.runtime.launch import launch


def test_every_token_against_transformers(tmp_path: Path) -> None:
    folders = [save_tiny(case, tmp_path / case) for case in ("mistral", "nemotron-h")]
    rows = [([(7 * i + 3 * j) % 149 for j in range(length)], first) for i, (length, first) in enumerate(
        ((9, 4), (5, 1), (9, 8), (2, 1), (17, 9))
    )]  # fmt: skip
    for folder, found in zip(folders, launch(entropies_of, [str(f) for f in folders], rows), strict=True):
        theirs = hf_model(folder)
        for told, (tokens, first) in zip(found, rows, strict=True):
            assert len(told.entropy) == len(told.nll) == len(tokens) - first
            with torch.no_grad():
                scores = theirs(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(dim=-1)
            for number, place in enumerate(range(first, len(tokens))):
                given = scores[place - 1]
                assert told.nll[number] == pytest.approx(-float(given[tokens[place]]), abs=1e-4)
                assert told.entropy[number] == pytest.approx(float(-(given.exp() * given).sum()), abs=1e-4)


def rollout(tokens: list[int], right: bool, finished: bool = True, failure: str | None = None) -> Rollout:
    score = Score(float(right), True, "x", failure=failure)
    response = Response([1, 2], tokens, [0.0] * len(tokens), finished)
    return Rollout(Problem("t", "q", "", "x"), response, score)


def test_right_and_wrong_answers_are_told_apart() -> None:
    answers = [
        [rollout([1, 2], True), rollout([1, 2, 3, 4], False, finished=False)],
        [rollout([5], False), rollout([6, 7, 8], True)],
        [rollout([9], True, failure="raised")],  # no verdict: it is not among the right ones
    ]
    told = [
        [Told([1.0, 3.0], [0.5, 0.7]), Told([2.0] * 4, [1.0, 2.0, 3.0, 4.0])],
        [Told([6.0], [9.0]), Told([0.0, 1.0, 2.0], [0.1, 0.2, 0.3])],
        [Told([4.0], [7.0])],
    ]
    groups = [list(zip(a, t, strict=True)) for a, t in zip(answers, told, strict=True)]
    rows = {row["measure"]: row for row in _of_answers(answers, groups, 0.95)}
    assert rows["pass_rate"]["value"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert rows["length"]["value"] == pytest.approx((3 + 2 + 1) / 3)
    assert rows["finished"]["value"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert rows["entropy"]["value"] == pytest.approx((4 + 8 + 6 + 3 + 4) / 11)  # by token, not by answer
    assert rows["nll_right"]["value"] == pytest.approx((0.5 + 0.7 + 0.1 + 0.2 + 0.3) / 5)
    assert rows["nll_right"]["count"] == 2
    assert rows["nll_wrong"]["value"] == pytest.approx((10 + 9 + 7) / 6)
    assert rows["nll_wrong"]["count"] == 3
    assert correct_of(answers[2][0]) == 0.0
    nothing = {row["measure"]: row for row in _of_answers(answers[:1], [groups[0][:1]], 0.95)}
    assert nothing["nll_wrong"] == {"measure": "nll_wrong", "value": None, "low": None, "high": None, "count": 0}
    assert nothing["nll_right"]["value"] == pytest.approx(0.6)
    assert nothing["nll_right"]["low"] is None  # one question has no spread


def test_interval_is_over_groups() -> None:
    """A thousand equal tokens of two texts are two values: Student's t with one degree of freedom."""
    row = by_token("loss", [[1.0] * 500, [3.0] * 500, []], 0.95)
    assert row["value"] == pytest.approx(2.0)
    assert row["count"] == 2
    assert row["high"] - row["low"] == pytest.approx(2 * 12.706 * 1.0, rel=1e-3)  # standard error sqrt(2 / 2) = 1


def test_given_answers(tmp_path: Path) -> None:
    tokenizer = character_tokenizer(tmp_path)
    problems = [
        Problem("t", "1+1?", "11.", "2"),
        Problem("t", "2+0?", "20.", "2"),
        Problem("t", "a?", "", "44", text="Say a:"),
        Problem("t", "b?", "", "", text="empty"),
        Problem("t", "c?", "", "B", text="options", verifier="choice"),
    ]
    pairs = given_answers(problems, tokenizer)
    assert len(pairs) == 3  # without the empty answer and the choice
    shown = [tuple((tokenizer.decode(a.tokens[: a.first]), tokenizer.decode(a.tokens[a.first :])) for a in pair)
             for pair in pairs]  # fmt: skip
    assert shown[0] == (("Q: 1+1?\n<think>11.</think>", "2"), ("Q: 1+1?\n<think>11.</think>", "44"))
    assert shown[1][1] == ("Q: 2+0?\n<think>20.</think>", "44")
    assert shown[2] == (("Say a:", "44"), ("Say a:", "2"))
    assert given_answers(problems[:2], tokenizer) == []  # no other answer to compare with


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    root = tmp_path_factory.mktemp("stages")
    folders, data = stages(root)

    def forget(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"].zero_()  # tied: every logit is 0

    return [folders[0], edited_copy(folders[0], root / "uniform", forget)], data


@pytest.fixture(scope="module")
def settings(models: tuple[list[Path], Path]) -> EntropySettings:
    folders, data = models
    answers = AnswerSettings(tasks=("arithmetic",), questions=5, samples=2, max_new_tokens=6)
    return EntropySettings(tuple(map(str, folders)), answers, str(data), rows=10, seq_length=20)


@pytest.fixture(scope="module")
def result(settings: EntropySettings) -> dict[str, Any]:
    return analyze_entropy(settings)


def test_a_model_that_knows_nothing(result: dict[str, Any], settings: EntropySettings) -> None:
    """Every token of 255 is as likely: what must come out is known."""
    rows = {(r["on"], r["measure"]): r for r in result["rows"] if r["model"] == "uniform"}
    for place in (("arithmetic", "entropy"), ("arithmetic", "nll_wrong"), ("held", "entropy"), ("held", "loss")):
        assert rows[place]["value"] == pytest.approx(math.log(255), abs=1e-6)
    assert rows["arithmetic", "pass_rate"]["value"] == 0.0
    assert rows["arithmetic", "nll_right"]["value"] is None
    assert 1 <= rows["arithmetic", "length"]["value"] <= 6
    problems = questions_of(settings.answers, "arithmetic")
    lengths = [len(problem.answer) for problem in problems]
    own = sum(lengths) / len(lengths)
    assert rows["arithmetic", "nll_answer"]["value"] == pytest.approx(own * math.log(255), rel=1e-6)
    others = [
        next(len(q.answer) for q in problems[i + 1 :] + problems[:i] if q.answer != p.answer)
        for i, p in enumerate(problems)
    ]
    margin = (sum(others) / len(others) - own) * math.log(255)
    assert rows["arithmetic", "margin"]["value"] == pytest.approx(margin, abs=1e-5)
    assert rows["held", "loss"]["count"] == 10


def test_the_whole_result(result: dict[str, Any], models: tuple[list[Path], Path]) -> None:
    rows = {(r["on"], r["measure"]): r for r in result["rows"] if r["model"] == "base"}
    assert rows["arithmetic", "entropy"]["low"] < rows["arithmetic", "entropy"]["value"] < math.log(255)
    assert rows["held", "loss"]["value"] > rows["held", "entropy"]["value"]  # it knows nothing of the text, but is sure
    assert [model["name"] for model in result["models"]] == ["base", "uniform"]
    assert json.loads(json.dumps(result))["rows"] == result["rows"]
    assert len(entropy_lines(result)) == len(result["rows"]) == 2 * (9 + 2)


def test_refusals(settings: EntropySettings, tmp_path: Path) -> None:
    small = save_tiny("llama", tmp_path / "small", vocab_size=60)
    for changes, match in (
        ({"models": ()}, "at least one"),
        ({"models": (str(tmp_path),)}, "neither a prism-nemo checkpoint"),
        ({"data": None, "answers": AnswerSettings()}, "nothing to measure"),
        ({"models": (settings.models[0], str(small))}, "has 100 tokens, .* 60"),
        ({"answers": dataclasses.replace(settings.answers, max_new_tokens=500)}, "has 192 positions"),
        ({"answers": dataclasses.replace(settings.answers, split="dev")}, "dev"),
        ({"confidence": 1.5}, "confidence"),
        ({"rows": 1}, "at least 2"),
        ({"sources": ("nothing",)}, "nothing"),
    ):
        with pytest.raises(InputError, match=match):
            analyze_entropy(dataclasses.replace(settings, **changes))
