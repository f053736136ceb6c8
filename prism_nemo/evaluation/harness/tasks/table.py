"""Suite `retention`: the twelve benchmarks of the two Open LLM Leaderboards, asked as those asked them.

Sources, one for each column:
- leaderboard 1 (few-shot counts, metrics): the archived leaderboard's own page, "About", at
  huggingface.co/docs/leaderboards/open_llm_leaderboard/archive; its scores are raw and its average is their mean;
- leaderboard 2: lm_eval/tasks/leaderboard/README.md and its YAML files, which were made for it and are kept as they
  were; scores are normalised, see huggingface.co/docs/leaderboards/open_llm_leaderboard/normalization: 0 at chance or
  below, 100 for all right; BBH and MuSR are normalised by subtask and then averaged. Its IFEval score is the mean of
  strict accuracy over prompts and over instructions (published 25.19 for Llama-2-7b-hf: mean of 18.48 and 31.89).
- chance: one in the number of options; the leaderboard's own numbers where it names them (10 options for MMLU-Pro,
  although a sixth of its questions have fewer).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Benchmark:
    """One benchmark and how it is asked.

    Attributes:
        name: Ours.
        board: Which Open LLM Leaderboard defines it: 1 or 2; 0 for none.
        domain: math, science or general: what a domain-weighted average is taken over.
        tasks: lm-eval's names of tasks, tags or groups.
        folder: Where lm-eval keeps their files, below ``lm_eval/tasks``; empty for tasks of the user's own.
        shots: Examples before each question; None for what the task's file says.
        metric: lm-eval's name of the value that counts.
        filter: lm-eval's name of the rule that reads the answer.
        chance: What guessing scores; "options" for one in the number of options; None where it is not known.
        subtask_chance: The same by task, where the leaderboard names it.
        by_subtask: The leaderboard's score is the mean over tasks, not over questions.
        counted: Tasks whose questions make the estimate; empty for all. The others go into the board's score only.
    """

    name: str
    board: int
    domain: str
    tasks: tuple[str, ...]
    folder: str
    shots: int | None
    metric: str
    filter: str = "none"
    chance: float | Literal["options"] | None = None
    subtask_chance: Mapping[str, float] = field(default_factory=dict)
    by_subtask: bool = False
    counted: tuple[str, ...] = ()


_ALL = (
    Benchmark("arc_challenge", 1, "science", ("arc_challenge",), "arc", 25, "acc_norm", chance=0.25),
    Benchmark("hellaswag", 1, "general", ("hellaswag",), "hellaswag", 10, "acc_norm", chance=0.25),
    # The leaderboard's MMLU is the plain mean over 57 subjects; lm-eval's own group weighs them by size.
    Benchmark("mmlu", 1, "general", ("mmlu",), "mmlu/default", 5, "acc", chance=0.25, by_subtask=True),
    # Probability of the right answers among all that are offered: guessing scores their share, which varies.
    Benchmark("truthfulqa", 1, "general", ("truthfulqa_mc2",), "truthfulqa", 0, "acc"),
    Benchmark("winogrande", 1, "general", ("winogrande",), "winogrande", 5, "acc", chance=0.5),
    Benchmark("gsm8k", 1, "math", ("gsm8k",), "gsm8k", 5, "exact_match", "strict-match", chance=0.0),
    Benchmark(
        "ifeval", 2, "general", ("leaderboard_ifeval",), "leaderboard/ifeval", 0, "prompt_level_strict_acc", chance=0.0
    ),
    Benchmark(
        "bbh",
        2,
        "general",
        ("leaderboard_bbh",),
        "leaderboard/bbh_mc",
        None,
        "acc_norm",
        chance="options",
        by_subtask=True,
    ),
    Benchmark("math_hard", 2, "math", ("leaderboard_math_hard",), "leaderboard/math", None, "exact_match", chance=0.0),
    # The three sets are nested: the largest has every question once, so that the interval counts none of them twice.
    Benchmark(
        "gpqa",
        2,
        "science",
        ("leaderboard_gpqa",),
        "leaderboard/gpqa",
        0,
        "acc_norm",
        chance=0.25,
        counted=("leaderboard_gpqa_extended",),
    ),
    Benchmark(
        "musr",
        2,
        "general",
        ("leaderboard_musr",),
        "leaderboard/musr",
        0,
        "acc_norm",
        chance="options",
        subtask_chance={
            "leaderboard_musr_murder_mysteries": 1 / 2,
            "leaderboard_musr_object_placements": 1 / 5,
            "leaderboard_musr_team_allocation": 1 / 3,
        },
        by_subtask=True,
    ),
    Benchmark("mmlu_pro", 2, "general", ("leaderboard_mmlu_pro",), "leaderboard/mmlu_pro", None, "acc", chance=1 / 10),
)
RETENTION: Mapping[str, Benchmark] = MappingProxyType({benchmark.name: benchmark for benchmark in _ALL})
