"""Model, gradient buffers and optimizer of one stage, and one step of training through Megatron's schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from prism_nemo.config import OptimizerConfig
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.family import Architecture
from prism_nemo.runtime import Runtime

# (batch iterator, model) -> (output, loss function of the output); see Megatron's schedules.
ForwardStep = Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable[[torch.Tensor], Any]]]


@dataclass
class StepResult:
    """What one update reports; the sums are over the whole global batch and equal on every rank.

    Attributes:
        sums: Sum over tokens of each value that the loss function returned.
        grad_norm: Norm of the averaged gradient, before clipping.
    """

    sums: dict[str, float]
    grad_norm: float


class Trainer:
    """Holds what an update needs. The loss arrives as a sum and its number of tokens; the division is by the tokens of
    the global batch, so gradients do not depend on micro-batches or data-parallel size.

    Args:
        architecture: What to build.
        runtime: Where.
        optimizer: AdamW settings.
        seq_length: Longest sequence.
        use_distributed_optimizer: Shard optimizer state over data-parallel ranks.
        model_overrides: Fields of Megatron's TransformerConfig (initialisation, recompute).
    """

    def __init__(
        self,
        architecture: Architecture,
        runtime: Runtime,
        optimizer: OptimizerConfig,
        seq_length: int,
        use_distributed_optimizer: bool,
        **model_overrides: Any,
    ) -> None:
        self.architecture, self.runtime, self.settings = architecture, runtime, optimizer
        self.raw: LanguageModel = build_model(architecture, runtime, seq_length, **model_overrides)
        wrapped: torch.nn.Module = self.raw
        config = self.raw.config
        if runtime.dtype != torch.float32:
            wrapped = Float16Module(config, self.raw)
        self.model = DistributedDataParallel(
            config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=use_distributed_optimizer, grad_reduce_in_fp32=True
            ),
            wrapped,
        )
        self.model.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.lr,
                min_lr=0.0,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.adam_beta1,
                adam_beta2=optimizer.adam_beta2,
                adam_eps=optimizer.adam_eps,
                clip_grad=optimizer.clip_grad,
                bf16=runtime.dtype == torch.bfloat16,
                params_dtype=runtime.dtype,
                use_distributed_optimizer=use_distributed_optimizer,
            ),
            [self.model],
        )
        self._use_fused_adamw()
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        self._schedule = get_forward_backward_func()

    def _use_fused_adamw(self) -> None:
        """torch's fused AdamW updates a tensor in one pass; Megatron builds the loop over elementwise kernels."""
        for group in self._groups():
            if group["params"] and "fused" in group:
                group["fused"], group["foreach"] = True, False

    def _groups(self) -> list[dict[str, Any]]:
        return list(self.optimizer.param_groups)

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate, and the weight decay that goes with it.

        Megatron leaves ``wd_mult`` (0 for norms and biases) to its own scheduler; a loop that sets only the learning
        rate decays the norms without a word.
        """
        for group in self._groups():
            group["lr"] = lr * group.get("lr_mult", 1.0)
            group["weight_decay"] = self.settings.weight_decay * group.get("wd_mult", 1.0)

    def step(
        self,
        forward_step: ForwardStep,
        batches: Iterator[Any],
        micro_batches: int,
        micro_batch_size: int,
        seq_length: int,
    ) -> StepResult:
        """One update.

        Args:
            forward_step: Runs the model on the next micro-batch; its loss function returns (sum of losses, number of
                tokens, {name: sum}).
            batches: This data-parallel rank's micro-batches.
            micro_batches: How many to take.
            micro_batch_size: Rows of each.
            seq_length: Tokens of each row.

        Returns:
            Sums over the global batch, including ``tokens``.
        """
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(forward_step, batches, micro_batches, micro_batch_size, seq_length, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        return StepResult(sums, float(grad_norm or 0.0))

    @torch.no_grad()
    def evaluate(
        self,
        forward_step: ForwardStep,
        batches: Iterator[Any],
        micro_batches: int,
        micro_batch_size: int,
        seq_length: int,
    ) -> dict[str, float]:
        """The same sums without gradients."""
        self.model.eval()
        sums = self._run(forward_step, batches, micro_batches, micro_batch_size, seq_length, forward_only=True)
        self.model.train()
        return sums

    def _run(
        self,
        forward_step: ForwardStep,
        batches: Iterator[Any],
        micro_batches: int,
        micro_batch_size: int,
        seq_length: int,
        forward_only: bool,
    ) -> dict[str, float]:
        reports = self._schedule(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.model],
            num_microbatches=micro_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        return total(reports, self.runtime.device)


def total(reports: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Add up the micro-batches' reports over data-parallel ranks, and give them to every pipeline stage."""
    last_stage = parallel_state.is_pipeline_last_stage()
    names = [sorted(reports[0])] if last_stage else [None]
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    if pp_group.size() > 1:
        dist.broadcast_object_list(names, src=source, group=pp_group)
    keys = names[0] or []
    values = torch.zeros(len(keys), dtype=torch.float64, device=device)
    if last_stage:
        for report in reports:
            values += torch.stack([report[key].detach().double() for key in keys])
        dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dp_group.size() > 1:
            dist.all_reduce(values, group=dp_group)
    if pp_group.size() > 1:
        dist.broadcast(values, src=source, group=pp_group)
    return dict(zip(keys, values.tolist(), strict=True))
