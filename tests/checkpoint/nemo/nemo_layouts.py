"""NeMo checkpoint folders as NeMo makes them, without NeMo: weights by Megatron, contexts recorded from NeMo 2.7.3.

``recorded/`` holds what NeMo 2.7.3 wrote (TrainerContext.io_dump) for three tiny models: Llama31Config with a scale
factor of 32 and a tokenizer, MistralConfig7B with its default window, NemotronHConfigBase with its lambda. The sizes
are those of `tiny_models`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from prism_nemo.checkpoint.convert import load_hf_weights
from prism_nemo.checkpoint.hf import HFReader
from prism_nemo.config import ParallelConfig
from prism_nemo.models.build import build_model
from prism_nemo.models.family import read_hf_config
from prism_nemo.runtime import start, stop
from prism_nemo.runtime.launch import launch

RECORDED = Path(__file__).with_name("recorded")
LLAMA = "nemo.collections.llm.gpt.model.llama.LlamaConfig"


def copied_context(name: str, folder: Path) -> Path:
    """A recorded context in a folder of its own, beside empty weights that nobody reads."""
    shutil.copytree(RECORDED / name, folder / "context")
    (folder / "weights").mkdir()
    return folder


def edit_yaml(context: Path, changes: dict[str, Any], drop: tuple[str, ...] = ()) -> None:
    """Change ``model.yaml`` and leave it as the only description."""
    (context / "io.json").unlink(missing_ok=True)
    path = context / "model.yaml"
    model = yaml.safe_load(path.read_text())
    model["config"] = {k: v for k, v in model["config"].items() if k not in drop} | changes
    path.write_text(yaml.safe_dump(model))


def llama_context(folder: Path, **changes: Any) -> None:
    """Context of ``tiny_models``' llama: the recorded one, of the plain class."""
    shutil.copytree(RECORDED / "llama31", folder / "context")
    scaling = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
    edit_yaml(folder / "context", {"_target_": LLAMA, "rotary_base": 100, **changes}, drop=scaling)


def save_as_nemo(
    hf: Path, folder: Path, tp: int = 1, metadata: dict[str, Any] | None = None, optimizer: bool = False
) -> Path:
    """Weights of a Hugging Face folder, saved by Megatron with NeMo's keys into ``folder/weights``.

    Args:
        hf: The model.
        folder: Of the checkpoint.
        tp: Tensor-parallel size of the save; pads the vocabulary.
        metadata: How Megatron makes the sharded state dict.
        optimizer: Whether moments are saved, too, under the keys that they have.
    """
    (folder / "weights").mkdir(parents=True)
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    launch(_save, str(hf), str(folder / "weights"), metadata or {}, optimizer, parallel, processes=tp)
    return folder


def _save(hf: str, weights: str, metadata: dict[str, Any], optimizer: bool, parallel: ParallelConfig) -> None:
    runtime = start(parallel, seed=0)
    architecture = read_hf_config(Path(hf))
    model = build_model(architecture, runtime)
    load_hf_weights(model, architecture, HFReader(Path(hf)), parallel.tensor_model_parallel_size)
    with torch.no_grad():  # padding is trained along with the rest: anything but zeros
        for name in ("embedding.word_embeddings", "output_layer"):
            model.get_submodule(name).weight[model.real_rows :] = 9.0
    state = model.sharded_state_dict(prefix="module.", metadata=metadata)
    content: dict[str, Any] = {"state_dict": state, "epoch": 0, "global_step": 7}
    if optimizer:
        content["optimizer"] = {
            f"exp_avg.{name}": ShardedTensor.from_rank_offsets(f"optimizer.state.exp_avg.module.{name}", parameter * 0)
            for name, parameter in model.named_parameters()
        }
    dist_checkpointing.save(content, weights, content_metadata=metadata)
    stop()
