"""One rank decides and the others follow: files, verdicts and choices are rank 0's, the model is everybody's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from prism_nemo.evaluation.engines.contract import Continuation, EvaluationModel, Likelihood
from prism_nemo.generation.requests import Request, Response

T = TypeVar("T")
# Ranks that wait while rank 0 judges programs for an hour must not take it for dead, as NCCL would after ten minutes.
_PATIENCE = timedelta(days=7)


def led(model: EvaluationModel, work: Callable[[EvaluationModel], T]) -> T | None:
    """Run `work` on rank 0; the other ranks do what it asks the model for. Every rank calls this.

    Args:
        model: This rank's part.
        work: Gets a model to ask.

    Returns:
        What `work` returned, on rank 0; None on the others.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work(model)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    if dist.get_rank() > 0:
        while (order := _broadcast(None, group)) is not None:
            name, argument = order
            getattr(model, name)(argument)
        return None
    leader = _Leader(model, group)
    try:
        return work(leader)
    finally:
        # A call that failed halfway left the others waiting in it: they end with the launcher, and do not listen here.
        if not leader.asking:
            _broadcast(None, group)


def _broadcast(order: Any, group: Any) -> Any:
    box = [order]
    dist.broadcast_object_list(box, src=0, group=group, device=torch.device("cpu"))
    return box[0]


class _Leader:
    """The model as rank 0 sees it: whatever it is asked, all ranks are asked.

    Attributes:
        asking: Whether a call is going on.
    """

    def __init__(self, model: EvaluationModel, group: Any) -> None:
        self._model, self._group = model, group
        self.engine, self.tokenizer, self.max_length = model.engine, model.tokenizer, model.max_length
        self.asking = False

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        """See `EvaluationModel.generate`."""
        return list(self._ask("generate", list(requests)))

    def score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """See `EvaluationModel.score`."""
        return list(self._ask("score", list(continuations)))

    def _ask(self, name: str, argument: list[Any]) -> Any:
        self.asking = True
        _broadcast((name, argument), self._group)
        answer = getattr(self._model, name)(argument)
        self.asking = False
        return answer
