"""Which prompts a rank answers, and into which updates their groups go, in layouts that threads imitate."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prism_nemo.checkpoint.native import TrainState
from prism_nemo.config import GRPOConfig, RLConfig, RolloutConfig
from prism_nemo.generation.requests import Response
from prism_nemo.rl import collect, update
from prism_nemo.rl.rewards.task import Problem, Score
from prism_nemo.rl.rollout import Rollout

GROUP = 2


class Ranks:
    """`gather` between threads, each of which is a data-parallel rank."""

    def __init__(self, size: int) -> None:
        self._barrier, self._values = threading.Barrier(size, timeout=60), [None] * size
        self.here = threading.local()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        self._values[self.here.rank] = value
        self._barrier.wait()
        found = list(self._values)
        self._barrier.wait()
        return found


def _updates(
    monkeypatch: pytest.MonkeyPatch, size: int, prompts: int, mini_batches: int, live: set[int]
) -> tuple[list[list[int]], list[list[list[int]]]]:
    """By rank: the numbers of its prompts; and of those whose groups are in each update, where only some are `live`."""
    ranks = Ranks(size)
    config = RLConfig(
        rollout=RolloutConfig(prompts_per_step=prompts, group_size=GROUP, max_new_tokens=9),
        grpo=GRPOConfig(kl_beta=0.0, mini_batches=mini_batches),
        micro_batch_size=3,
    )
    trainer: Any = SimpleNamespace(model=None, runtime=SimpleNamespace(device=torch.device("cpu")))
    stream: Any = SimpleNamespace(
        take=lambda first, count: [Problem("t", str(first + i), "", "") for i in range(count)]
    )
    judge: Any = SimpleNamespace(take_failures=dict)

    def sampled(_: Any, problems: list[tuple[int, Problem]], *__: Any) -> list[list[tuple[int, Problem]]]:
        return [problems]

    def judged(problems: list[tuple[int, Problem]], *_: Any) -> list[Rollout]:
        # The prompt's number is its token, by which it is known again in the tensors.
        return [
            Rollout(p, Response([number], [7] * (1 + number % 3), [0.0] * (1 + number % 3), True),
                    Score(float(number in live and i == 0), True, None), number=number,
                    reward=float(number in live and i == 0))
            for number, p in problems
            for i in range(GROUP)
        ]  # fmt: skip

    for module in (collect, update):
        monkeypatch.setattr(module, "gather", ranks.gather)
    monkeypatch.setattr(collect, "sample_responses", sampled)
    monkeypatch.setattr(collect, "judge_responses", judged)
    monkeypatch.setattr(update, "score_batches", lambda model, batches: [None] * len(batches))
    monkeypatch.setattr(collect.parallel_state, "get_data_parallel_rank", lambda: ranks.here.rank)
    monkeypatch.setattr(collect.parallel_state, "get_data_parallel_world_size", lambda: size)
    asked: list[Any] = [None] * size
    made: list[Any] = [None] * size

    def work(rank: int) -> None:
        ranks.here.rank = rank
        found = collect.Collector(config, stream, judge, judge, judge).collect(TrainState())
        asked[rank] = [r.number for r in found.sampled[::GROUP]]
        made[rank] = [
            sorted(
                {
                    int(row[0])
                    for batch in mini
                    for row, mask in zip(batch.tokens, batch.mask, strict=True)
                    if mask.any()
                }
            )
            for mini in update.Updater(config, trainer, None, 0).prepare(found.used, found.sampled[0])
        ]

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return asked, made


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    ("mini_batches", "live", "expected"),
    [
        (1, {0, 1, 2, 3, 4, 5, 6, 7}, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, {0, 1, 2, 3, 4, 5, 6, 7}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, {0, 1, 2, 3, 4, 5, 6, 7}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        (2, {0, 5, 6}, [[0], [5, 6]]),
        (3, {1, 3, 4, 6, 7}, [[1], [3, 4], [6, 7]]),
        (4, {2}, [[2]]),
        (8, {0, 7}, [[0], [7]]),
        (2, set(), []),
    ],
)
def test_updates_are_made_from_the_same_groups_in_any_layout(
    size: int, mini_batches: int, live: set[int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, made = _updates(monkeypatch, size, 8, mini_batches, live)
    assert sorted(number for mine in asked for number in mine) == list(range(8))
    assert {len(mine) for mine in asked} == {8 // size}
    # Each rank takes part in every update, also where it has nothing to add.
    assert {len(mine) for mine in made} == {len(expected)}
    assert [sorted(n for mine in made for n in mine[k]) for k in range(len(expected))] == expected


def test_every_rank_has_a_part_of_each_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else all would wait for one."""
    asked, made = _updates(monkeypatch, 2, 8, 2, set(range(8)))
    assert asked == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert made == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    # With one mini-batch a rank's prompts stand together.
    assert _updates(monkeypatch, 2, 8, 1, set())[0] == [[0, 1, 2, 3], [4, 5, 6, 7]]
