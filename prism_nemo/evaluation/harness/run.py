"""Suite `retention`: what a model knew before a stage of training, asked through lm-eval, in our layout of results.

    OUT/harness/TASK.json          results of one lm-eval task, written when it is done; the same call goes on after it
    OUT/samples/BENCHMARK.jsonl    one line for each question
    OUT/evaluation.json            scores, written last

A benchmark whose questions cannot be had, or that fails, is left out with the reason in `Evaluation.marks`; it takes
none of the others' results with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.answering.store import SAMPLES, Store, write_evaluation, write_results
from prism_nemo.evaluation.engines.contract import EvaluationModel
from prism_nemo.evaluation.harness.tasks.table import RETENTION, Benchmark
from prism_nemo.evaluation.result import Answer, Evaluation, QuestionResult, TaskScore

if TYPE_CHECKING:
    from prism_nemo.evaluation.harness.model import PrismNemoLM
    from prism_nemo.evaluation.harness.tasks.loading import Leaf

T = TypeVar("T")
SUITE = "retention"


@dataclass(frozen=True)
class HarnessSettings:
    """What is asked of lm-eval.

    Attributes:
        tasks: Benchmarks of the suite, or tasks of `folder`; empty for the whole suite.
        data: Folder of files ``TASK/SPLIT.jsonl`` that go before the Hub.
        folder: Folder of lm-eval task files (YAML) that go before lm-eval's own.
        questions: At most so many of each task, the first ones; None for all.
        chat_template: Whether questions are put into the tokenizer's chat template.
        seed: Added to lm-eval's own seed of few-shot examples; 0 for the examples that everyone has.
    """

    tasks: tuple[str, ...] = ()
    data: Path | None = None
    folder: Path | None = None
    questions: int | None = None
    chat_template: bool = False
    seed: int = 0


@dataclass
class _Planned:
    """A benchmark with its tasks, or the reason why it cannot be asked."""

    benchmark: Benchmark
    leaves: list[Leaf]
    reason: str | None = None


def run_harness(
    model: EvaluationModel,
    settings: HarnessSettings,
    out: Path,
    about: dict[str, Any],
    say: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Ask a model the suite's questions; every rank of a parallel run calls this.

    Args:
        model: The model.
        settings: What to ask.
        out: Folder of the result; the work of an interrupted call is kept and not done again.
        about: For `Evaluation.model`: ``path``, ``kind``, ``hash``, ``name``. Results of another hash are not reused.
        say: Writes a line of progress.

    Returns:
        The evaluation, as written to OUT/evaluation.json.

    Raises:
        InputError: lm-eval is not installed, a benchmark is unknown, no benchmark's questions can be had, or the folder
            holds another evaluation.
        PrismError: No benchmark could be finished.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("suite retention needs lm-eval: pip install 'prism-nemo[eval]'")
    if settings.questions is not None and settings.questions < 1:
        raise InputError(f"questions: {settings.questions} must be at least 1")
    from prism_nemo.evaluation.harness.model import PrismNemoLM

    plan = _plan(settings, say)
    lm = PrismNemoLM(model)
    identity = {**_described(lm, settings), "model": about.get("hash"), "benchmarks": [p.benchmark.name for p in plan]}
    with contextlib.ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(Store(out, identity, {"suite": SUITE}))

        _on_main(begin)
        scores, marks = _scores(lm, plan, settings, out, about, say)
        if settings.questions is not None:
            marks.append(f"only the first {settings.questions} questions of each task were asked")
        evaluation = Evaluation(
            suite=SUITE,
            split="test",
            model=about,
            settings=_described(lm, settings),
            tasks=scores,
            averages=_averages(scores),
            marks=marks,
        )
        _on_main(lambda: write_evaluation(out, evaluation))
    return evaluation


def _scores(
    lm: PrismNemoLM,
    plan: list[_Planned],
    settings: HarnessSettings,
    out: Path,
    about: dict[str, Any],
    say: Callable[[str], None],
) -> tuple[dict[str, TaskScore], list[str]]:
    """Scores of what could be measured, and what is to be said of the rest.

    Raises:
        PrismError: Nothing could be measured.
    """
    from prism_nemo.evaluation.harness.tasks.scores import counted_questions, task_score

    scores: dict[str, TaskScore] = {}
    marks: list[str] = []
    for number, planned in enumerate(plan, 1):
        benchmark, leaves = planned.benchmark, {}
        for leaf in planned.leaves:
            say(f"{benchmark.name} ({number} of {len(plan)}): {leaf.name}, {len(leaf.docs)} questions")
            try:
                leaves[leaf.name] = _leaf_results(lm, leaf, benchmark, settings, out, about)
            except Exception as error:  # whatever one task's own code raises must not lose the others
                planned.reason = f"{leaf.name} failed: {_told(error)}"
                break
        if planned.reason is not None:
            marks.append(f"{benchmark.name}: not measured: {planned.reason}")
            say(marks[-1])
            continue
        shots = int(planned.leaves[0].task.config.num_fewshot or 0)
        scores[benchmark.name] = task_score(benchmark, leaves, shots)
        file, results = out / SAMPLES / f"{benchmark.name}.jsonl", counted_questions(benchmark, leaves)
        _on_main(partial(write_results, file, results))
    if not scores:
        raise PrismError("no benchmark could be finished: " + "; ".join(marks))
    return scores, marks


def _plan(settings: HarnessSettings, say: Callable[[str], None]) -> list[_Planned]:
    """All questions of all benchmarks, read before any is asked.

    Raises:
        InputError: None of them can be had, or the settings are wrong.
    """
    from prism_nemo.evaluation.harness.tasks.loading import choose_benchmarks, leaf_names, load_leaf, task_manager

    if settings.data is not None and not settings.data.is_dir():
        raise InputError(f"{settings.data}: is not a folder")
    benchmarks = choose_benchmarks(settings.tasks, settings.folder)
    manager = task_manager(benchmarks, settings.folder)
    plan = []
    for benchmark in benchmarks:
        planned = _Planned(benchmark, [])
        try:
            for name in (leaf for task in benchmark.tasks for leaf in leaf_names(manager, task)):
                leaf = load_leaf(manager, name, benchmark.shots, settings.data, settings.seed)
                leaf.docs = leaf.docs[: settings.questions]
                planned.leaves.append(leaf)
        except InputError as error:
            planned.reason, planned.leaves = str(error), []
            say(f"{benchmark.name} will not be measured: {error}")
        plan.append(planned)
    if not any(planned.leaves for planned in plan):
        raise InputError("no benchmark can be asked: " + "\n".join(planned.reason or "" for planned in plan))
    return plan


def _leaf_results(
    lm: PrismNemoLM,
    leaf: Leaf,
    benchmark: Benchmark,
    settings: HarnessSettings,
    out: Path,
    about: dict[str, Any],
) -> list[QuestionResult]:
    """Results of one task: kept ones if nothing changed since, else the model is asked."""
    file = out / "harness" / f"{leaf.name}.json"
    key = {**_described(lm, settings), "model": about.get("hash"), "questions_sha256": leaf.digest}
    kept = _on_main(lambda: _kept(file, key))
    if kept is not None:
        return kept
    asked = _ask(lm, leaf, settings)

    def finish() -> list[QuestionResult]:
        from prism_nemo.evaluation.harness.tasks.samples import question_results

        if asked is None:
            raise PrismError("lm-eval gave no results on the first rank")
        results = question_results(
            leaf,
            benchmark,
            asked["samples"][leaf.name],
            asked["results"][leaf.name],
            lambda text: len(lm.model.tokenizer.encode(text)),
            lm.was_cut,
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [dataclasses.asdict(result) for result in results]
        write_text(file, json.dumps({"key": key, "questions": rows}, ensure_ascii=False))
        return results

    return _on_main(finish)


def _ask(lm: PrismNemoLM, leaf: Leaf, settings: HarnessSettings) -> dict[str, Any] | None:
    """What lm-eval logs and sums up. Not by `simple_evaluate`, which lists all installed packages after each task."""
    from lm_eval.evaluator import evaluate

    return evaluate(
        lm=lm,
        task_dict={"tasks": {leaf.name: leaf.task}, "groups": {}},
        limit=settings.questions,
        bootstrap_iters=0,
        log_samples=True,
        apply_chat_template=settings.chat_template,
        fewshot_as_multiturn=settings.chat_template,
    )


def _described(lm: PrismNemoLM, settings: HarnessSettings) -> dict[str, Any]:
    """Whatever decides the answers, beside the weights and the questions."""
    import lm_eval

    return {
        "lm_eval": lm_eval.__version__,
        "engine": lm.model.engine,
        "max_length": lm.max_length,
        "tokenizer_sha256": lm.model.tokenizer.sha256,
        "chat_template": settings.chat_template,
        "questions": settings.questions,
        "seed": settings.seed,
    }


def _kept(file: Path, key: dict[str, Any]) -> list[QuestionResult] | None:
    """Results that an earlier call wrote under the same conditions."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["key"] != key:
            return None
        return [
            QuestionResult(**{**row, "answers": [Answer(**answer) for answer in row["answers"]]})
            for row in content["questions"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or of another version: ask again


def _averages(scores: dict[str, TaskScore]) -> dict[str, dict[str, Any]]:
    """Each leaderboard's own average, where all of its six benchmarks are there."""
    from prism_nemo.evaluation.harness.tasks.scores import averaged
    from prism_nemo.evaluation.statistics.intervals import Interval

    found = {}
    for board in (1, 2):
        names = [name for name, benchmark in RETENTION.items() if benchmark.board == board]
        if all(name in scores for name in names):
            parts = [scores[name].details["leaderboard"] for name in names]
            mean = averaged([Interval(part["score"], part["low"], part["high"]) for part in parts])
            found[f"open_llm_leaderboard_{board}"] = {
                **dataclasses.asdict(mean),
                "of": names,
                "scale": "0 to 100" + (", normalised against chance" if board == 2 else ""),
            }
    return found


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, PrismError) else f"{type(error).__name__}: {error}"


def _on_main(action: Callable[[], T]) -> T:
    """Do something on the first rank only; its result, or its error, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome = [action(), None]
        except Exception as error:
            outcome = [None, PrismError(_told(error))]
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
