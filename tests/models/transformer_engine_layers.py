"""The layers that a GPU run builds, with a stand-in for Transformer Engine (stand_in/), beside those of a CPU run.

A program: ``transformer_engine_layers.py REQUEST.json``, by itself or as each rank of torchrun. Megatron decides when
it is imported whether Transformer Engine is there, so that no process which has imported it already can do this.
"""

# ruff: noqa: E402

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "stand_in"), str(HERE.parent), str(HERE.parent / "training")]

import torch
import torch.distributed as dist
from layout_workers import packed_row
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TELayerNormColumnParallelLinear
from tiny_models import hf_model
from training_workers import _trainer

from prism_nemo.checkpoint import native
from prism_nemo.checkpoint.gathered import gathered_hf_tensors
from prism_nemo.config import OptimizerConfig, ParallelConfig, RecomputeConfig
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.requests import Request, SamplingParams
from prism_nemo.generation.score import Row, score_rows
from prism_nemo.models.forward import forward_logits
from prism_nemo.models.recompute import recompute_fields
from prism_nemo.runtime import Runtime, start, stop
from prism_nemo.training.midtrain import forward_step

VOCABULARY = 149
DOCUMENTS = [[7, 12, 1, 20], [40], [3, 3, 30, 4], [22, 18], [9, 31], [40], [1, 39], [16, 24]]
_OPTIMIZER = OptimizerConfig(lr=1e-3, adam_eps=1e-4)


def _steps(trainer: Any, number: int, count: int) -> list[float]:
    """Losses and gradient norms of updates on packed rows, two rows of each replica in every step."""
    replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = []
    for step in range(number, number + count):
        rows = [packed_row(VOCABULARY, DOCUMENTS[(step + i) % len(DOCUMENTS)]) for i in range(2 * replicas)]
        mine = rows[2 * replica : 2 * replica + 2]
        trainer.set_learning_rate(_OPTIMIZER.lr)
        result = trainer.step(forward_step, iter(mine), len(mine), 1, 40)
        found += [result.sums["loss"] / result.sums["tokens"], result.grad_norm]
    return found


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in gathered_hf_tensors(trainer.raw)}


def _difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    if a.keys() != b.keys():
        raise AssertionError(sorted(a.keys() ^ b.keys()))
    return max((a[name] - b[name]).abs().max().item() for name in a)


def _from_transformers(trainer: Any, folder: str) -> float:
    """Largest difference of a logit from transformers' model."""
    tokens = torch.randint(VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(1))
    logits = forward_logits(trainer.raw, tokens)
    with torch.no_grad():
        expected = hf_model(folder)(tokens).logits
    found = torch.zeros(()) if logits is None else (logits[..., :VOCABULARY] - expected).abs().max()
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.item()


def _written(trainer: Any) -> list[Any]:
    """Greedy responses of the rollout engine, which reads the weights by name, and what scoring says to them."""
    trainer.model.eval()
    requests = [Request(prompt, SamplingParams(8, 0.0)) for prompt in ([3, 17, 101, 4, 9], [88, 2, 61])]
    responses = Engine(trainer.raw).generate(requests)
    rows = [Row(tuple(r.prompt + r.tokens), len(r.prompt)) for r in responses]
    scored = score_rows(trainer.raw, rows)
    trainer.model.train()
    numbers = [x for r, s in zip(responses, scored, strict=True) for x in (*r.logprobs, *s.logprobs)]
    return [[r.tokens for r in responses], numbers]


def compare(folder: str, runtime: Runtime, recompute: RecomputeConfig, scratch: Path) -> dict[str, Any]:
    """Forward, updates, and checkpoints that go from one kind of layers to the other."""
    layout = runtime.parallel
    kinds = {"te": replace(runtime, transformer_engine=True), "local": runtime}
    fields = recompute_fields(recompute)

    def make(kind: str) -> Any:
        return _trainer(folder, layout, _OPTIMIZER, True, kinds[kind], **fields)

    trainers = {kind: make(kind) for kind in kinds}
    modules = [type(module) for module in trainers["te"].raw.modules()]
    found: dict[str, Any] = {
        "layers": modules.count(TELayerNormColumnParallelLinear),
        "attention": modules.count(TEDotProductAttention),
        "optimizer": type(getattr(trainers["te"].optimizer, "optimizer", None)).__name__,
        "local layers": sum(m is TELayerNormColumnParallelLinear for m in map(type, trainers["local"].raw.modules())),
    }
    if layout.context_parallel_size == 1:
        found["from transformers"] = _from_transformers(trainers["te"], folder)
        found["written"] = {kind: _written(trainer) for kind, trainer in trainers.items()}
    found["steps"] = {kind: _steps(trainer, 0, 3) for kind, trainer in trainers.items()}
    found["weights"] = _difference(*(_weights(trainer) for trainer in trainers.values()))
    architecture = trainers["te"].raw.architecture
    keys = {}
    for kind, trainer in trainers.items():
        state = native.TrainState(step=3)
        native.save(scratch / kind / "step_00000003", trainer.raw, architecture, trainer.optimizer, state)
        metadata = torch.distributed.checkpoint.FileSystemReader(scratch / kind / "step_00000003").read_metadata()
        keys[kind] = {key for key in metadata.state_dict_metadata if "_extra_state" not in key}
    found["other keys"] = sorted(keys["te"] ^ keys["local"])
    for kind, other in (("te", "local"), ("local", "te")):
        again = make(kind)
        native.load(scratch / other / "step_00000003", again.raw, again.optimizer)
        found[f"{other} loaded into {kind}"] = _steps(again, 3, 2)
        found[f"{other} goes on"] = _steps(trainers[other], 3, 2)
    return found


def main() -> None:
    """Write what was found for each case to the request's file."""
    request = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    runtime = start(ParallelConfig(**request["parallel"]), seed=1)
    recompute, out = RecomputeConfig(**request["recompute"]), Path(request["out"])
    found = {
        name: compare(folder, runtime, recompute, out.parent / f"checkpoints-{name}")
        for name, folder in request["cases"].items()
    }
    if runtime.is_main:
        out.write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
