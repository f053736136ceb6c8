"""What an evaluation is asked to do, and what can be refused of it before a model is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from prism_nemo.config import ParallelConfig, RewardConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.question import AskedSampling
from prism_nemo.rl.rewards.judge import check_rewards

SPLITS = ("validation", "test")
_OURS = ("reasoning", "pocket", "longcontext", "FILE.jsonl")
# Suites that an option means something to; lm-eval's tasks (retention) bring their own sampling.
_ONLY = {
    "data": ("reasoning", "pocket", "retention"),
    "elicit": _OURS,
    "choose_on_test": _OURS,
    "samples": _OURS,
    "temperature": _OURS,
    "top_p": _OURS,
    "max_new_tokens": _OURS,
    "cache": _OURS,
    "held_out": ("pocket",),
    "lengths": ("longcontext",),
    "text": ("longcontext",),
    "task_folder": ("retention",),
}
_REPEATED = ("tasks", "formats", "lengths")


def ungated() -> RewardConfig:
    """Rewards without the form that reinforcement learning asks for: an answer is read wherever it stands."""
    return RewardConfig(gate="none")


@dataclass(frozen=True)
class EvaluateConfig:
    """One evaluation of one model.

    Attributes:
        model: Native checkpoint or Hugging Face folder.
        out: Folder of the result; the same command goes on with one that was interrupted.
        suite: ``reasoning``, ``pocket``, ``longcontext``, ``retention`` (by lm-eval), or a file of questions
            (``.jsonl``, also ``.gz`` and ``.zst``).
        split: validation or test.
        tasks: Only these of the suite; empty for all. For ``pocket`` any task that `task_named` knows, for
            ``longcontext`` kinds of questions.
        data: Folder of question files (``reasoning``, ``retention``), or of built data (``pocket``, for held-out text).
        questions: At most so many of each task, the same for every model; None for all (``pocket``: 512,
            ``longcontext``: 50).
        formats: Prompt formats, see `answering.formats`. One is used as it is; of several the best is chosen. Empty for
            the first one of each task.
        elicit: Choose among all formats of each task, where `formats` names none.
        choose_on_test: Allow the choice to be made on the test split; the result is marked.
        samples: Answers to each question; None for the suite's, as for the next three.
        temperature: 0 for greedy.
        top_p: Mass of the nucleus.
        max_new_tokens: Longest answer.
        seed: Of sampling, and of the questions of procedural tasks.
        engine: megatron, transformers or vllm.
        tokenizer: Folder; None for the one beside the model.
        bos: Whether prompts begin with the tokenizer's first special token; None for as the tokenizer itself does it.
        batch: Answers between two saves.
        cache: Folder of answers that other evaluations of the same model may reuse; None for none.
        held_out: Held-out sources (``pocket``); empty for all sources of weight 0 in `data`.
        held_out_rows: Rows of each.
        seq_length: Tokens of a row.
        lengths: Of the texts of ``longcontext``, in tokens; empty for 4k to 128k.
        text: File whose sentences fill them; None for built-in ones.
        task_folder: Folder of lm-eval task files that go before lm-eval's own (``retention``).
        rewards: How answers are judged.
        parallel: Layout of the model.
    """

    model: str
    out: str
    suite: str = "reasoning"
    split: str = "test"
    tasks: tuple[str, ...] = ()
    data: str | None = None
    questions: int | None = None
    formats: tuple[str, ...] = ()
    elicit: bool = False
    choose_on_test: bool = False
    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    seed: int = 0
    engine: str = "megatron"
    tokenizer: str | None = None
    bos: bool | None = None
    batch: int = 256
    cache: str | None = None
    held_out: tuple[str, ...] = ()
    held_out_rows: int = 256
    seq_length: int = 128
    lengths: tuple[int, ...] = ()
    text: str | None = None
    task_folder: str | None = None
    rewards: RewardConfig = field(default_factory=ungated)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def sampling(self, suite: AskedSampling) -> AskedSampling:
        """The suite's sampling with what was asked for instead."""
        asked = {name: getattr(self, name) for name in ("samples", "temperature", "top_p", "max_new_tokens")}
        return dataclasses.replace(suite, **{name: value for name, value in asked.items() if value is not None})


def check_settings(settings: EvaluateConfig) -> None:
    """Refuse what can be refused without looking at questions or model.

    Raises:
        InputError: Naming the option.
    """
    if settings.split not in SPLITS:
        raise InputError(f"--split '{settings.split}' is unknown; choose one of {', '.join(SPLITS)}")
    for name in ("questions", "samples", "max_new_tokens", "batch", "held_out_rows", "seq_length"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{_option(name)} {value} must be at least 1")
    if settings.temperature is not None and not (math.isfinite(settings.temperature) and settings.temperature >= 0):
        raise InputError(f"--temperature {settings.temperature} is not 0 (greedy) or a positive number")
    if settings.top_p is not None and not 0 < settings.top_p <= 1:
        raise InputError(f"--top-p {settings.top_p} is not above 0 and at most 1 (1 for every token)")
    for name in ("tasks", "formats", "held_out"):
        repeated = _repeated(getattr(settings, name))
        if repeated:
            raise InputError(f"{_option(name)}: '{repeated}' is named twice")
    _check_meaning(settings)
    check_rewards(settings.rewards)


def _check_meaning(settings: EvaluateConfig) -> None:
    """Refuse options that the suite would not look at.

    Raises:
        InputError: Naming the option and what it is for.
    """
    suite = settings.suite if settings.suite in ("reasoning", "pocket", "longcontext", "retention") else "FILE.jsonl"
    for field_ in dataclasses.fields(settings):
        suites = _ONLY.get(field_.name)
        if suites and suite not in suites and getattr(settings, field_.name) != field_.default:
            raise InputError(f"{_option(field_.name)}: says nothing to suite {suite}; it is for {', '.join(suites)}")
    if suite == "retention" and settings.formats not in ((), ("chat",)):
        raise InputError("--format: suite retention has lm-eval's own prompts; only chat may be asked for")


def check_sampling(name: str, sampling: AskedSampling) -> None:
    """Refuse more than one greedy answer to a question: they would all be the same.

    Raises:
        InputError: Naming the task.
    """
    if sampling.temperature == 0 and sampling.samples > 1:
        raise InputError(
            f"{name}: temperature 0 gives the same answer {sampling.samples} times; use --samples 1 or a temperature"
        )


def _option(name: str) -> str:
    return f"--{name.removesuffix('s') if name in _REPEATED else name.replace('_', '-')}"


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
