"""The examples of docs/rewards.md: what they print is what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from prism_nemo.rl.prompt_file import PromptFile
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import verifier_named

DOC = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", DOC, re.DOTALL)
PRINTING = [code for code in PYTHON if "print(" in code]


def _promised(code: str) -> list[str]:
    """What comments say is printed: behind a print, several values split by commas; or in lines of their own."""
    found: list[str] = []
    for line in code.splitlines():
        if line.startswith("# "):
            found.append(line[2:])
        elif "print(" in line and "  # " in line:
            found += line.split("  # ")[1].split(", ")
    return found


@pytest.mark.parametrize("code", PRINTING, ids=range(len(PRINTING)))
def test_examples_print_what_they_say(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "example.py")], capture_output=True, text=True, timeout=300,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == _promised(code)
    assert len(_promised(code)) >= 2


def test_the_prompt_file(tmp_path: Path) -> None:
    rows = re.search(r"```json\n(.*?)```", DOC, re.DOTALL)
    assert rows is not None
    (tmp_path / "p.jsonl").write_text(rows[1])
    file = PromptFile(tmp_path / "p.jsonl")
    assert list(file.verifiers) == ["math", "choice", "code", "exact"]
    choice = file.problem(1)
    assert choice.metadata["options"]["ABC".index(choice.answer)] == "Lima"


def test_the_reward_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [code for code in PYTHON if code.startswith("# my_rewards.py")]
    (tmp_path / "my_rewards.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    verifier = verifier_named("shorter", {"shorter": "my_rewards:Shorter"})
    assert not verifier.isolated
    problem = Problem("t", "Who wrote Emma?", "", "Austen", {"words": 3})
    answers = ("Jane Austen", "It was Austen who wrote it", "Brontë")
    assert [verifier.verify(problem, answer) for answer in answers] == [1.0, 0.5, 0.0]
