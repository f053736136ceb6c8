"""Scores of suite `retention` as the two leaderboards have them, and its table against lm-eval's own files."""

from __future__ import annotations

import json
import math

import pytest
from lm_eval.tasks import TaskManager

from prism_nemo.evaluation.harness.run import _averages
from prism_nemo.evaluation.harness.tasks.loading import leaf_names, task_manager
from prism_nemo.evaluation.harness.tasks.scores import averaged, board_score, task_score
from prism_nemo.evaluation.harness.tasks.table import RETENTION
from prism_nemo.evaluation.result import Answer, QuestionResult
from prism_nemo.evaluation.statistics.intervals import Interval


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return task_manager(list(RETENTION.values()), None)


@pytest.mark.parametrize(
    ("name", "tasks", "shots"),
    [
        ("arc_challenge", 1, 25),
        ("hellaswag", 1, 10),
        ("mmlu", 57, 5),
        ("truthfulqa", 1, 0),
        ("winogrande", 1, 5),
        ("gsm8k", 1, 5),
        ("ifeval", 1, 0),
        ("bbh", 24, 3),
        ("math_hard", 7, 4),
        ("gpqa", 3, 0),
        ("musr", 3, 0),
        ("mmlu_pro", 1, 5),
    ],
)
def test_the_table_is_what_lm_eval_has(manager: TaskManager, name: str, tasks: int, shots: int) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    benchmark = RETENTION[name]
    leaves = [leaf for task in benchmark.tasks for leaf in leaf_names(manager, task)]
    assert len(set(leaves)) == len(leaves) == tasks
    assert set(benchmark.subtask_chance) <= set(leaves)
    assert set(benchmark.counted) <= set(leaves)
    for leaf in leaves:
        config = load_yaml(manager.task_index[leaf].yaml_path, resolve_func=False)
        assert benchmark.metric in [metric["metric"] for metric in config["metric_list"]]
        assert benchmark.filter in [f["name"] for f in config.get("filter_list") or [{"name": "none"}]]
        assert (config.get("num_fewshot") if benchmark.shots is None else benchmark.shots) == shots


def test_six_benchmarks_of_each_leaderboard() -> None:
    assert [sum(b.board == board for b in RETENTION.values()) for board in (1, 2)] == [6, 6]


def results_of(name: str, values: list[float], options: int = 4, **metrics: list[float]) -> list[QuestionResult]:
    return [
        QuestionResult(
            f"{name}/{n}",
            "test",
            "",
            "",
            [Answer("", 0, True, None, value)],
            [-1.0] * options,
            {key.replace("__", "/"): row[n] for key, row in metrics.items()},
        )
        for n, value in enumerate(values)
    ]


def test_subtasks_are_normalised_one_by_one() -> None:
    """The worked example of the leaderboard's page: 0.7 of chance 0.5, 0.4 of 0.2 and 0.6 of 1/3."""
    parts = {"murder_mysteries": 0.7, "object_placements": 0.4, "team_allocation": 0.6}
    leaves = {
        f"leaderboard_musr_{name}": results_of(name, [1.0] * round(10 * mean) + [0.0] * round(10 * (1 - mean)))
        for name, mean in parts.items()
    }
    score = board_score(RETENTION["musr"], leaves)
    assert score.estimate == pytest.approx((40 + 25 + 40) / 3)
    assert score.low < score.estimate < score.high
    whole = task_score(RETENTION["musr"], leaves, 0)
    assert whole.estimate == pytest.approx(17 / 30)
    assert whole.chance == pytest.approx((1 / 2 + 1 / 5 + 1 / 3) / 3)


def test_below_chance_is_zero_for_each_subtask() -> None:
    """Chance of BBH is one in the number of options of each subtask; a bad subtask takes nothing from a good one."""
    leaves = {"two": results_of("two", [0.0] * 10, options=2), "five": results_of("five", [1.0, 0.0] * 5, options=5)}
    assert board_score(RETENTION["bbh"], leaves).estimate == pytest.approx((0 + 100 * (0.5 - 0.2) / 0.8) / 2)
    assert task_score(RETENTION["bbh"], leaves, 3).chance == pytest.approx((0.5 + 0.2) / 2)


def test_ifeval_is_the_mean_of_prompts_and_instructions() -> None:
    name = "leaderboard_ifeval"
    leaves = {
        name: results_of(
            name,
            [1.0, 0.0, 0.0],
            inst_level_strict_acc__right=[1.0, 2.0, 0.0],
            inst_level_strict_acc__of=[1.0, 3.0, 1.0],
        )
    }
    assert board_score(RETENTION["ifeval"], leaves).estimate == pytest.approx(100 * (1 / 3 + 3 / 5) / 2)
    assert task_score(RETENTION["ifeval"], leaves, 0).estimate == pytest.approx(1 / 3)


def test_mmlu_is_the_mean_over_subjects() -> None:
    leaves = {"big": results_of("big", [1.0] * 9), "small": results_of("small", [0.0])}
    assert board_score(RETENTION["mmlu"], leaves).estimate == pytest.approx(50)
    assert task_score(RETENTION["mmlu"], leaves, 5).estimate == pytest.approx(0.9)
    # The first leaderboard's scores are raw.
    assert board_score(RETENTION["hellaswag"], {"h": results_of("h", [1.0, 0.0])}).estimate == 50


def test_chance_of_truthfulqa_is_not_claimed() -> None:
    assert task_score(RETENTION["truthfulqa"], {"t": results_of("t", [0.3, 0.9])}, 0).chance is None


def test_an_average_adds_squared_distances() -> None:
    joined = averaged([Interval(10, 7, 14), Interval(20, 16, 23)])
    assert joined.estimate == 15
    assert joined.low == pytest.approx(15 - math.hypot(3, 4) / 2)
    assert joined.high == pytest.approx(15 + math.hypot(4, 3) / 2)


def test_a_leaderboards_average_needs_all_its_benchmarks() -> None:
    scores = {
        name: task_score(benchmark, {leaf: results_of(leaf, [1.0, 0.0])}, 0)
        for name, benchmark in RETENTION.items()
        if benchmark.board == 1
        for leaf in benchmark.tasks
    }
    found = _averages(scores)
    assert list(found) == ["open_llm_leaderboard_1"]
    assert found["open_llm_leaderboard_1"]["estimate"] == pytest.approx(50)
    assert found["open_llm_leaderboard_1"]["of"] == list(scores)
    del scores["mmlu"]
    assert _averages(scores) == {}
    assert json.dumps(found)
