"""Accuracy and held-out loss of a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_workers import (
    direct_loss,
    evaluate_a_model_that_is_right_every_other_time,
    evaluate_with_known_answers,
    parameters_of,
)
from tiny_training import build_data, character_tokenizer, write_llama

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig
from prism_nemo.evaluation.tasks import EvaluationConfig, evaluate_checkpoint
from prism_nemo.runtime.launch import launch


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluationConfig, str]:
    root = tmp_path_factory.mktemp("evaluation")
    data = build_data(root / "data")
    tokenizer = character_tokenizer(root / "tokenizer")
    import_hf(write_llama(root / "hf"), root / "checkpoint", ParallelConfig())
    config = EvaluationConfig(
        str(tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent), ["arithmetic", "lists"],
        questions=21, max_new_tokens=12, data=str(data), retention="held", retention_rows=24, seq_length=16,
        batch_size=8,
    )  # fmt: skip
    return config, str(root / "checkpoint")


def test_two_processes_measure_what_one_measures(setting: tuple[EvaluationConfig, str]) -> None:
    config, checkpoint = setting
    one = launch(evaluate_checkpoint, config, checkpoint)
    two = launch(
        evaluate_checkpoint, replace(config, parallel=ParallelConfig(data_parallel_size=2)), checkpoint, processes=2
    )
    for name in config.tasks:
        assert one["tasks"][name]["n"] == two["tasks"][name]["n"] == 21
        assert one["tasks"][name]["greedy_accuracy"] == two["tasks"][name]["greedy_accuracy"]
    assert one["retention_loss"] == pytest.approx(two["retention_loss"], abs=1e-9)


def test_retention_loss_is_the_mean_cross_entropy(setting: tuple[EvaluationConfig, str]) -> None:
    config, checkpoint = setting
    measured = launch(evaluate_checkpoint, replace(config, tasks=[]), checkpoint)["retention_loss"]
    assert config.data is not None
    expected = launch(direct_loss, checkpoint, config.data, "held", 24, 16)
    # Two summation orders of fp32 losses of size 5: rounding of 1e-6.
    assert measured == pytest.approx(expected, abs=5e-6)


def test_right_answers_are_counted(setting: tuple[EvaluationConfig, str]) -> None:
    config, checkpoint = setting
    config = replace(config, questions=20, retention=None, batch_size=20)
    result = launch(evaluate_a_model_that_is_right_every_other_time, config, checkpoint)
    for name in config.tasks:
        task = result["tasks"][name]
        assert (task["accuracy"], task["greedy_accuracy"], task["format_rate"], task["n"]) == (0.5, 0.5, 1.0, 20)
        assert task["ci95"] == pytest.approx([0.299, 0.701], abs=1e-3)  # Wilson for 10 of 20
    assert "retention_loss" not in result
    assert {s["task"] for s in result["samples"]} == set(config.tasks)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_that_is_always_right_scores_one(processes: int, setting: tuple[EvaluationConfig, str]) -> None:
    """Each question is asked once, whichever process asks it, in batches of 8 with a rest; none is of another split."""
    config, checkpoint = setting
    config = replace(config, retention=None, parallel=ParallelConfig(data_parallel_size=processes))
    result = launch(evaluate_with_known_answers, config, checkpoint, processes=processes)
    for name in config.tasks:
        task = result["tasks"][name]
        assert (task["accuracy"], task["greedy_accuracy"], task["format_rate"], task["n"]) == (1.0, 1.0, 1.0, 21)
        assert task["ci95"][1] == pytest.approx(1.0)
        assert task["ci95"][0] == pytest.approx(21 / (21 + 1.959964**2))  # Wilson when all are right
    other = launch(evaluate_with_known_answers, replace(config, split="validation"), checkpoint, processes=processes)
    assert [other["tasks"][name]["accuracy"] for name in config.tasks] == [0.0, 0.0]


def test_the_end_token_may_have_any_name(setting: tuple[EvaluationConfig, str], tmp_path: Path) -> None:
    config, checkpoint = setting
    tokenizer = Path(shutil.copytree(config.tokenizer, tmp_path / "tokenizer"))
    for file in tokenizer.iterdir():
        file.write_text(file.read_text().replace("<eos>", "<|eot_id|>"))
    config = replace(config, tokenizer=str(tokenizer), tasks=["arithmetic"], retention=None)
    task = launch(evaluate_with_known_answers, config, checkpoint)["tasks"]["arithmetic"]
    assert (task["accuracy"], task["format_rate"]) == (1.0, 1.0)


@pytest.mark.parametrize(("temperature", "sampled", "greedy"), [(1.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_sampled_and_greedy_accuracy_are_told_apart(
    temperature: float, sampled: float, greedy: float, setting: tuple[EvaluationConfig, str]
) -> None:
    config, checkpoint = setting
    config = replace(config, retention=None)
    result = launch(evaluate_with_known_answers, config, checkpoint, (temperature,))
    for task in result["tasks"].values():
        assert (task["accuracy"], task["format_rate"], task["greedy_accuracy"]) == (sampled, 1.0, greedy)


def test_parameter_count_is_that_of_the_model(tmp_path: Path) -> None:
    shapes: list[dict[str, Any]] = [
        {},
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": False, "num_key_value_heads": 4, "head_dim": 24, "num_hidden_layers": 1},
    ]
    folders = [str(write_llama(tmp_path / str(i), **changes)) for i, changes in enumerate(shapes)]
    counts = launch(parameters_of, folders)
    assert all(counted == built for counted, built in counts)
    assert len({counted for counted, _ in counts}) == 3
