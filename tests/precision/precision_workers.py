"""What the tests run in processes of their own, and small models for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import CASES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from prism_nemo.config import ParallelConfig, PrecisionConfig
from prism_nemo.models.build import build_model
from prism_nemo.models.family import architecture_from_hf
from prism_nemo.runtime import start, stop

TOKENS = 32
RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


def emulated(recipe: str = "tensorwise", form: str = "hybrid", **more: Any) -> PrecisionConfig:
    """Emulation of a recipe, fp32 around it."""
    return PrecisionConfig(dtype="fp32", fp8="emulate", fp8_recipe=recipe, fp8_format=form, **more)


def build(case: str, precision: PrecisionConfig, parallel: ParallelConfig | None = None, **overrides: Any) -> Any:
    """A tiny random model of a case of `tiny_models`; the process group must be stopped by the caller."""
    cls, values = CASES[case]
    runtime = start(parallel or ParallelConfig(), seed=3, precision=precision)
    config = {**cls(**values).to_dict(), "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING[cls].__name__]}
    return build_model(architecture_from_hf(config, "test"), runtime, TOKENS, **overrides)


def each_way(ways: list[tuple[str, PrecisionConfig, ParallelConfig]]) -> list[list[dict[str, Any]]]:
    """`loss_and_gradients` for several models, precisions and layouts, in one start of the processes."""
    found = [loss_and_gradients(*way) for way in ways]
    stop()  # only now: one set of processes cannot meet twice under one store
    return found


def loss_and_gradients(case: str, precision: PrecisionConfig, parallel: ParallelConfig) -> list[dict[str, Any]]:
    """One forward and backward pass on this rank's row: loss, gradients, delayed scales, this rank's amaxes.

    Returns:
        By rank, on every rank.
    """
    from megatron.core import parallel_state

    from prism_nemo.precision.scaling import DelayedScale

    own: list[float] = []
    observe = DelayedScale.observe

    def noting(self: DelayedScale, x: torch.Tensor, group: Any) -> None:
        own.append(float(x.abs().amax()))
        observe(self, x, group)

    DelayedScale.observe = noting  # type: ignore[method-assign]
    model = build(case, precision, parallel)
    g = torch.Generator().manual_seed(parallel_state.get_data_parallel_rank())
    tokens = torch.randint(0, 149, (1, TOKENS), generator=g)
    losses = model(tokens, torch.arange(TOKENS)[None], None, labels=tokens.roll(-1, 1))
    losses.sum().backward()
    gradients = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and ("linear" in name or "proj" in name)
    }
    states = {
        name: {role: scale.state() for role, scale in module.quantiser.delayed.items()}
        for name, module in model.named_modules()
        if hasattr(module, "quantiser")
    }
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(
        found, {"loss": float(losses.detach().sum()), "grads": gradients, "scales": states, "amax": own}
    )
    DelayedScale.observe = observe  # type: ignore[method-assign]
    return found


def master_weights(hf_dir: str, steps: int, lr: float, keep_masters: bool) -> dict[str, Any]:
    """bf16 updates on the same rows, each far below half a bf16 ulp of the weights that are looked at.

    Args:
        hf_dir: Model.
        steps: How many.
        lr: Adam's step is at most about this.
        keep_masters: Otherwise the fp32 masters are overwritten from the bf16 weights after each update, which is what
            training without master weights does.
    """
    from prism_nemo.checkpoint.convert import load_hf_weights
    from prism_nemo.checkpoint.hf import HFReader
    from prism_nemo.config import OptimizerConfig
    from prism_nemo.models.family import read_hf_config
    from prism_nemo.training.midtrain import forward_step
    from prism_nemo.training.trainer import Trainer

    runtime = start(ParallelConfig(), seed=1, precision=PrecisionConfig(dtype="bf16"))
    architecture = read_hf_config(Path(hf_dir))
    settings = OptimizerConfig(lr=lr, weight_decay=0.0, adam_eps=1e-12, clip_grad=0.0)
    trainer = Trainer(architecture, runtime, settings, 32, True)
    load_hf_weights(trainer.raw, architecture, HFReader(Path(hf_dir)), 1)
    trainer.optimizer.reload_model_params()
    rows = torch.arange(64).view(2, 32)
    batch = {"tokens": rows, "labels": rows + 1, "loss_mask": torch.ones(2, 32), "position_ids": rows % 32}
    names = {p: name for name, p in trainer.raw.named_parameters()}
    before = {name: p.detach().clone() for p, name in names.items()}
    types = {str(p.dtype) for p in names}
    gradient_types = {str(p.main_grad.dtype) for p in names}
    for _ in range(steps):
        trainer.set_learning_rate(lr)
        trainer.step(forward_step, iter([batch]), 1, 2, 32)
        if not keep_masters:
            trainer.optimizer.reload_model_params()
    (inner,) = trainer.optimizer.chained_optimizers
    masters = {names[model]: main for model, main in _pairs(inner)}
    key = "decoder.layers.1.mlp.linear_fc1.weight"
    weight, main, old = dict(trainer.raw.named_parameters())[key].detach(), masters[key].detach(), before[key]
    watched = (old.abs() > 2.0**-5) & (old.abs() < 2.0**-3)
    found = {
        "types": types,
        "gradient_types": gradient_types,
        "master_type": str(main.dtype),
        "watched": int(watched.sum()),
        "changed": float((weight != old)[watched].float().mean()),
        "master_moved": float((main.view(old.shape) - old.float()).abs()[watched].median()),
        "weights_are_rounded_masters": torch.equal(weight, main.view(old.shape).bfloat16()),
    }
    stop()
    return found


def _pairs(optimizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(bf16 parameter, its fp32 master) of a distributed optimizer over one rank."""
    pairs = []
    for models, mains in zip(optimizer.model_float16_groups, optimizer.shard_fp32_from_float16_groups, strict=True):
        pairs += list(zip(models, mains, strict=True))
    return pairs
