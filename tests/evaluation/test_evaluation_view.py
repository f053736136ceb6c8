"""What people see of an evaluation."""

from __future__ import annotations

from rich.console import Console

from prism_nemo.evaluation.evaluation_view import MIN_WIDTH, evaluation_view
from prism_nemo.evaluation.result import Evaluation, TaskScore


def test_scores_averages_and_marks_are_shown() -> None:
    tasks = {
        "quiz": TaskScore(
            "math",
            "pass@1",
            0.123,
            0.1,
            0.15,
            16,
            4,
            chance=0.25,
            details={"format": "think", "failures": {"empty": 3}},
        ),
        "text": TaskScore("text", "loss", 2.5, 2.25, 2.75, 8, higher_is_better=False),
    }
    average = {"estimate": 0.3, "low": 0.2, "high": 0.4, "of": {"math": ["quiz"], "code": ["other"]}}
    shown = Evaluation("mine", "test", {"name": "model-a"}, {}, tasks, {"domain_weighted": average}, ["a mark"])
    console = Console(width=MIN_WIDTH)
    with console.capture() as capture:
        console.print(evaluation_view(shown))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert "model-a mine, test split" in lines
    assert "quiz math pass@1 12.3 10.0 to 15.0 25.0 16 x 4 think; 3 empty" in lines
    assert "text text loss 2.5000 2.2500 to 2.7500 - 8 x 1" in lines
    assert "domain weighted 30.0 20.0 to 40.0 mean of math: quiz; code: other" in lines
    assert "note: a mark" in lines
