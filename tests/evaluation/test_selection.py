"""Choosing a checkpoint: where it may be done, how sure it is, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_folders import write_folder

from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.store import EVALUATION
from prism_nemo.evaluation.comparing.folder import read_folder
from prism_nemo.evaluation.comparing.selection import choose_checkpoint, record_choice


def _checkpoints(
    tmp_path: Path, shares: list[float], questions: int = 300, split: str = "validation", seed: int = 0
) -> list[Path]:
    """Checkpoints that have these shares of the questions right, each question with its own difficulty."""
    hardness = np.random.default_rng(seed).random(questions)
    return [
        write_folder(
            tmp_path / f"step{i}", {"sums": ("math", (hardness < p).astype(float)[:, None].tolist())}, split=split
        )
        for i, p in enumerate(shares)
    ]


def test_the_best_is_chosen_and_the_choice_is_sure(tmp_path: Path) -> None:
    choice = choose_checkpoint(_checkpoints(tmp_path, [0.3, 0.7, 0.5]))
    assert choice.chosen.name == "step1"
    assert choice.chosen.probability > 0.999
    assert sum(c.probability for c in choice.candidates) == pytest.approx(1)
    assert [c.name for c in choice.candidates] == ["step0", "step1", "step2"]
    assert choice.optimism == pytest.approx(0, abs=1e-9)
    assert choice.marks == []


def test_equal_checkpoints_share_the_probability(tmp_path: Path) -> None:
    choice = choose_checkpoint(_checkpoints(tmp_path, [0.5, 0.5]))
    assert [c.probability for c in choice.candidates] == [0.5, 0.5]
    assert choice.optimism == pytest.approx(0, abs=1e-3)


def test_the_best_of_many_equal_ones_is_too_good(tmp_path: Path) -> None:
    """Eight models with 100 independent questions each: the largest of eight normal errors is 1.42 of them too high.

    In the bootstrap the models are as far apart as they were found to be, so that a part of it is seen; more than half
    on average and less than all of 1.42 x 0.05.
    """
    rng = np.random.default_rng(3)
    found = []
    for run in range(12):
        folders = [
            write_folder(
                tmp_path / f"{run}-{i}",
                {"sums": ("math", rng.integers(0, 2, (100, 1)).astype(float).tolist())},
                split="validation",
            )
            for i in range(8)
        ]
        choice = choose_checkpoint(folders, resamples=1000)
        found.append(choice.optimism)
        assert choice.chosen.estimate == max(c.estimate for c in choice.candidates)
        assert choice.corrected == pytest.approx(choice.chosen.estimate - choice.optimism)
    assert 0.5 * 1.42 * 0.05 < float(np.mean(found)) < 1.42 * 0.05


def test_choosing_on_test_is_refused_unless_asked_for_and_then_marked(tmp_path: Path) -> None:
    folders = _checkpoints(tmp_path, [0.4, 0.6], split="test")
    with pytest.raises(InputError, match=r"test split.*--split validation"):
        choose_checkpoint(folders)
    choice = choose_checkpoint(folders, on_test=True)
    assert choice.marks == [
        "chosen on the test split among 2 checkpoints by plain_mean: the score is expected to be too good by "
        f"{choice.optimism:.4f}"
    ]
    for _ in range(2):  # the second time changes nothing
        record_choice(choice, tmp_path / "out")
        assert read_folder(folders[1]).evaluation.marks == choice.marks
        assert read_folder(folders[0]).evaluation.marks == []
    written = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert written["chosen"]["path"] == str(folders[1])


def test_a_choice_on_validation_leaves_the_evaluation_as_it_was(tmp_path: Path) -> None:
    folders = _checkpoints(tmp_path, [0.4, 0.6])
    before = (folders[1] / EVALUATION).read_bytes()
    record_choice(choose_checkpoint(folders), tmp_path / "out")
    assert (folders[1] / EVALUATION).read_bytes() == before


def _two(tmp_path: Path, name: str, outcomes: dict[str, float], loss: float) -> Path:
    domains = {"sums": "math", "products": "math", "quiz": "science", "needle": "long_context"}
    return write_folder(
        tmp_path / name,
        {task: (domains[task], [[float(i < 100 * p)] for i in range(100)]) for task, p in outcomes.items()},
        {"held_out_web": [loss, loss + 1]},
        split="validation",
    )


def test_criteria(tmp_path: Path) -> None:
    """a: better in two tasks of mathematics; b: better in science; needle and text take no part in averages."""
    a = _two(tmp_path, "a", {"sums": 0.6, "products": 0.6, "quiz": 0.3, "needle": 0.1}, 3.0)
    b = _two(tmp_path, "b", {"sums": 0.5, "products": 0.5, "quiz": 0.45, "needle": 0.9}, 2.5)
    plain, weighted = choose_checkpoint([a, b]), choose_checkpoint([a, b], "domain_weighted")
    assert (plain.chosen.name, plain.chosen.estimate) == ("a", pytest.approx(0.5))
    assert (weighted.chosen.name, weighted.chosen.estimate) == ("b", pytest.approx((0.5 + 0.45) / 2))
    loss = choose_checkpoint([a, b], "held_out_web")
    assert (loss.chosen.name, loss.higher_is_better) == ("b", False)
    assert loss.chosen.estimate == pytest.approx(3.0)
    assert loss.chosen.probability == 1.0
    assert choose_checkpoint([a, b], "needle").chosen.name == "b"
    with pytest.raises(InputError, match=r"criterion: 'x' is unknown; known: domain_weighted, plain_mean, sums"):
        choose_checkpoint([a, b], "x")


def test_unlike_evaluations_are_refused(tmp_path: Path) -> None:
    first, second = _checkpoints(tmp_path, [0.4, 0.6])
    other = write_folder(tmp_path / "other", {"sums": ("math", [[1.0]] * 5)}, split="validation")
    with pytest.raises(InputError, match="295 questions are in one of them only"):
        choose_checkpoint([first, second, other])
    with pytest.raises(InputError, match="at least two"):
        choose_checkpoint([first])
    with pytest.raises(InputError, match="resamples"):
        choose_checkpoint([first, second], resamples=10)
    text = [write_folder(tmp_path / f"t{i}", {}, {"held_out_web": [1.0, 2.0]}, split="validation") for i in range(2)]
    with pytest.raises(InputError, match="name a task"):
        choose_checkpoint(text)
