"""The retention report on evaluations whose differences are known."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_folders import SETTINGS, questions, write_folder
from rich.console import Console

from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.store import EVALUATION, SAMPLES
from prism_nemo.evaluation.comparing.folder import read_folder
from prism_nemo.evaluation.comparing.forgotten import compare_items, drop_p
from prism_nemo.evaluation.comparing.retention import (
    GAINED,
    KEPT,
    LOST,
    UNCLEAR,
    Line,
    Retention,
    compare,
    retention,
    verdict,
)
from prism_nemo.evaluation.comparing.retention_view import (
    MIN_WIDTH,
    retention_markdown,
    retention_view,
    write_retention,
)
from prism_nemo.evaluation.result import QuestionResult
from prism_nemo.evaluation.statistics.differences import domain_difference, paired_difference

HALF = [[1.0], [0.0]] * 100


def _line(report: Retention, name: str, model: int = 0) -> Line:
    return next(line for line in report.models[model].lines if line.name == name)


def _outcomes(seed: int, n: int = 200, p: float = 0.5) -> list[list[float]]:
    rng = random.Random(seed)
    return [[float(rng.random() < p)] for _ in range(n)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.005, 0.005, KEPT),
        (-0.01, 0.01, KEPT),
        (0.001, 0.009, KEPT),  # certain, but too small to matter
        (-0.009, -0.001, KEPT),
        (-0.03, -0.001, LOST),
        (0.001, 0.03, GAINED),
        (-0.03, 0.001, UNCLEAR),
        (-0.001, 0.03, UNCLEAR),
        (-0.03, 0.0, UNCLEAR),
        (-0.2, 0.2, UNCLEAR),
    ],
)
def test_verdicts(low: float, high: float, expected: str) -> None:
    assert verdict(low, high, 0.01) == expected


def test_a_loss_is_found_and_counted(tmp_path: Path) -> None:
    """30 of 100 right answers are lost and 5 of 100 wrong ones learned: -12.5 points of 200 questions."""
    after = [list(row) for row in HALF]
    for i in range(30):
        after[2 * i] = [0.0]
    for i in range(5):
        after[2 * i + 1] = [1.0]
    base = write_folder(tmp_path / "base", {"sums": ("math", HALF)})
    model = write_folder(tmp_path / "model", {"sums": ("math", after)})
    report = compare(base, [model])
    line = _line(report, "sums")
    assert (line.base, line.model, line.change) == (0.5, 0.375, pytest.approx(-0.125))
    assert (line.gain, line.loss) == (pytest.approx(0.025), pytest.approx(0.15))
    expected = paired_difference([x for (x,) in HALF], [x for (x,) in after])
    assert (line.low, line.high, line.p_value) == (expected.low, expected.high, expected.p_value)
    assert line.verdict == LOST
    assert line.p_holm == line.p_value  # a single task
    items = line.items
    assert items is not None
    assert items.forgotten == [f"q{2 * i:03d}" for i in range(30)]
    assert items.learned == [f"q{2 * i + 1:03d}" for i in range(5)]
    assert items.by_chance == 17.5
    example = items.forgotten_examples[0]
    assert (example.id, example.gold, example.before, example.after) == ("q000", "0", 1.0, 0.0)
    assert (example.base_answer, example.model_answer) == ("It is 0.", "It is -1.")
    assert len(items.forgotten_examples) == 5
    # The other way round it is a gain of the same size.
    back = _line(compare(model, [base]), "sums")
    assert (back.verdict, back.change, back.low) == (GAINED, -line.change, pytest.approx(-line.high))


def test_questions_are_paired_by_id_and_not_by_place(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"sums": ("math", _outcomes(1))})
    model = write_folder(tmp_path / "model", {"sums": ("math", _outcomes(1))})
    file = model / SAMPLES / "sums.jsonl"
    lines = file.read_text().splitlines()
    random.Random(0).shuffle(lines)
    file.write_text("\n".join(lines) + "\n")
    line = _line(compare(base, [model]), "sums")
    assert (line.gain, line.loss, line.items and line.items.forgotten) == (0.0, 0.0, [])


def test_a_small_benchmark_without_a_change_is_not_kept(tmp_path: Path) -> None:
    """Nothing changed in 30 questions, but up to 11 % of such questions may have: no evidence of retention."""
    base = write_folder(tmp_path / "base", {"few": ("math", HALF[:30]), "many": ("math", HALF * 8)})
    model = write_folder(tmp_path / "model", {"few": ("math", HALF[:30]), "many": ("math", HALF * 8)})
    report = compare(base, [model])
    assert _line(report, "few").verdict == UNCLEAR
    assert _line(report, "few").detectable > 0.1
    assert _line(report, "many").verdict == KEPT
    assert _line(compare(base, [model], margin=0.12), "few").verdict == KEPT


def test_losses_of_held_out_text_turn_their_sign(tmp_path: Path) -> None:
    """A loss that rises by 0.05 is a change of -0.05; rows differ by much more than the model."""
    rng = np.random.default_rng(0)
    losses = rng.normal(3, 0.5, 100)
    worse = losses + 0.05 + rng.normal(0, 0.01, 100)
    base = write_folder(tmp_path / "base", {}, {"held_out_web": losses.tolist(), "held_out_code": losses.tolist()})
    model = write_folder(
        tmp_path / "model", {}, {"held_out_web": worse.tolist(), "held_out_code": (losses - 0.001).tolist()}
    )
    report = compare(base, [model])
    web, code = _line(report, "held_out_web"), _line(report, "held_out_code")
    assert web.change == pytest.approx(float((losses - worse).mean()))
    assert web.high - web.low == pytest.approx(2 * 1.984217 * (worse - losses).std(ddof=1) / 10, rel=1e-4)
    assert (web.verdict, code.verdict) == (LOST, KEPT)
    assert web.unit == "nats per token"
    assert {line.kind for line in report.models[0].lines} == {"task"}  # losses are not averaged
    assert web.gain - web.loss == pytest.approx(web.change)


def test_domains_and_averages(tmp_path: Path) -> None:
    tasks = {
        "sums": ("math", _outcomes(1)),
        "products": ("math", _outcomes(2, 100)),
        "quiz": ("science", _outcomes(3)),
        "needle": ("long_context", _outcomes(4, 50)),
    }
    changed = {name: (domain, _outcomes(9, len(rows), 0.4)) for name, (domain, rows) in tasks.items()}
    base, model = write_folder(tmp_path / "base", tasks), write_folder(tmp_path / "model", changed)
    report = compare(base, [model])
    names = [(line.kind, line.name) for line in report.models[0].lines]
    assert names == [
        ("task", "needle"),
        ("task", "sums"),
        ("task", "products"),
        ("task", "quiz"),
        ("domain", "math"),
        ("average", "domain_weighted"),
        ("average", "plain_mean"),
    ]
    pair = {
        name: tuple([x for (x,) in side[name][1]] for side in (tasks, changed)) for name in tasks if name != "needle"
    }
    groups: dict[str, Any] = {"math": [pair["sums"], pair["products"]], "science": [pair["quiz"]]}
    expected = domain_difference(groups)
    weighted = _line(report, "domain_weighted")
    assert (weighted.change, weighted.low, weighted.high) == (expected.estimate, expected.low, expected.high)
    of = {name: _line(report, name) for name in tasks}
    assert weighted.base == pytest.approx(((of["sums"].base + of["products"].base) / 2 + of["quiz"].base) / 2)
    assert weighted.change == pytest.approx(weighted.model - weighted.base)
    plain = _line(report, "plain_mean")
    assert plain.model == pytest.approx(np.mean([of[name].model for name in ("sums", "products", "quiz")]))
    assert _line(report, "math").change == pytest.approx((of["sums"].change + of["products"].change) / 2)
    assert weighted.gain - weighted.loss == pytest.approx(weighted.change)


def test_holm_counts_every_task_of_every_model(tmp_path: Path) -> None:
    tasks = {f"task{i}": ("math", _outcomes(i)) for i in range(4)}
    base = write_folder(tmp_path / "base", tasks)
    models = [
        write_folder(
            tmp_path / f"m{m}", {n: (d, _outcomes(50 + 7 * m + i)) for i, (n, (d, _)) in enumerate(tasks.items())}
        )
        for m in range(2)
    ]
    report = compare(base, models)
    lines = [line for model in report.models for line in model.lines if line.kind == "task"]
    smallest = min(lines, key=lambda line: line.p_value)
    assert smallest.p_holm == pytest.approx(min(1.0, 8 * smallest.p_value))
    assert all(line.p_holm is None for model in report.models for line in model.lines if line.kind != "task")
    assert "8 tasks were looked at together" in " ".join(report.notes)


def test_a_mean_over_samples_is_compared(tmp_path: Path) -> None:
    before, after = [[1, 1, 0, 0], [1, 1, 1, 1]] * 20, [[1, 0, 0, 0], [1, 1, 1, 1]] * 20
    base = write_folder(tmp_path / "base", {"sums": ("math", before)})
    model = write_folder(tmp_path / "model", {"sums": ("math", after)})
    line = _line(compare(base, [model]), "sums")
    assert (line.base, line.model, line.samples, line.questions) == (0.75, 0.625, 4, 40)
    assert line.items is not None
    assert line.items.forgotten == []  # 2 of 4 and 1 of 4 may well be equal


def test_a_metric_kept_by_name_counts_instead_of_the_answers(tmp_path: Path) -> None:
    def fold(name: str, values: list[float]) -> Path:
        folder = write_folder(tmp_path / name, {"arc": ("general", HALF[:20])})
        file = folder / SAMPLES / "arc.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text(
            "".join(json.dumps({**row, "metrics": {"acc_norm": v}}) + "\n" for row, v in zip(rows, values, strict=True))
        )
        evaluation = json.loads((folder / EVALUATION).read_text())
        evaluation["tasks"]["arc"]["metric"] = "acc_norm"
        (folder / EVALUATION).write_text(json.dumps(evaluation))
        return folder

    line = _line(compare(fold("base", [1.0] * 20), [fold("model", [1.0] * 15 + [0.0] * 5)]), "arc")
    assert (line.base, line.model) == (1.0, 0.75)
    assert line.items is not None
    assert len(line.items.forgotten) == 5


@pytest.mark.parametrize(("first", "second", "size"), [(3, 0, 3), (60, 40, 64), (5, 5, 8), (1, 0, 1), (64, 10, 64)])
def test_drop_p_is_the_hypergeometric_tail(first: int, second: int, size: int) -> None:
    total = first + second
    ways = [math.comb(size, i) * math.comb(size, total - i) for i in range(size + 1) if 0 <= total - i <= size]
    starts = max(0, total - size)
    assert drop_p(first, second, size) == pytest.approx(sum(ways[first - starts :]) / sum(ways))


def _items(before: list[list[float]], after: list[list[float]]) -> Any:
    return compare_items(questions(before), questions(after), "pass@1", 3)


def test_several_samples_forget_only_beyond_chance() -> None:
    found = _items([[1] * 8, [1] * 8, [1, 0] * 4, [0] * 8], [[1] * 7 + [0], [1, 1, 1] + [0] * 5, [0] * 8, [1] * 8])
    # 8 -> 7 is chance; 8 -> 3 has p = 0.013 and 4 -> 0 p = 0.038.
    assert found.forgotten == ["q001", "q002"]
    assert found.learned == ["q003"]
    assert [example.id for example in found.forgotten_examples] == ["q001", "q002"]


def test_two_samples_need_all_right_and_all_wrong() -> None:
    found = _items([[1, 1], [1, 1], [1, 0]], [[0, 0], [1, 0], [0, 0]])
    assert (found.forgotten, found.learned) == (["q000"], [])


def test_the_number_expected_by_chance_is_that_of_a_simulation() -> None:
    """Both models the same: as many are forgotten as expected, and as many learned. 3,000 questions x 8 samples."""
    rng = np.random.default_rng(1)
    p = rng.beta(0.7, 0.7, size=3000)
    before, after = ((rng.random((3000, 8)) < p[:, None]).astype(float).tolist() for _ in range(2))
    found = _items(before, after)
    assert found.by_chance > 20
    for changed in (found.forgotten, found.learned):
        assert len(changed) == pytest.approx(found.by_chance, abs=4 * math.sqrt(found.by_chance))


def test_long_prompts_are_cut_in_the_middle() -> None:
    old = questions([[1.0]])
    long = [dataclasses.replace(old[0], prompt="a" * 5000 + "the end")]
    new = [dataclasses.replace(questions([[0.0]])[0], prompt=long[0].prompt)]
    shown = compare_items(long, new, "pass@1", 1).forgotten_examples[0].prompt
    assert shown.startswith("aaa")
    assert shown.endswith("the end")
    assert len(shown) < 700


def _changed(folder: Path, **values: Any) -> None:
    evaluation = json.loads((folder / EVALUATION).read_text())
    (folder / EVALUATION).write_text(json.dumps({**evaluation, **values}))


def test_unlike_evaluations_are_refused_with_all_that_differs(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"sums": ("math", HALF), "quiz": ("science", HALF)})
    other = {**SETTINGS, "engine": "vllm", "sampling": {"temperature": 1.0, "seed": 0}}
    model = write_folder(tmp_path / "model", {"sums": ("math", HALF[:-2])}, split="validation", settings=other)
    with pytest.raises(InputError) as refused:
        compare(base, [model])
    message = str(refused.value)
    for part in (
        "split: test and validation",
        "setting engine: megatron and vllm",
        "setting sampling.temperature: 0.6 and 1.0",
        "task quiz: only in",
        "task sums: 2 questions are in one of them only, such as q198",
    ):
        assert part in message
    assert "seed" not in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gold": "x"}, "the right answer of 1 questions, such as q000"),
        ({"prompt": "x"}, "the prompt of 1 questions, such as q000"),
        ({"answers": []}, "has no answers and no value of pass@1"),
        ({"id": "q001"}, "holds a question twice"),
        ({"split": "validation"}, "199 questions of split test, where evaluation.json counts 200"),
    ],
)
def test_questions_that_are_not_the_same_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"sums": ("math", HALF)})
    model = write_folder(tmp_path / "model", {"sums": ("math", HALF)})
    file = model / SAMPLES / "sums.jsonl"
    first, *rest = file.read_text().splitlines()
    file.write_text("\n".join([json.dumps({**json.loads(first), **change}), *rest]) + "\n")
    with pytest.raises(InputError, match=message):
        compare(base, [model])


def test_what_may_differ_is_marked(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"sums": ("math", HALF), "quiz": ("math", HALF)}, marks=["a mark"])
    model = write_folder(
        tmp_path / "model", {"sums": ("math", HALF)}, settings={**SETTINGS, "sampling": {"temperature": 1, "seed": 9}}
    )
    report = compare(base, [model], may_differ=["sampling", "tasks"])
    assert report.marks == [
        "base: a mark",
        "model and base differ: setting sampling.seed: 0 and 9",
        "model and base differ: setting sampling.temperature: 0.6 and 1",
        f"model and base differ: task quiz: only in {base}",
    ]
    assert [line.name for line in report.models[0].lines] == ["sums"]
    with pytest.raises(InputError, match=r"sampling\.seed"):
        compare(base, [model], may_differ=["sampling.temperature", "tasks"])


def test_models_of_one_name_are_told_apart(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"sums": ("math", HALF)})
    models = [write_folder(tmp_path / run / "eval", {"sums": ("math", HALF)}) for run in ("a", "b")]
    names = [model.name for model in compare(base, models).models]
    assert names == [f"eval ({models[0]})", f"eval ({models[1]})"]


def test_models_are_evaluated_first(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"sums": ("math", HALF)})
    (tmp_path / "checkpoint").mkdir()
    asked = []

    def evaluate(path: Path) -> Path:
        asked.append(path)
        return write_folder(tmp_path / "evaluated", {"sums": ("math", HALF)})

    report = retention([base, tmp_path / "checkpoint"], evaluate, margin=0.05)
    assert asked == [tmp_path / "checkpoint"]
    assert (report.models[0].path, report.margin) == (str(tmp_path / "evaluated"), 0.05)
    with pytest.raises(InputError, match=r"holds no evaluation\.json"):
        retention([base, tmp_path / "checkpoint"])
    with pytest.raises(InputError, match="at least one model"):
        retention([base])


def test_bad_input_names_the_file(tmp_path: Path) -> None:
    base = write_folder(tmp_path / "base", {"sums": ("math", HALF)})
    for name, text, message in (
        ("half", '{"suite": "po', "is not an evaluation"),
        ("old", '{"format": 0}', "format 0"),
    ):
        broken = write_folder(tmp_path / name, {"sums": ("math", HALF)})
        (broken / EVALUATION).write_text(text)
        with pytest.raises(InputError, match=message):
            compare(base, [broken])
    torn = write_folder(tmp_path / "torn", {"sums": ("math", HALF)})
    with (torn / SAMPLES / "sums.jsonl").open("a") as file:
        file.write('{"id": "q1')
    with pytest.raises(InputError, match=r"sums.jsonl:201"):
        compare(base, [torn])
    (torn / SAMPLES / "sums.jsonl").unlink()
    with pytest.raises(InputError, match=r"sums.jsonl: cannot be read"):
        compare(base, [torn])
    for options in ({"margin": 0.0}, {"loss_margin": 0.0}, {"examples": -1}):
        with pytest.raises(InputError, match=r"margin|examples"):
            compare(base, [base], **options)  # type: ignore[arg-type]


@pytest.fixture
def report(tmp_path: Path) -> Retention:
    after = [[0.0] if i % 4 == 0 else row for i, row in enumerate(HALF)]
    losses = np.linspace(2, 4, 50)
    base = write_folder(
        tmp_path / "base", {"sums|x": ("math", HALF), "quiz": ("science", HALF)}, {"held_out_web": losses.tolist()}
    )
    model = write_folder(
        tmp_path / "model",
        {"sums|x": ("math", after), "quiz": ("science", HALF)},
        {"held_out_web": (losses + 0.5).tolist()},
        marks=["chosen on the test split"],
    )
    return compare(base, [model])


def test_the_table_has_a_verdict_on_every_line(report: Retention) -> None:
    console = Console(width=MIN_WIDTH, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(retention_view(report))
    text = capture.get()
    for line in report.models[0].lines:
        row = next(row for row in text.splitlines() if row.startswith(line.name))
        assert line.verdict in row
    sums = next(row for row in text.splitlines() if row.startswith("sums|x"))
    for part in ("50.00", "25.00", "-25.00", "lost *", "50 (25.0)", "0 (25.0)"):
        assert part in sums
    assert "chosen on the test split" in text
    web = next(row for row in text.splitlines() if row.startswith("held_out_web"))
    assert "-0.5000" in web


def test_markdown_and_json_say_the_same(report: Retention, tmp_path: Path) -> None:
    write_retention(report, tmp_path / "out" / "report")
    found = json.loads((tmp_path / "out" / "report" / "retention.json").read_text())
    assert found == json.loads(json.dumps(report.to_dict()))
    assert found["models"][0]["lines"][0]["verdict"] == report.models[0].lines[0].verdict
    text = (tmp_path / "out" / "report" / "retention.md").read_text()
    assert text == retention_markdown(report)
    assert "| sums\\|x | 50.00 | 25.00 | -25.00 |" in text
    assert "## Forgotten: sums\\|x, model" in text
    assert "    It is -1." in text
    assert "- model: chosen on the test split" in text


def test_no_text_of_a_model_leaves_its_block(report: Retention) -> None:
    hostile = "```\n# Heading\n| a |"
    line = _line(report, "sums|x")
    assert line.items is not None
    example = dataclasses.replace(line.items.forgotten_examples[0], model_answer=hostile)
    items = dataclasses.replace(line.items, forgotten_examples=[example])
    model = dataclasses.replace(report.models[0], lines=[dataclasses.replace(line, items=items)])
    text = retention_markdown(dataclasses.replace(report, models=[model]))
    assert "\n    ```\n    # Heading\n    | a |\n" in text
    assert "\n# Heading" not in text


def test_a_folder_reads_back_what_was_written(tmp_path: Path) -> None:
    folder = read_folder(write_folder(tmp_path / "base", {"sums": ("math", [[1, 0], [0, 1]])}))
    assert folder.questions["sums"] == questions([[1, 0], [0, 1]])
    assert isinstance(folder.questions["sums"][0], QuestionResult)
    assert folder.name == "base"
