"""Questions, benchmarks, prompts and sources as a reader of the documentation has them, a few rows of each."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard

# A random model is never right; of 16 answers of it some are, and not all.
VERDICTS = '''
import hashlib

from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier


class Sometimes(Verifier):
    """1 for a sixteenth of all answers, by their text."""

    name = "sometimes"

    def verify(self, problem: Problem, answer: str) -> float:
        return float(hashlib.sha256(answer.encode()).digest()[0] % 16 == 0)
'''
# Stands in for `my.yaml` of the page about Slurm.
CONFIG = """
run_dir: study/runs/mine
init_from: checkpoints/base
data: {path: data/pocket}
train_steps: 2
seq_length: 64
micro_batch_size: 4
global_batch_size: 4
schedule: {lr_warmup_steps: 1}
checkpoint: {save_interval: 2}
"""
Rows = Sequence[Mapping[str, Any]]


def write_jsonl(path: Path, rows: Rows) -> None:
    """Rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_reader_files(folder: Path, sentences: Sequence[str]) -> None:
    """Everything but models, below a folder; see the pages for what each file is.

    Args:
        folder: Existing.
        sentences: Different texts, at least 40.
    """
    (folder / "my_verdicts.py").write_text(VERDICTS)
    (folder / "my.yaml").write_text(CONFIG)
    (folder / "docs/cards").mkdir(parents=True)
    _write_prompts(folder)
    for name in ("questions", "benchmarks"):
        for benchmark, asked in _benchmarks().items():
            write_jsonl(folder / name / f"{benchmark}.jsonl", asked)
    _write_harness(folder / "benchmarks")
    _write_sources(folder, sentences)


def _write_prompts(folder: Path) -> None:
    for domain in ("math", "code"):
        rows = [{"question": f"{domain} {i}?", "answer": "x", "domain": domain} for i in range(12)]
        write_jsonl(folder / f"{domain}.jsonl", [{**row, "reward": "my_verdicts:Sometimes"} for row in rows])
    kept: Rows = [
        {"question": "Capital of Peru?", "answer": "B", "reward": "choice", "options": ["Quito", "Lima"]},
        {"question": "Say yes.", "answer": "yes", "reward": "exact"},
        {"question": "1+1?", "answer": 2, "reward": "math"},
    ]
    write_jsonl(folder / "kept.jsonl", kept)
    for domain, prompts in {"math": _math(), "code": _code(), "science": _science()}.items():
        write_jsonl(folder / "study/prompts/unbalanced" / f"{domain}.jsonl", prompts)


def _math() -> Rows:
    return [{"question": f"{i}+{i}=?", "answer": 2 * i, "reward": "math"} for i in range(4)]


def _code() -> Rows:
    cases = {"cases": [["1\n", "1\n"]]}
    return [{"question": f"Print the number, as {i}.", "reward": "code", "metadata": cases} for i in range(4)]


def _science() -> Rows:
    options = {"options": ["red", "blue"], "reward": "choice"}
    return [{"question": f"Colour {i}?", "answer": i % 2, **options} for i in range(4)]


def _benchmarks() -> dict[str, Rows]:
    """Of suite `reasoning`."""
    math: dict[str, Rows] = dict.fromkeys(("aime24", "aime25", "math500"), _math())
    return {**math, "livecodebench": _code(), "codeforces": _code(), "gpqa_diamond": _science()}


def _write_harness(folder: Path) -> None:
    """Two benchmarks of suite `retention`, with the columns of their data sets."""
    arc = [
        {
            "question": f"number {i}",
            "choices": {"text": ["red", "green", "house", "river"], "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[i % 4],
        }
        for i in range(34)
    ]
    write_jsonl(folder / "arc_challenge/test.jsonl", arc[:4])
    write_jsonl(folder / "arc_challenge/train.jsonl", arc[4:])
    mmlu = [
        {"question": f"number {i}", "choices": ["red", "green", "house", "river"], "answer": i % 4} for i in range(7)
    ]
    for subject in _subjects():
        write_jsonl(folder / subject / "test.jsonl", mmlu[:2])
        write_jsonl(folder / subject / "dev.jsonl", mmlu[2:])


def _subjects() -> list[str]:
    """Tasks that lm-eval divides MMLU into."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or found.origin is None:
        return []
    return [path.stem for path in (Path(found.origin).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")]


def _write_sources(folder: Path, sentences: Sequence[str]) -> None:
    """What the mixture in README reads."""
    (folder / "general").mkdir()
    table = {"text": list(sentences), "score": [1 + i % 5 for i in range(len(sentences))]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "general/part.parquet")
    (folder / "math").mkdir()
    rows = [{"question": f"What is {i} times {i}?", "answer": f"It is {i * i}."} for i in range(200)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "math/part.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    write_jsonl(folder / "eval/held.jsonl", [{"question": "What is one more than a thousand and one?"}])
