"""Evaluation while a stage trains: it changes nothing, finds what an evaluation finds, and goes on after a stop."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from evaluation_workers import direct_loss
from in_training_workers import midtrain_with_a_process_that_fails, rl_train, what_is_put_back
from tiny_training import LAYOUTS, build_data, midtrain_config, numbers, write_llama
from training_workers import midtrain_interrupted

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.native import step_directory
from prism_nemo.config import (
    GRPOConfig,
    InTrainingConfig,
    MidtrainConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    RLConfig,
    RolloutConfig,
)
from prism_nemo.errors import InputError, StoppedEarly
from prism_nemo.evaluation.in_training import process as in_training_process
from prism_nemo.evaluation.in_training.evaluator import PREFIX
from prism_nemo.evaluation.in_training.process import CheckpointEvaluation
from prism_nemo.evaluation.in_training.suite import Suite, resolve_suite
from prism_nemo.models.family import architecture_from_hf
from prism_nemo.run import RunDirectory
from prism_nemo.runtime.launch import launch
from prism_nemo.training.midtrain import check, midtrain

TASKS = ["arithmetic", "lists"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("in-training")
    build_data(folder)
    import_hf(write_llama(folder / "hf"), folder / "initial", ParallelConfig())
    return folder


def _asked(**changes: Any) -> InTrainingConfig:
    values: dict[str, Any] = {
        "every": 4,
        "sources": ["held"],
        "rows": 9,
        "tasks": TASKS,
        "questions": 9,
        "max_new_tokens": 12,
    }
    return InTrainingConfig(**{**values, **changes})


def _config(
    root: Path, run_dir: Path, layout: str = "TP1", evaluation: InTrainingConfig | None = None
) -> MidtrainConfig:
    config = midtrain_config(run_dir, root / "tokens", root / "initial", parallel=LAYOUTS[layout])
    config.evaluation = evaluation or InTrainingConfig()
    return config


def _run(config: MidtrainConfig) -> Path:
    launch(midtrain, config, processes=config.parallel.world_size)
    return Path(config.run_dir)


def _evaluated(run_dir: Path) -> dict[int, dict[str, float]]:
    return {line["step"]: line for line in numbers(run_dir) if any(name.startswith(PREFIX) for name in line)}


def _trained(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in numbers(run_dir) if not any(name.startswith(PREFIX) for name in line)]


@pytest.fixture(scope="module")
def evaluated(root: Path) -> Path:
    """A run of ten steps that was evaluated before them, after steps 4 and 8, and at the end."""
    return _run(_config(root, root / "evaluated", evaluation=_asked()))


def test_training_does_not_notice(root: Path, evaluated: Path) -> None:
    """Every number of every line is equal, bit for bit."""
    plain = _run(_config(root, root / "plain"))
    assert _evaluated(plain) == {}
    assert _trained(evaluated) == numbers(plain)
    assert sorted(_evaluated(evaluated)) == [0, 4, 8, 10]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["TP2 SP", "PP2", "DP2 overlap", "CP2"])
def test_training_does_not_notice_in_any_layout(layout: str, root: Path, evaluated: Path, tmp_path: Path) -> None:
    """And the losses are those that one process finds, up to the rounding of other layouts."""
    tasks = {} if layout != "CP2" else {"tasks": []}
    found = _run(_config(root, tmp_path / "evaluated", layout, _asked(**tasks)))
    assert _trained(found) == numbers(_run(_config(root, tmp_path / "plain", layout)))
    alone, here = _evaluated(evaluated), _evaluated(found)
    assert sorted(here) == [0, 4, 8, 10]
    for step, line in here.items():
        assert line["eval/loss/held"] == pytest.approx(alone[step]["eval/loss/held"], abs=1e-5)
        assert ("eval/accuracy/lists" in line) == (layout != "CP2")


def test_losses_are_those_of_the_checkpoints(root: Path, evaluated: Path) -> None:
    lines = _evaluated(evaluated)
    for step, checkpoint in ((0, root / "initial"), (8, step_directory(evaluated / "checkpoints", 8))):
        expected = launch(direct_loss, str(checkpoint), str(root / "tokens"), "held", 9, 32)
        # Two summation orders of fp32 losses of size 5: rounding of 1e-6.
        assert lines[step]["eval/loss/held"] == pytest.approx(expected, abs=5e-6)
    assert lines[10]["eval/loss/held"] < lines[0]["eval/loss/held"] - 0.5


def test_accuracies_have_their_interval_and_form(evaluated: Path) -> None:
    for line in _evaluated(evaluated).values():
        for task in TASKS:
            low, share, high = (line[f"eval/{name}/{task}"] for name in ("accuracy_low", "accuracy", "accuracy_high"))
            assert 0 <= low <= share <= high <= 1
            assert high - low > 0.1  # nine questions say little
            assert 1 <= line[f"eval/length/{task}"] <= 12
            assert 0 <= line[f"eval/form/{task}"] <= 1


def test_a_stopped_run_goes_on_with_the_same_curves(root: Path, evaluated: Path, tmp_path: Path) -> None:
    config = _config(root, tmp_path / "run", evaluation=_asked())
    with pytest.raises(StoppedEarly):
        launch(midtrain_interrupted, config, 5, "stop", processes=1)
    assert sorted(_evaluated(tmp_path / "run")) == [0, 4]
    _run(config)
    assert numbers(tmp_path / "run") == numbers(evaluated)


def test_a_process_finds_what_the_ranks_find(root: Path, evaluated: Path, tmp_path: Path) -> None:
    """Of the last checkpoint; training's own numbers are those of a run without."""
    run_dir = _run(_config(root, tmp_path / "run", evaluation=_asked(mode="process", every=10, wait_seconds=120.0)))
    assert _trained(run_dir) == _trained(evaluated)
    found, expected = _evaluated(run_dir), _evaluated(evaluated)
    assert list(found) == [10]
    for step, line in found.items():
        assert line["eval/loss/held"] == pytest.approx(expected[step]["eval/loss/held"], abs=5e-6)
        for task in TASKS:
            assert line[f"eval/accuracy/{task}"] == expected[step][f"eval/accuracy/{task}"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(run_dir) in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
def test_a_process_that_fails_is_a_warning(root: Path, tmp_path: Path) -> None:
    config = _config(root, tmp_path / "run", evaluation=_asked(mode="process", every=10, wait_seconds=120.0))
    result = launch(midtrain_with_a_process_that_fails, config)
    assert result["step"] == 10
    assert _evaluated(tmp_path / "run") == {}
    (said,) = result["said"]
    assert said.startswith("step 10: its evaluation failed (exit code 1): ")
    assert "/nowhere/tokenizer: no such file" in said


def test_reinforcement_learning_does_not_notice(root: Path, tmp_path: Path) -> None:
    def run(name: str, evaluation: InTrainingConfig) -> Path:
        config = RLConfig(
            run_dir=str(tmp_path / name),
            init_from=str(root / "initial"),
            tokenizer=str(root / "tokenizer"),
            tasks=["arithmetic"],
            rollout=RolloutConfig(group_size=2, prompts_per_step=2, max_new_tokens=8),
            grpo=GRPOConfig(kl_beta=0.0),
            optimizer=OptimizerConfig(lr=1e-3, adam_eps=1e-4),
            train_steps=2,
            micro_batch_size=2,
            evaluation=evaluation,
        )
        launch(rl_train, config)
        return Path(config.run_dir)

    plain = run("plain", InTrainingConfig())
    found = run("evaluated", _asked(every=1, data=str(root / "tokens"), seq_length=32))
    assert _trained(found) == numbers(plain)
    assert sorted(_evaluated(found)) == [0, 1, 2]
    expected = launch(direct_loss, str(root / "initial"), str(root / "tokens"), "held", 9, 32)
    assert _evaluated(found)[0]["eval/loss/held"] == pytest.approx(expected, abs=5e-6)


def test_generators_and_modes_are_put_back() -> None:
    found = launch(what_is_put_back)
    assert found["before"] == found["after"] == found["failed"]
    assert found["inside"] == [False, False, False]
    assert found["modes"] == [True, True, False]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"every": -1}, "evaluation.every: -1"),
        ({"mode": "thread"}, "evaluation.mode: 'thread' is unknown; choose one of ranks, process"),
        ({"rows": 0}, "evaluation.rows: 0"),
        ({"questions": 0}, "evaluation.questions: 0"),
        ({"max_new_tokens": 0}, "evaluation.max_new_tokens: 0"),
        ({"sources": [], "tasks": []}, "names neither sources nor tasks"),
        ({"sources": ["hold"]}, "no source is called 'hold'"),
        ({"seq_length": 65}, "evaluation.seq_length: 65 must lie in 1 to the model's 64"),
        ({"tasks": ["sums"]}, "'sums' is unknown"),
        ({"tasks": ["prompts:/nowhere.jsonl"]}, "/nowhere.jsonl"),
        ({"tokenizer": "/nowhere"}, "/nowhere: no such file"),
        ({"temperature": -1.0}, "evaluation.temperature: -1.0"),
        ({"gate": "gate"}, "evaluation.gate: 'gate' is unknown; choose one of think, none"),
        ({"max_new_tokens": 60}, "leaves 4 of the model's 64 positions"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(changes: dict[str, Any], message: str, root: Path) -> None:
    config = _config(root, root / "refused", evaluation=_asked(**changes))
    with pytest.raises(InputError, match=message):
        check(config)
    config.evaluation.every = 0
    check(config)  # nothing is looked at where nothing is to be evaluated


def test_layouts_that_cannot_answer_are_sent_to_the_process(root: Path) -> None:
    architecture = architecture_from_hf(json.loads((root / "hf" / "config.json").read_text()), "hf")
    known = {"data": str(root / "tokens"), "seq_length": 32, "tokenizer": str(root / "tokenizer")}

    def suite(parallel: ParallelConfig, fp8: bool = False, **changes: Any) -> Suite | None:
        return resolve_suite(_asked(**changes), architecture, parallel, fp8=fp8, **known)  # type: ignore[arg-type]

    shared, virtual = LAYOUTS["CP2"], LAYOUTS["PP2 VPP2"]
    for parallel, fp8 in ((shared, False), (ParallelConfig(), True)):
        with pytest.raises(InputError, match="mode=process"):
            suite(parallel, fp8)
        assert suite(parallel, fp8, tasks=[]) is not None
        assert suite(parallel, fp8, mode="process") is not None
    with pytest.raises(InputError, match="mode=process"):
        suite(virtual, tasks=[])
    with pytest.raises(InputError, match="must be a multiple of the 2 ranks"):
        suite(shared, tasks=[], seq_length=31)
    with pytest.raises(InputError, match="name the tokenizer"):
        resolve_suite(_asked(), architecture, ParallelConfig(), known["data"], 32)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"evaluation\.data"):
        resolve_suite(_asked(), architecture, ParallelConfig(), tokenizer=str(root / "tokenizer"))
    assert resolve_suite(_asked(every=0, rows=0), architecture, ParallelConfig()) is None
    assert PrecisionConfig().fp8 == "off"


class Child:
    """A process that ends when it is told to."""

    def __init__(self, command: list[str], **_: Any) -> None:
        self.request, self.returncode = json.loads(command[-1]), None
        self.ended: list[str] = []
        started.append(self)

    def poll(self) -> int | None:
        """See `subprocess.Popen`."""
        return self.returncode

    def succeed(self, **values: float) -> None:
        """End with a result."""
        Path(self.request["result"]).write_text(json.dumps(values))
        self.returncode = 0

    def terminate(self) -> None:
        """See `subprocess.Popen`."""
        self.ended.append("terminate")

    def kill(self) -> None:
        """See `subprocess.Popen`."""
        self.ended.append("kill")

    def wait(self, timeout: float | None = None) -> None:
        """See `subprocess.Popen`."""
        if timeout is not None and "kill" not in self.ended:
            raise subprocess.TimeoutExpired("child", timeout)


started: list[Child] = []


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[CheckpointEvaluation, list[str]]]:
    """Makes an evaluation of a run whose checkpoints are named by `latest`, and what it said."""
    started.clear()
    monkeypatch.setattr(in_training_process.subprocess, "Popen", Child)
    run = RunDirectory(tmp_path)
    newest: list[int] = []

    def find(checkpoints: Path) -> Path | None:
        return step_directory(checkpoints, newest[-1]) if newest else None

    monkeypatch.setattr(in_training_process, "find_latest", find)

    def make(step: int = 0, every: int = 10) -> tuple[CheckpointEvaluation, list[str]]:
        said: list[str] = []
        suite = Suite(None, [], 1, 1, ["arithmetic"], 1, 1, 0.0, "think", "tokenizer")
        config = InTrainingConfig(every=every, mode="process", tasks=["arithmetic"], wait_seconds=0.0)
        return CheckpointEvaluation(config, suite, run, step, said.append), said

    make.newest = newest  # type: ignore[attr-defined]
    return make


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_checkpoint_at_a_time_the_newest_that_is_due(process: Any, tmp_path: Path) -> None:
    evaluation, said = process()
    evaluation.poll()
    assert started == []
    process.newest.append(9)  # saved between two evaluations
    evaluation.poll()
    assert started == []
    process.newest.append(10)
    evaluation.poll()
    evaluation.poll()
    assert [child.request["step"] for child in started] == [10]
    process.newest += [20, 30]
    evaluation.poll()
    assert len(started) == 1
    started[0].succeed(**{"eval/loss/web": 2.0})
    evaluation.poll()
    assert [child.request["step"] for child in started] == [10, 30]
    assert _steps(tmp_path) == [10]
    started[1].returncode = 3
    evaluation.poll()
    assert _steps(tmp_path) == [10]
    assert len(started) == 2  # not tried again
    assert "step 30: its evaluation failed (exit code 3): without a word" in said[-1]


def test_the_last_checkpoint_is_due_at_the_end(process: Any, tmp_path: Path) -> None:
    evaluation, said = process()
    process.newest.append(7)
    evaluation.poll()
    assert started == []
    evaluation.finish(lambda _: None)
    assert started[0].request["step"] == 7
    evaluation.close()
    assert started[0].ended == ["terminate", "kill"]
    assert said == ["the evaluation of step 7 was not finished; `prism-nemo eval` can do it"]
    evaluation.close()


def test_results_of_a_killed_run_are_kept_and_later_ones_forgotten(process: Any, tmp_path: Path) -> None:
    evaluation, _ = process()
    for step in (10, 20, 30):
        process.newest.append(step)
        evaluation.poll()
        started[-1].succeed(**{"eval/loss/web": float(step)})
    evaluation.poll()
    assert _steps(tmp_path) == [10, 20, 30]
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "eval/loss/web": 10.0}\n')
    again, _ = process(step=20)  # the run goes on from step 20; the line of step 20 was lost
    assert _steps(tmp_path) == [10, 20]
    assert sorted(p.name for p in (tmp_path / "evaluations").glob("*.json")) == [
        "step_00000010.json",
        "step_00000020.json",
    ]
    again.poll()
    assert started[-1].request["step"] == 30  # its checkpoint is the newest: it is evaluated anew


def test_a_rollback_ends_the_evaluation_of_what_is_left_out(process: Any) -> None:
    evaluation, _ = process()
    process.newest.append(20)
    evaluation.poll()
    evaluation.rewind(20)
    assert started[0].ended == []
    evaluation.rewind(10)
    assert started[0].ended == ["terminate", "kill"]
    evaluation.poll()
    assert len(started) == 2
