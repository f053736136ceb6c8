"""What a run does about numbers that go wrong, before the weights have changed: skip, warn, go back, or stop."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from prism_nemo.checkpoint.native import TrainState
from prism_nemo.config import GuardConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.run import RunDirectory

SPIKE_ACTIONS = ("off", "warn", "skip", "rollback")

# Fewer losses than this say nothing about what is usual.
_LEAST_HISTORY = 16
# The standard deviation of normal noise is this many times its median absolute deviation.
_MAD_TO_STD = 1.4826
# A loss that hardly moves would make any change a spike; noise below this part of the loss is no news.
_LEAST_NOISE = 5e-3

_STATE = "guards"  # in TrainState.extra


class RollBack(Exception):
    """Raised by `StepGuard.settle` when the run should go back to its last checkpoint and leave out the data since."""


@dataclass
class Finding:
    """What was wrong with a step.

    Attributes:
        reason: In words.
        action: ``skip``, ``warn`` or ``rollback``.
        spike: Whether it is about a loss that is finite, but high.
    """

    reason: str
    action: str
    spike: bool = False

    @property
    def left_out(self) -> bool:
        """Whether the step changes nothing."""
        return self.action != "warn"


def check_guards(config: GuardConfig) -> None:
    """Refuse settings that mean nothing.

    Raises:
        InputError: Naming the key.
    """
    if config.spike not in SPIKE_ACTIONS:
        raise InputError(f"guards.spike: {config.spike!r} is unknown; known: {', '.join(SPIKE_ACTIONS)}")
    for name, least in (("max_bad_steps", 1), ("spike_window", _LEAST_HISTORY), ("max_rollbacks", 0)):
        if getattr(config, name) < least:
            raise InputError(f"guards.{name}: {getattr(config, name)} must be at least {least}")
    for name in ("spike_z", "slow_rank_ratio"):
        if not getattr(config, name) > 1:
            raise InputError(f"guards.{name}: {getattr(config, name)} must be above 1")
    if config.watchdog_seconds is not None and not config.watchdog_seconds > 0:
        raise InputError("guards.watchdog_seconds must be positive, or null for no watchdog")
    if config.replica_check_interval < 0:
        raise InputError("guards.replica_check_interval must be 0 or more")


class StepGuard:
    """Judges each step by its loss and gradient norm. All that it remembers is in the training state.

    Args:
        config: What to do.
        state: Of the run; its `extra` is filled.
        run: Where bad steps are written down, in ``bad_steps.jsonl``, with the samples that they read.
    """

    def __init__(self, config: GuardConfig, state: TrainState, run: RunDirectory) -> None:
        self._config, self._run = config, run
        self._memory: dict[str, Any] = {"losses": [], "in_a_row": 0, "skipped": 0, "rollbacks": 0}
        self._memory.update(state.extra.get(_STATE, {}))
        state.extra[_STATE] = self._memory
        self._finding: Finding | None = None

    @property
    def skipped(self) -> int:
        """Steps that changed nothing, so far."""
        return int(self._memory["skipped"])

    def judge(self, sums: dict[str, float], grad_norm: float) -> str | None:
        """A `Judge` for `Trainer.step`."""
        loss = sums["loss"] / sums["tokens"] if sums["tokens"] else math.nan
        self._finding = self._find(loss, grad_norm)
        return self._finding.reason if self._finding is not None and self._finding.left_out else None

    def _find(self, loss: float, grad_norm: float) -> Finding | None:
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                return Finding(f"the {name} is {value}", "skip")
        if self._config.spike == "off":
            return None
        z = robust_z(loss, self._memory["losses"])
        if z < self._config.spike_z:
            return None
        usual = statistics.median(self._memory["losses"])
        reason = f"the loss is {loss:.4g} where {usual:.4g} is usual (robust z {z:.1f})"
        return Finding(reason, self._config.spike, spike=True)

    def settle(self, step: int, first_sample: int, samples: int, loss: float, grad_norm: float) -> str | None:
        """Takes note of the step that was judged last; every rank calls this.

        Args:
            step: Its number.
            first_sample: The first sample that it read.
            samples: How many.
            loss: Its mean loss.
            grad_norm: Its gradient's norm.

        Returns:
            What to tell the user, or None.

        Raises:
            RollBack: If the run should go back.
            PrismError: After too many bad steps in a row, or rollbacks.
        """
        memory, found = self._memory, self._finding
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        bad = not finite or (found is not None and found.spike and found.left_out)
        memory["in_a_row"] = memory["in_a_row"] + 1 if bad else 0
        if found is None or not found.left_out:
            memory["losses"] = [*memory["losses"], loss][-self._config.spike_window :]
        if found is None:
            return None
        memory["skipped"] += found.left_out
        entry = {"step": step, "first_sample": first_sample, "samples": samples, "reason": found.reason}
        self._write({**entry, "action": found.action})
        # One more for the way back, which counts only where there is no checkpoint to go back to.
        if memory["in_a_row"] >= self._config.max_bad_steps + (found.action == "rollback"):
            what_to_do = (
                "A loss that stays high is no spike, and a run that leaves it out learns nothing any more: if it is "
                "the data's (another mixture, another source), go on with guards.spike=warn"
                if found.spike
                else "Lower the learning rate, or look at the samples. If it stops like this at its first step, the "
                "update before that checkpoint broke the weights: remove the checkpoint, to go on from the one before"
            )
            raise PrismError(
                f"step {step}: {found.reason}; {memory['in_a_row']} such steps in a row, so the run stops. They "
                f"changed no weight; the same command goes on from the newest checkpoint. The samples of each are in "
                f"{self._run.path / 'bad_steps.jsonl'}. {what_to_do}"
            )
        if found.action == "rollback":
            if memory["rollbacks"] >= self._config.max_rollbacks:
                raise PrismError(
                    f"step {step}: {found.reason}, after {memory['rollbacks']} rollbacks; the run stops. Lower the "
                    f"learning rate, or look at the samples in {self._run.path / 'bad_steps.jsonl'}"
                )
            raise RollBack(found.reason)
        verb = "left out" if found.action == "skip" else "taken"
        return (
            f"step {step}: {found.reason}; the step is {verb} (samples {first_sample} to {first_sample + samples - 1})"
        )

    def forget_losses(self) -> None:
        """Called when the data has changed: what was usual says nothing about the losses of other data."""
        self._memory["losses"] = []

    def rolled_back(self, before: StepGuard) -> None:
        """Carries over what a return to an earlier checkpoint must not forget: how often it happened."""
        self._memory["rollbacks"] = before._memory["rollbacks"] + 1
        self._memory["skipped"] = before._memory["skipped"]

    def _write(self, entry: dict[str, Any]) -> None:
        if self._run.writes:
            with (self._run.path / "bad_steps.jsonl").open("a") as file:
                file.write(json.dumps(entry) + "\n")


def bad_steps_in_a_row(state: TrainState) -> int:
    """Steps up to now that were left out, each after the other, by what the guards have put into the state.

    While there are any, the last update that was taken is under suspicion, and so is a checkpoint of its weights.
    """
    return int(state.extra.get(_STATE, {}).get("in_a_row", 0))


def robust_z(value: float, history: list[float]) -> float:
    """How many standard deviations a value lies above what is usual, by median and median absolute deviation.

    Iglewicz and Hoaglin's modified z-score (1993); outliers in the history hardly move it. 0 with too little history.
    """
    if len(history) < _LEAST_HISTORY:
        return 0.0
    middle = statistics.median(history)
    deviation = statistics.median(abs(x - middle) for x in history)
    return (value - middle) / max(_MAD_TO_STD * deviation, _LEAST_NOISE * abs(middle))


def check_replicas(model: torch.nn.Module, step: int) -> None:
    """Compare the parameters of data-parallel replicas bit for bit; every rank calls this.

    A flipped bit in one replica's memory stays there, and its gradients spoil all others. Each parameter's bits are
    added up as integers, which any single flip changes; the sums are compared over the data-parallel ranks.

    Raises:
        PrismError: Naming parameter and rank.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return
    named = list(model.named_parameters())
    sums = torch.stack([bit_sum(parameter) for _, parameter in named])
    everyone = [torch.empty_like(sums) for _ in range(group.size())]
    dist.all_gather(everyone, sums, group=group)
    table = torch.stack(everyone)
    usual = table.mode(dim=0).values  # what most replicas have
    wrong = (table != usual).nonzero().tolist()
    problem: list[str] = []
    if wrong:
        ranks = dist.get_process_group_ranks(group)
        names = sorted({named[column][0] for _, column in wrong})
        who = sorted({ranks[row] for row, _ in wrong})
        sides = "" if group.size() > 2 else " (of two replicas either may be the wrong one)"
        problem = [f"rank {', '.join(map(str, who))}{sides}: {', '.join(names[:3])}"]
    where = _found_by_any(problem)
    if where:
        raise PrismError(
            f"step {step}: replicas of the model differ, so memory was corrupted somewhere: {where}. The run stops; "
            "they were equal when the last checkpoint was saved: replace the machine, then run the same command again"
        )


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Refuse weights that are no numbers; every rank calls this before a save.

    Losses and gradients are judged before an update, so what an update breaks shows at the next step: too late for a
    checkpoint that is written in between, from which every restart would go on.

    Raises:
        PrismError: Naming parameter and rank.
    """
    named = [(name, parameter.detach()) for name, parameter in model.named_parameters() if parameter.numel()]
    ends = torch.stack([end.float() for _, parameter in named for end in parameter.aminmax()])  # NaN is both ends
    finite = ends.isfinite().view(-1, 2).all(dim=1).tolist()
    wrong = [name for (name, _), right in zip(named, finite, strict=True) if not right]
    where = _found_by_any([f"rank {dist.get_rank()}: {', '.join(wrong[:3])}"] if wrong else [])
    if where:
        raise PrismError(
            f"step {step}: weights have values that are no finite numbers after the update: {where}. Nothing was "
            "saved; the last checkpoint is from before. Lower the learning rate or check the machine, and run it again"
        )


def _found_by_any(problem: list[str]) -> str:
    """What any rank has found wrong, each thing once, so that all stop, also those that are right themselves."""
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, problem)
    return "; ".join(dict.fromkeys(text for texts in found for text in texts))


def bit_sum(parameter: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor's bits, read as integers; int64, modulo 2^64."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    return parameter.detach().contiguous().view(kind).sum(dtype=torch.int64)
