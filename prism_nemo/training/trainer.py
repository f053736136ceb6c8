"""Model, gradient buffers and optimizer of one stage, and one step of training through Megatron's schedules."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer import optimizer as megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module

from prism_nemo.config import OptimizerConfig
from prism_nemo.models.build import build_parts
from prism_nemo.models.family import Architecture
from prism_nemo.models.layers.mamba import MambaMixer
from prism_nemo.models.parts import ModelParts
from prism_nemo.runtime import Runtime

# (batch iterator, model) -> (output, loss function of the output); see Megatron's schedules.
ForwardStep = Callable[[Any, torch.nn.Module], tuple[torch.Tensor, Callable[[torch.Tensor], Any]]]


@dataclass
class StepResult:
    """What one update reports; the sums are over the whole global batch and equal on every rank.

    Attributes:
        sums: Sum over tokens of each value that the loss function returned.
        arrays: The same for values that are vectors.
        grad_norm: Norm of the averaged gradient, before clipping.
        skipped: Why the weights were left as they were, or None.
    """

    sums: dict[str, float]
    grad_norm: float
    arrays: dict[str, list[float]] = field(default_factory=dict)
    skipped: str | None = None


# Sums over the global batch and the gradient's norm -> why not to take the step, or None. Equal on every rank.
Judge = Callable[[dict[str, float], float], str | None]


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
        # An equal trainer can be made from these, in the process that writes checkpoints.
        self.arguments = (architecture, (optimizer, seq_length, use_distributed_optimizer), model_overrides)
        layout = runtime.parallel
        parts = build_parts(architecture, runtime, seq_length, **model_overrides)
        config = parts[0].config
        self._raw: Any = parts[0] if len(parts) == 1 else ModelParts(parts)
        self.parts = [
            DistributedDataParallel(
                config,
                DistributedDataParallelConfig(
                    use_distributed_optimizer=use_distributed_optimizer,
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=layout.overlap_grad_reduce,
                    overlap_param_gather=layout.overlap_param_gather,
                    bucket_size=layout.bucket_size,
                    fp8_param_gather=runtime.precision.fp8_param_gather,
                ),
                part if runtime.dtype == torch.float32 else Float16Module(config, part),
                disable_bucketing=index > 0,  # as Megatron: later parts' communication is not on the critical path
            )
            for index, part in enumerate(parts)
        ]
        self.model = self.parts[0]
        for part in self.parts:
            part.broadcast_params()
            if layout.overlap_param_gather:
                _gather_mixers_whole(part)
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
                overlap_param_gather=layout.overlap_param_gather,
                fp8_recipe=config.fp8_recipe if config.fp8 else None,
            ),
            self.parts,
        )
        self._gather_due = False
        self._use_fused_adamw()
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = self.optimizer.scale_loss
        if layout.overlap_grad_reduce:
            # Reductions start with the last micro-batch. Without this Megatron counts gradients up to the number of the
            # first step (param_and_grad_buffer.py:559), and a step of more micro-batches would reduce too early.
            waits = [part.no_sync for part in self.parts]
            config.no_sync_func = waits if len(waits) > 1 else waits[0]
        self._schedule = get_forward_backward_func()

    @property
    def raw(self) -> Any:
        """This rank's unwrapped model: a LanguageModel, or ModelParts under a virtual pipeline.

        With overlap_param_gather the last update's parameters are still scattered over data-parallel ranks until the
        next forward pass; whoever asks for the model gets them gathered. So every rank must ask.
        """
        if self._gather_due:
            self._gather_due = False
            for part in self.parts:
                part.start_param_sync(force_sync=True)
        return self._raw

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
        judge: Judge | None = None,
    ) -> StepResult:
        """One update.

        Args:
            forward_step: Runs the model on the next micro-batch; its loss function returns (sum of losses, number of
                tokens, {name: sum}).
            batches: This data-parallel rank's micro-batches.
            micro_batches: How many to take.
            micro_batch_size: Rows of each.
            seq_length: Tokens of each row.
            judge: Asked when the gradient is known, before any weight changes.

        Returns:
            Sums over the global batch, including ``tokens``.
        """
        for part in self.parts:
            part.zero_grad_buffer()
        self.optimizer.zero_grad()
        reports = self._run(forward_step, batches, micro_batches, micro_batch_size, seq_length, forward_only=False)
        sums, arrays = total(reports, self.runtime.device)
        # Megatron's optimizer.step(), in two halves: it would clip by a norm that is not a number, and that is the end.
        broken = self.optimizer.prepare_grads()
        grad_norm = float("inf") if broken else float(self.optimizer.get_grad_norm() or 0.0)
        skipped = judge(sums, grad_norm) if judge is not None else None
        if skipped is None and not broken:
            self._clip(grad_norm)
            self.optimizer.step_with_ready_grads()
            self._gather_due = self.runtime.parallel.overlap_param_gather
        return StepResult(sums, grad_norm, arrays, skipped)

    def _clip(self, grad_norm: float) -> None:
        for optimizer in self.optimizer.chained_optimizers:
            parameters = optimizer.get_parameters()
            if parameters and self.settings.clip_grad > 0:
                megatron_optimizer.clip_grad_by_total_norm_fp32(parameters, self.settings.clip_grad, grad_norm)

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
        for part in self.parts:
            part.eval()
        reports = self._run(forward_step, batches, micro_batches, micro_batch_size, seq_length, forward_only=True)
        for part in self.parts:
            part.train()
        return total(reports, self.runtime.device)[0]

    def _run(
        self,
        forward_step: ForwardStep,
        batches: Iterator[Any],
        micro_batches: int,
        micro_batch_size: int,
        seq_length: int,
        forward_only: bool,
    ) -> list[dict[str, torch.Tensor]]:
        self._gather_due = False  # the forward pass gathers what it needs
        streams: Any = batches
        if len(self.parts) > 1:  # each part of a virtual pipeline reads every micro-batch for itself
            streams = list(itertools.tee(map(_kept, batches), len(self.parts)))
        return self._schedule(
            forward_step_func=forward_step,
            data_iterator=streams,
            model=self.parts,
            num_microbatches=micro_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )


def _gather_mixers_whole(part: DistributedDataParallel) -> None:
    """Let a mixer wait for all of its weights before it runs.

    With overlap_param_gather Megatron waits for the weights of a module when that module is called
    (distributed_data_parallel.py:383). A mixer reads the weights of its convolution, and at some tensor-parallel sizes
    of its projection, without calling them: it would run the first micro-batch of a step on those of the step before.
    """

    def wait(mixer: torch.nn.Module, *_: Any) -> None:
        for parameter in mixer.parameters():
            part.param_to_bucket_group[parameter].finish_param_sync()

    for module in part.modules():
        if isinstance(module, MambaMixer):
            module.register_forward_pre_hook(wait)


def _kept(batch: Any) -> Any:
    """A micro-batch that waits for later parts: a copy, as a loader may fill the same tensors anew."""
    if isinstance(batch, dict):
        return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    return batch


def total(
    reports: list[dict[str, torch.Tensor]], device: torch.device
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Add up the micro-batches' reports over data-parallel ranks, and give them to every pipeline stage.

    Returns:
        The scalars, and the vectors.
    """
    last_stage = parallel_state.is_pipeline_last_stage()
    shapes: list[list[tuple[str, int, int]] | None] = [None]
    if last_stage:
        shapes = [[(name, value.dim(), value.numel()) for name, value in sorted(reports[0].items())]]
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    source = parallel_state.get_pipeline_model_parallel_last_rank()
    if pp_group.size() > 1:
        dist.broadcast_object_list(shapes, src=source, group=pp_group)
    found = shapes[0] or []
    values = torch.zeros(sum(size for _, _, size in found), dtype=torch.float64, device=device)
    if last_stage:
        for report in reports:
            values += torch.cat([report[name].detach().double().reshape(-1) for name, _, _ in found])
        dp_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dp_group.size() > 1:
            dist.all_reduce(values, group=dp_group)
    if pp_group.size() > 1:
        dist.broadcast(values, src=source, group=pp_group)
    scalars: dict[str, float] = {}
    arrays: dict[str, list[float]] = {}
    for (name, dims, _), part in zip(found, values.split([size for _, _, size in found]), strict=True):
        if dims:
            arrays[name] = part.tolist()
        else:
            scalars[name] = part.item()
    return scalars, arrays
