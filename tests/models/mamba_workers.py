"""What the tests of Mamba run in processes of their own; module-level, so that they can be pickled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mamba_reference import Sizes, Tensors

from prism_nemo.config import ParallelConfig
from prism_nemo.runtime import start, stop


@dataclass
class MixerRun:
    """One forward and backward pass; `parameters` and `gradients` have one entry per rank."""

    output: torch.Tensor
    hidden_gradient: torch.Tensor
    parameters: list[Tensors]
    gradients: list[Tensors]
    gradient_norm: float


def config(sizes: Sizes, parallel: ParallelConfig, **values: Any) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": sizes.hidden,
            "num_attention_heads": 4,
            "mamba_num_heads": sizes.heads,
            "mamba_head_dim": sizes.head_dim,
            "mamba_num_groups": sizes.groups,
            "mamba_state_dim": sizes.d_state,
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "sequence_parallel": parallel.sequence_parallel,
            "use_cpu_initialization": True,
            "gradient_accumulation_fusion": False,
            "params_dtype": torch.float64,
            "init_method_std": 0.5,
            **values,
        }
    )


def build_mixer(sizes: Sizes, parallel: ParallelConfig, **values: Any) -> Any:
    """A mixer whose D and norm are no longer ones, in a process group that runs."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    from prism_nemo.models.layers.mamba import MambaMixer, MambaMixerSubmodules

    mixer = MambaMixer(
        config(sizes, parallel, **values),
        MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
        sizes.hidden,
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        chunk_size=4,
        conv_bias=sizes.conv_bias,
        norm_eps=sizes.eps,
        dt_limit=sizes.dt_limit,
        dt_range=(0.1, 2.0),
    )
    tp, rank = mixer.tp_group.size(), mixer.tp_group.rank()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (mixer.D, mixer.norm.weight):
            full = torch.rand(tp * len(parameter), generator=generator, dtype=torch.float64) + 0.5
            parameter.copy_(full.chunk(tp)[rank])
    return mixer


def gradient_norm(module: torch.nn.Module) -> float:
    """As Megatron's optimizer has it."""
    from megatron.core import parallel_state
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

    grads = [p.grad.float() for p in module.parameters() if param_is_not_tensor_parallel_duplicate(p)]
    return float(get_grad_norm_fp32(grads, grad_stats_parallel_group=parallel_state.get_model_parallel_group()))


def everyone(value: Any) -> list[Any]:
    """The values of all ranks."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_mixer(
    sizes: Sizes, parallel: ParallelConfig, hidden: torch.Tensor, weight: torch.Tensor, ends: tuple[int, ...] | None
) -> MixerRun:
    """Forward, and backward of (output * weight).sum(); `ends` are those of packed documents."""
    from megatron.core.packed_seq_params import PackedSeqParams

    start(parallel, seed=3)
    mixer = build_mixer(sizes, parallel)
    tp, rank, packed = mixer.tp_group.size(), mixer.tp_group.rank(), None
    if ends is not None:
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.tensor((0, *ends), dtype=torch.int32))
    if parallel.sequence_parallel:
        hidden, weight = (t.chunk(tp)[rank] for t in (hidden, weight))
    hidden = hidden.clone().requires_grad_()
    output, bias = mixer(hidden, packed_seq_params=packed)
    assert bias is None
    (output * weight).sum().backward()
    parameters = everyone({name: p.detach() for name, p in mixer.named_parameters()})
    gradients = everyone({name: p.grad for name, p in mixer.named_parameters()})
    outputs, hidden_gradients = everyone(output.detach()), everyone(hidden.grad)
    norm = gradient_norm(mixer)
    stop()
    if parallel.sequence_parallel:
        return MixerRun(torch.cat(outputs), torch.cat(hidden_gradients), parameters, gradients, norm)
    assert all(torch.equal(outputs[0], other) for other in outputs)
    return MixerRun(outputs[0], hidden_gradients[0], parameters, gradients, norm)


def save_mixer(sizes: Sizes, parallel: ParallelConfig, path: str) -> list[Tensors]:
    """Save; the parameters of every rank."""
    from megatron.core import dist_checkpointing

    start(parallel, seed=3)
    mixer = build_mixer(sizes, parallel)
    dist_checkpointing.save(mixer.sharded_state_dict("mixer."), path)
    parameters = everyone({name: p.detach() for name, p in mixer.named_parameters()})
    stop()
    return parameters


def load_mixer(sizes: Sizes, parallel: ParallelConfig, path: str) -> list[Tensors]:
    """Load into a mixer of zeros; the parameters of every rank."""
    from megatron.core import dist_checkpointing

    start(parallel, seed=4)
    mixer = build_mixer(sizes, parallel)
    for parameter in mixer.parameters():
        parameter.data.zero_()
    loaded = dist_checkpointing.load(mixer.sharded_state_dict("mixer."), path)
    mixer.load_state_dict({name.removeprefix("mixer."): value for name, value in loaded.items()})
    parameters = everyone({name: p.detach() for name, p in mixer.named_parameters()})
    stop()
    return parameters


def checkpoint_keys(sizes: Sizes, parallel: ParallelConfig) -> dict[str, tuple[int, ...]]:
    """Key and whole shape of every tensor that a mixer's checkpoint holds."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    start(parallel, seed=3)
    state = build_mixer(sizes, parallel).sharded_state_dict("mixer.")
    apply_factories(state)
    found = [t for value in state.values() for t in (value if isinstance(value, list) else [value])]
    keys = {t.key: t.global_shape for t in found if isinstance(t, ShardedTensor)}
    stop()
    return keys


def cast_mixer(sizes: Sizes, hidden: torch.Tensor) -> tuple[torch.dtype, torch.Tensor, Tensors, Tensors, set[str]]:
    """A mixer after .bfloat16(): type of A_log before, output, parameters, gradients, what the scan got in fp32."""
    from prism_nemo.models.layers import mamba_kernels

    start(ParallelConfig(), seed=3)
    wide, scan = set(), mamba_kernels.scan

    def watched(*args: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        wide.update(name for name, t in zip(("x", "dt", "A", "B", "C", "D"), args, strict=True) if t.dtype.itemsize > 2)
        return scan(*args, **kwargs)

    mamba_kernels.scan = watched
    mixer = build_mixer(sizes, ParallelConfig(), params_dtype=torch.float32)
    before = mixer.A_log.dtype
    mixer.bfloat16()
    output, _ = mixer(hidden)
    output.sum().backward()
    parameters = {name: p.detach() for name, p in mixer.named_parameters()}
    gradients = {name: p.grad for name, p in mixer.named_parameters()}
    stop()
    return before, output.detach(), parameters, gradients, wide


class TinyHybrid:
    """A whole MambaModel with gradient buffers and the distributed optimizer, and the data that it trains on."""

    VOCABULARY, LENGTH, ROWS = 32, 12, 2

    def __init__(
        self, sizes: Sizes, parallel: ParallelConfig, pattern: str, dtype: torch.dtype = torch.float32, **values: Any
    ) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.mamba.mamba_model import MambaModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        from prism_nemo.models.layers.stack import hybrid_stack_spec

        settings: dict[str, Any] = {
            "num_layers": len(pattern),
            "num_query_groups": 2,
            "ffn_hidden_size": 12,
            "gated_linear_unit": True,
            "normalization": "RMSNorm",
            "add_bias_linear": False,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "params_dtype": dtype,
            "bf16": dtype == torch.bfloat16,
            "bias_dropout_fusion": False,
            "init_method_std": 0.3,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "pipeline_dtype": dtype,
            "batch_p2p_comm": False,
            **values,
        }
        self.config = config(sizes, parallel, **settings)
        self.config.finalize_model_grads_func = finalize_model_grads
        self.raw = MambaModel(
            self.config,
            hybrid_stack_spec(mixer={"chunk_size": 4, "dt_range": (0.1, 2.0)}, norm_eps=1e-5),
            vocab_size=self.VOCABULARY,
            max_sequence_length=self.LENGTH,
            hybrid_override_pattern=pattern,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=False,
        )
        wrapped = Float16Module(self.config, self.raw) if dtype == torch.bfloat16 else self.raw
        buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(self.config, buffers, wrapped)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=1e-2,
                adam_eps=1e-4,
                clip_grad=1.0,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=True,
            ),
            [self.model],
        )

    def backward(self, step: int) -> float:
        """Gradients of the mean loss over one batch, reduced as the optimizer wants them; that loss."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(self.VOCABULARY, (self.ROWS, self.LENGTH + 1), generator=generator)
        positions = torch.arange(self.LENGTH).expand(self.ROWS, -1)

        def mean(losses: torch.Tensor) -> tuple[torch.Tensor, float]:
            loss = losses.float().mean()
            return loss, loss.item()

        def forward_step(_: Any, model: torch.nn.Module) -> Any:
            return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:]), mean

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=[self.model],
            num_microbatches=1,
            seq_length=self.LENGTH,
            micro_batch_size=self.ROWS,
            forward_only=False,
        )
        return next(stage[0] for stage in everyone(losses) if stage)

    def train(self, steps: range) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each update."""
        results = []
        for step in steps:
            loss = self.backward(step)
            _, norm, _ = self.optimizer.step()
            results.append((loss, float(norm)))
        return results


def train_and_save(
    sizes: Sizes, parallel: ParallelConfig, pattern: str, path: str, dtype: torch.dtype, hf_config: dict[str, Any]
) -> list[tuple[float, float]]:
    """Two updates, a checkpoint, and what the next three updates give."""
    from prism_nemo.checkpoint import native
    from prism_nemo.models.family import architecture_from_hf

    start(parallel, seed=3, dtype=dtype)
    hybrid = TinyHybrid(sizes, parallel, pattern, dtype)
    hybrid.train(range(2))
    # Any architecture: the checkpoint only records it.
    hybrid.raw.architecture = architecture_from_hf(hf_config, "config.json")
    native.save(Path(path), hybrid.raw, hybrid.raw.architecture, hybrid.optimizer, native.TrainState(2))
    after = hybrid.train(range(2, 5))
    stop()
    return after


def load_and_train(
    sizes: Sizes, parallel: ParallelConfig, pattern: str, path: str, dtype: torch.dtype
) -> list[tuple[float, float]]:
    """What three updates give after loading."""
    from prism_nemo.checkpoint import native

    start(parallel, seed=99, dtype=dtype)
    hybrid = TinyHybrid(sizes, parallel, pattern, dtype)
    hybrid.raw.architecture = native.read_architecture(Path(path))
    native.load(Path(path), hybrid.raw, hybrid.optimizer)
    after = hybrid.train(range(2, 5))
    stop()
    return after


@dataclass
class FirstStep:
    """Loss, every gradient of rank 0, and how many bytes its forward pass keeps for the backward pass."""

    loss: float
    gradients: Tensors
    kept: int


def first_steps(
    sizes: Sizes, parallel: ParallelConfig, pattern: str, path: str, settings: list[dict[str, Any]]
) -> list[FirstStep]:
    """The same step from the same checkpoint under several settings of the model."""
    from prism_nemo.checkpoint import native

    start(parallel, seed=99)
    results = []
    for values in settings:
        hybrid = TinyHybrid(sizes, parallel, pattern, **values)
        hybrid.raw.architecture = native.read_architecture(Path(path))
        native.load(Path(path), hybrid.raw)
        kept = _count_kept(hybrid)
        loss = hybrid.backward(0)
        gradients = {name: p.main_grad.clone() for name, p in hybrid.raw.named_parameters()}
        results.append(FirstStep(loss, gradients, sum(kept.values())))
    stop()
    return results


def _count_kept(hybrid: TinyHybrid) -> dict[int, int]:
    """Bytes by storage of what the next forward pass keeps beside the parameters.

    Only the forward pass is watched: layers that run again within the backward pass keep things for a moment.
    """
    own = {p.untyped_storage().data_ptr() for p in hybrid.raw.parameters()}
    kept: dict[int, int] = {}
    alive = []
    forward = hybrid.model.forward

    def count(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # so that its address is not used again
        return t

    def counted(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            return forward(*args, **kwargs)

    hybrid.model.forward = counted
    return kept


def build_hybrid(sizes: Sizes, pattern: str, values: dict[str, Any]) -> None:
    """A model with full recomputation and other settings."""
    start(ParallelConfig(), seed=3)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    TinyHybrid(sizes, ParallelConfig(), pattern, **recompute, **values)
    stop()
