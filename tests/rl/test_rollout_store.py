"""Rollouts on disk, and how they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tiny_training import character_tokenizer

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.generation.requests import Response
from prism_nemo.rl.rewards.task import Problem, Score
from prism_nemo.rl.rollout import Rollout
from prism_nemo.rl.show import select, show, summary
from prism_nemo.rl.store import RolloutStore, read_rollouts, recorded_steps


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _rollouts(tokenizer: Tokenizer, first: int, rewards: list[float]) -> list[Rollout]:
    """Groups of two."""
    found = []
    for i, reward in enumerate(rewards):
        problem = Problem("sums" if i < 2 else "lists", f"{i}+1=?", "", str(i + 1))
        text = f"{i}</think>{i + int(reward)}"
        ids = tokenizer.encode(text) * (i + 1)
        score = Score(reward, True, str(i), penalties={"repetition": -0.25} if i == 3 else {}, failure=None)
        response = Response([5], ids, [-0.5] * len(ids), i != 1)
        found.append(Rollout(problem, response, score, tokenizer.decode(ids), first + i // 2, reward, reward - 0.5))
    return found


def test_what_was_written_is_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Ranks hold alternating stretches of the prompts; the reader puts them in the order of prompts."""
    stores = [RolloutStore(tmp_path, rank, writes=True) for rank in (0, 1)]
    silent = RolloutStore(tmp_path, 2, writes=False)
    for step in (1, 2):
        stores[1].write(step, _rollouts(tokenizer, 10 * step + 2, [0.0, 1.0, 1.0, 0.5]))
        stores[0].write(step, _rollouts(tokenizer, 10 * step, [1.0, 0.0, 0.0, 0.0]))
        silent.write(step, _rollouts(tokenizer, 99, [1.0, 1.0]))
    assert recorded_steps(tmp_path) == [1, 2]
    lines = read_rollouts(tmp_path, 2)
    assert [line["prompt_number"] for line in lines] == [20, 20, 21, 21, 22, 22, 23, 23]
    assert [line["reward"] for line in lines] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.5]
    assert lines[1]["finished"] is False
    assert lines[0]["response"] == "0</think>1"
    assert lines[3]["penalties"] == {"repetition": -0.25}
    assert {line["step"] for line in lines} == {2}
    assert lines[0]["mean_logprob"] == pytest.approx(-0.5)
    stores[0].truncate(1)
    assert recorded_steps(tmp_path) == [1]


def test_missing_steps_and_damage_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no rollouts of step 3; none are recorded there"):
        read_rollouts(tmp_path, 3)
    store = RolloutStore(tmp_path, 0, writes=True)
    for step in (4, 6):
        store.write(step, _rollouts(tokenizer, 0, [1.0, 0.0]))
    with pytest.raises(InputError, match="recorded are 2 steps, 4 to 6"):
        read_rollouts(tmp_path, 5)
    path = tmp_path / "rollouts" / "step_00000006.dp0000.jsonl.zst"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"step_00000006\.dp0000\.jsonl\.zst: is damaged"):
        read_rollouts(tmp_path, 6)


def test_selection_and_summary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    RolloutStore(tmp_path, 0, writes=True).write(1, _rollouts(tokenizer, 0, [1.0, 0.0, 0.5, 0.5]))
    lines = read_rollouts(tmp_path, 1)
    assert [line["reward"] for line in select(lines, order="best")] == [1.0, 0.5, 0.5, 0.0]
    assert [line["reward"] for line in select(lines, order="worst", limit=2)] == [0.0, 0.5]
    lengths = [line["tokens"] for line in select(lines, order="longest")]
    assert lengths == sorted(lengths, reverse=True)
    assert len({line["task"] for line in select(lines, task="lists")}) == 1
    rows = {row["task"]: row for row in summary(lines)}
    assert (rows["sums"]["live_groups"], rows["lists"]["live_groups"]) == (1, 0)
    assert (rows["sums"]["reward"], rows["sums"]["finished"]) == (0.5, 0.5)
    with pytest.raises(InputError, match="--task algebra: the step has lists, sums"):
        select(lines, task="algebra")
    with pytest.raises(InputError, match="--sort newest: choose one of"):
        select(lines, order="newest")


def test_what_is_shown(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Markup in what a model wrote is text, not markup."""
    rollouts = _rollouts(tokenizer, 7, [1.0, 0.0, 0.0, 1.0])
    rollouts[0].text = "[bold]x[/bold]"
    RolloutStore(tmp_path, 0, writes=True).write(3, rollouts)
    console = Console(record=True, width=110)
    show(tmp_path, 3, None, "prompt", None, console)
    text = console.export_text()
    assert "[bold]x[/bold]" in text
    assert "prompt 7  reward 1  advantage +0.50" in text
    assert "cut off" in text
    assert "repetition -0.25" in text
    assert "1 of 1" in text
