"""The policy that the KL term holds on to: the starting weights, moved towards the policy now and then."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from prism_nemo.checkpoint.atomic import remove_leftovers
from prism_nemo.checkpoint.native import TrainState, load, save, step_directory
from prism_nemo.config import GRPOConfig
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.rl.rollout import PolicyBatch
from prism_nemo.rl.scoring import length_fields, score_batches
from prism_nemo.training.trainer import Trainer

_STATE = "reference"  # in TrainState.extra: the step of the saved reference, absent for the starting weights


class Reference:
    """A frozen model with the trainer's layout.

    With a period, ``ref <- alpha * policy + (1 - alpha) * ref`` after every so many steps (TR-DPO's soft update, arXiv
    2404.09656 eq. 5; the study uses one and gives no values). A moved reference is part of the run's state: it is saved
    as weights beside the run's checkpoints, before a checkpoint that needs it.

    Args:
        trainer: The policy.
        config: Of the objective.
        init_from: Checkpoint with the starting weights.
        folder: Where moved references are kept.
        state: Of the run; its `extra` names the reference that it goes on with.
    """

    def __init__(self, trainer: Trainer, config: GRPOConfig, init_from: Path, folder: Path, state: TrainState) -> None:
        self._trainer, self._config, self._folder = trainer, config, folder
        overrides = length_fields(trainer.runtime.parallel)
        self.model: LanguageModel = build_model(
            trainer.architecture, trainer.runtime, trainer.raw.max_sequence_length, **overrides
        )
        if dist.get_rank() == 0:  # of a session that got further than the checkpoint that this one goes on from
            for path in folder.glob("step_????????"):
                if int(path.name[5:]) > state.step:
                    shutil.rmtree(path)
        step = state.extra.get(_STATE)
        load(init_from if step is None else step_directory(folder, step), self.model)
        self.model.eval().requires_grad_(False)
        self._unsaved = False

    def logprobs(self, batches: list[PolicyBatch]) -> list[torch.Tensor]:
        """See `score_batches`."""
        return score_batches(self.model, batches)

    @torch.no_grad()
    def update(self, state: TrainState) -> bool:
        """Move towards the policy if that is due after the step of `state`; returns whether it was."""
        period = self._config.reference_period
        if period == 0 or state.step % period:
            return False
        ours = dict(self.model.named_parameters())
        for name, theirs in self._trainer.raw.named_parameters():
            # In fp32: in bf16 a small difference times alpha would be rounded away, update after update.
            moved = torch.lerp(ours[name].float(), theirs.float(), self._config.reference_alpha)
            ours[name].copy_(moved)
        state.extra[_STATE] = state.step
        self._unsaved = True
        return True

    def save(self, state: TrainState) -> None:
        """Write a moved reference, if it is not on disk yet; every rank calls this before each checkpoint."""
        if not self._unsaved:
            return
        save(step_directory(self._folder, state.extra[_STATE]), self.model, self._trainer.architecture)
        self._unsaved = False

    def remove_unused(self, checkpoints: Path) -> None:
        """Delete the saved references that no kept checkpoint goes on with; rank 0 does it.

        A checkpoint at step s needs the newest reference of a step up to s.
        """
        if dist.get_rank() != 0 or not self._folder.is_dir():
            return
        saved = sorted(int(path.name[5:]) for path in self._folder.glob("step_????????"))
        steps = [int(path.name[5:]) for path in checkpoints.glob("step_????????")]
        needed = {max((s for s in saved if s <= step), default=-1) for step in steps} | set(saved[-1:])
        for step in saved:
            if step not in needed:
                shutil.rmtree(step_directory(self._folder, step))
        remove_leftovers(step_directory(self._folder, 0), alone=True)
