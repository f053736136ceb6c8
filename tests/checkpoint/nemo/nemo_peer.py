"""Run by the tests in a process that has the real NeMo: load a checkpoint folder, forward it, save it again.

Everything that reads and writes is NeMo's own. NeMo asks for CUDA and Transformer Engine in places that decide speed,
not numbers; those calls are replaced here, and each says what it is.

Usage: nemo_peer.py CHECKPOINT TOKENS_AND_LOGITS.pt [SAVED_AGAIN]
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import torch


def without_cuda() -> None:
    """Stand-ins for what NeMo calls although there is no device; after NeMo is imported."""
    import nemo.lightning.io.pl
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.Stream = lambda *_, **__: None  # type: ignore[assignment,misc]
    torch.cuda.stream = lambda *_: contextlib.nullcontext()  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    # It moves loaded tensors to the device, which must exist.
    nemo.lightning.io.pl._fix_tensors_device = lambda checkpoint: checkpoint
    # Of dropout, which is 0 here.
    CudaRNGStatesTracker.fork = lambda self, *_: contextlib.nullcontext()  # type: ignore[assignment,method-assign]


def register_tokenizer() -> None:
    """As nemo/lightning/io/registry.py does, which stops before it under transformers 5."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo.lightning.io.artifact import DirOrStringArtifact, FileArtifact
    from nemo.lightning.io.mixin import track_io

    files = [FileArtifact(name, required=False) for name in ("vocab_file", "merges_file")]
    track_io(AutoTokenizer, artifacts=[*files, DirOrStringArtifact("pretrained_model_name", required=False)])


def main(checkpoint: Path, result: Path, again: Path | None) -> None:
    """See the module."""
    # NeMo's Llama classes ask for Transformer Engine's rotary kernel when they are made; it is switched off below.
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils.fused_apply_rotary_pos_emb = object()
    from lightning.pytorch.trainer.states import TrainerFn
    from nemo.collections import llm  # noqa: F401
    from nemo.lightning import MegatronStrategy, Trainer, _strategy_lib, io
    from nemo.lightning.io.connector import ModelConnector

    without_cuda()
    register_tokenizer()
    whole = io.load_context(checkpoint)
    if whole.trainer is not None or whole.extra != {}:
        raise ValueError(f"the context holds {whole.trainer} and {whole.extra}")
    model = io.load_context(checkpoint, subpath="model")
    config = model.config
    seen = {key: value for key, value in vars(config).items() if isinstance(value, (int, float, str, list, bool))}
    print("CONFIG " + json.dumps({"class": type(config).__name__, "model": type(model).__name__, **seen}))
    if model.tokenizer is not None:
        print("TOKENIZER " + json.dumps([model.tokenizer.vocab_size, model.tokenizer.text_to_ids("a c b")]))
    for fused in ("apply_rope", "gradient_accumulation", "masked_softmax", "bias_dropout"):
        setattr(config, f"{fused}_fusion", False)
    config.persist_layer_norm = config.perform_initialization = False
    # Asynchronous saves need a module that Megatron-Core 0.16 no longer has (strategies.tensorstore).
    strategy = MegatronStrategy(ddp="pytorch", setup_optimizers=False, ckpt_async_save=False, ckpt_save_optimizer=False)
    trainer = Trainer(devices=1, accelerator="cpu", strategy=strategy)
    strategy.connect(model)
    strategy.setup_environment()
    with _strategy_lib.megatron_cpu_init_context(config):
        model.configure_model()
    strategy.setup(trainer)
    strategy.load_checkpoint(checkpoint)
    forward(model, result)
    if again is not None:
        trainer.state.fn = TrainerFn.FITTING
        ModelConnector(str(checkpoint)).nemo_save(again, trainer)


@torch.no_grad()
def forward(model: Any, result: Path) -> None:
    """Logits of the tokens in the file, added to it."""
    values = torch.load(result)
    tokens = values["tokens"]
    module = model.module
    while hasattr(module, "module"):
        module = module.module
    length = tokens.shape[1]
    future = torch.triu(torch.ones(1, 1, length, length, dtype=torch.bool), 1)
    logits = module.eval()(tokens, torch.arange(length).expand_as(tokens), future)
    torch.save({**values, "logits": logits.float()}, result)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
