"""Losses of held-out text: which tokens are scored, what they are divided by, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from evaluation_workers import direct_loss
from in_training_workers import loss_by_engine
from tiny_training import build_data, character_tokenizer, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig
from prism_nemo.data.manifest import load_manifest
from prism_nemo.data.samples import TokenFile
from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.contract import Continuation, Likelihood
from prism_nemo.evaluation.held_out_loss import held_out_sources, measure_held_out, source_score
from prism_nemo.evaluation.result import QuestionResult
from prism_nemo.evaluation.statistics.intervals import mean_interval
from prism_nemo.runtime.launch import launch


@dataclasses.dataclass
class Bigram:
    """A model whose log-probability of a token depends on the one before it."""

    tokenizer: Tokenizer
    max_length: int = 64
    engine: str = "transformers"
    asked: int = 0
    scale: float = 1.0
    short: int = 0

    def score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """See `EvaluationModel.score`."""
        self.asked += len(continuations)
        found = []
        for item in continuations:
            whole = [*item.context, *item.tokens]
            costs = [_cost(a, b) for a, b in itertools.pairwise(whole)]
            found.append(Likelihood(-self.scale * sum(costs), len(item.tokens) - self.short, False))
        return found

    def generate(self, requests: Sequence[object]) -> list[object]:
        """Nothing is generated here."""
        raise NotImplementedError


def _cost(before: int, token: int) -> float:
    return ((7 * before + 3 * token) % 11) / 11 + 0.1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_data(tmp_path_factory.mktemp("held-out"))


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> Tokenizer:
    return load_tokenizer(data.parent / "tokenizer")


def test_every_token_after_the_first_is_scored_once(data: Path, tokenizer: Tokenizer) -> None:
    """Against the token file itself: 7 rows of 20 tokens, evenly spaced from the first token to the last."""
    model = Bigram(tokenizer)
    found = measure_held_out(model, data, ["held"], rows=7, seq_length=20, batch=3)
    assert list(found) == ["held_out_held"]
    manifest = load_manifest(data)
    tokens = TokenFile(manifest, manifest.source("held")).tokens
    last = len(tokens) - 21
    expected = []
    for row in range(7):
        text = tokens[round(last * row / 6) :][:21].tolist()
        expected.append(sum(_cost(a, b) for a, b in itertools.pairwise(text)) / 20)
    rows = found["held_out_held"].rows
    assert [row.metrics["loss"] for row in rows] == pytest.approx(expected)
    assert {row.metrics["tokens"] for row in rows} == {20.0}
    assert [row.id for row in rows] == [f"row-{i}" for i in range(7)]
    assert model.asked == 7
    score = found["held_out_held"].score
    interval = mean_interval(expected)
    assert (score.estimate, score.low, score.high) == pytest.approx((interval.estimate, interval.low, interval.high))
    assert (score.domain, score.metric, score.higher_is_better, score.questions) == ("text", "loss", False, 7)
    assert score.details["perplexity"]["high"] == pytest.approx(math.exp(interval.high))
    assert score.details["tokens"] == 140


def test_rows_tell_their_text(data: Path, tokenizer: Tokenizer) -> None:
    """The hash is that of the text: equal for two models, another for other rows."""
    one, two = (measure_held_out(Bigram(tokenizer, scale=s), data, ["held"], 5, 20)["held_out_held"] for s in (1, 2))
    assert [row.gold for row in one.rows] == [row.gold for row in two.rows]
    assert len({row.gold for row in one.rows}) == 5
    assert two.score.estimate == pytest.approx(2 * one.score.estimate)
    other = measure_held_out(Bigram(tokenizer), data, ["held"], 5, 21)["held_out_held"]
    assert not {row.gold for row in other.rows} & {row.gold for row in one.rows}


def test_rows_weigh_as_their_tokens_do() -> None:
    of = {"first": (1.0, 10.0), "second": (4.0, 30.0)}
    rows = [QuestionResult(i, "test", "", "", [], metrics={"loss": x, "tokens": n}) for i, (x, n) in of.items()]
    assert source_score(rows).estimate == pytest.approx(130 / 40)


def test_a_loss_beyond_floats_has_no_perplexity() -> None:
    rows = [QuestionResult(str(i), "test", "", "", [], metrics={"loss": 1000.0 + i, "tokens": 1.0}) for i in range(3)]
    assert source_score(rows).details["perplexity"]["estimate"] is None


def test_held_out_sources_are_those_of_weight_0(data: Path) -> None:
    assert held_out_sources(data) == ["held"]


def test_what_cannot_be_measured_is_refused_before_the_model_is_asked(
    data: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = Bigram(tokenizer)
    for arguments, message in (
        ((["held"], 8, 65), "rows of 65 tokens, but the model reads 1 to 64"),
        ((["held"], 1, 16), "1 row has no interval"),
        ((["held", "hold"], 8, 16), "no source is called 'hold'"),
        ((["held"], 100_000, 16), "100000 held-out rows of 16 tokens need"),
    ):
        with pytest.raises(InputError, match=message):
            measure_held_out(model, data, *arguments)
    assert model.asked == 0
    measure_held_out(model, data, ["held"], 2, 64)


def test_tokens_of_another_tokenizer_are_refused(data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One of as many tokens but in another order gives a loss that looks like any other."""
    saved_anew = tmp_path / "anew"
    shutil.copytree(tokenizer.path.parent, saved_anew)
    text = (saved_anew / "tokenizer.json").read_text()
    (saved_anew / "tokenizer.json").write_text(text + "\n")
    assert measure_held_out(Bigram(load_tokenizer(saved_anew)), data, ["held"], 4, 16)
    swapped = tmp_path / "swapped"
    shutil.copytree(tokenizer.path.parent, swapped)
    (swapped / "tokenizer.json").write_text(
        text.replace('"a":', '"@@":').replace('"b":', '"a":').replace('"@@":', '"b":')
    )
    other = load_tokenizer(swapped)
    assert other.vocab_size == tokenizer.vocab_size
    with pytest.raises(InputError, match="which is not the model's"):
        measure_held_out(Bigram(other), data, ["held"], 4, 16)


@pytest.mark.parametrize("model", [{"scale": float("nan")}, {"scale": float("inf")}, {"short": 1}])
def test_a_broken_likelihood_is_an_error(model: dict[str, float], data: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(PrismError, match="'held', row 0: log-probability"):
        measure_held_out(Bigram(tokenizer, **model), data, ["held"], 4, 16)  # type: ignore[arg-type]


def test_the_engines_loss_is_the_mean_cross_entropy(tmp_path: Path) -> None:
    data = build_data(tmp_path / "data")
    character_tokenizer(tmp_path / "tokenizer")
    import_hf(write_llama(tmp_path / "hf"), tmp_path / "checkpoint", ParallelConfig())
    folders = str(tmp_path / "checkpoint"), str(data)
    measured = launch(loss_by_engine, *folders, str(tmp_path / "tokenizer"), 12, 64)
    # Two summation orders of fp32 losses of size 5: rounding of 1e-6.
    assert measured == pytest.approx(launch(direct_loss, *folders, "held", 12, 64), abs=5e-6)
    assert np.isfinite(measured)
