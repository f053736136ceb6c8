"""A model, a tokenizer and data that train in a second; shared by the tests of training, rl, evaluation and generation.

Not in conftest.py, whose name other folders of tests use as well; processes that `launch` starts import it too.
"""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from prism_nemo.config import (
    CheckpointConfig,
    DataConfig,
    MidtrainConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
)
from prism_nemo.data.build import build_mixture
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.tokenizer import Tokenizer, save_tokenizer
from prism_nemo.run import read_metrics

SPECIAL = ["<pad>", "<eos>", "<think>", "</think>"]
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"

# The vocabulary is odd on purpose: at tensor_model_parallel_size 2 it is padded, and the padding must not be seen.
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 255,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}

STEPS = 10
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2": ParallelConfig(tensor_model_parallel_size=2),
    "TP2 SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "DP2": ParallelConfig(data_parallel_size=2),
    "TP2 PP2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    "PP2 VPP2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "CP2": ParallelConfig(context_parallel_size=2),
    # Buckets of a part of a layer, so that there are many to be in flight.
    "DP2 overlap": ParallelConfig(
        data_parallel_size=2, overlap_grad_reduce=True, overlap_param_gather=True, bucket_size=9000
    ),
}


def character_tokenizer(folder: Path) -> Tokenizer:
    """One token per character and four special tokens: 100 ids."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(SPECIAL)
    return save_tokenizer(inner, folder)


def write_texts(path: Path, letters: str, documents: int) -> Path:
    """JSONL of random words over few letters; a small model learns the letters within a few steps."""
    rng = random.Random(path.name)
    lines = []
    for _ in range(documents):
        words = ("".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(rng.randint(8, 60)))
        lines.append(json.dumps({"text": " ".join(words)}) + "\n")
    path.write_text("".join(lines))
    return path


def build_data(folder: Path) -> Path:
    """Two sources, 70 and 30 %, and a held-out one, tokenised into ``folder/tokens``; a tokenizer in ``folder``."""
    tokenizer = character_tokenizer(folder / "tokenizer")
    sources = [
        Source("letters", "general", [str(write_texts(folder / "letters.jsonl", "abcdef", 60))], 0.7),
        Source("digits", "math", [str(write_texts(folder / "digits.jsonl", "0123456789", 60))], 0.3),
        Source("held", "general", [str(write_texts(folder / "held.jsonl", "abcdef", 20))], 0.0),
    ]
    build_mixture(Mixture("tiny", sources), tokenizer, folder / "tokens")
    return folder / "tokens"


def write_llama(folder: Path, seed: int = 0, std: float = 0.06, **changes: Any) -> Path:
    """A random Hugging Face model; norm gains are not 1, so that a gain that is lost or decayed shows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    values = {k: v for k, v in {**LLAMA, **changes}.items() if k not in ("architectures", "model_type")}
    model = LlamaForCausalLM(LlamaConfig(**values, initializer_range=std))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(folder)
    return folder


def midtrain_config(run_dir: Path, data: Path, init_from: Path | None, **changes: Any) -> MidtrainConfig:
    """Ten steps of 8 x 32 tokens.

    ``adam_eps`` 1e-4: with 1e-8 Adam divides near-zero gradients by their own rounding and layouts differ by 1e-3 in
    the loss after 20 steps instead of 1e-5 (shared/reference/megatron_on_cpu.md, section 4).
    """
    values: dict[str, Any] = {
        "run_dir": str(run_dir),
        "init_from": None if init_from is None else str(init_from),
        "data": DataConfig(path=str(data), validation_source="held", validation_rows=8),
        "optimizer": OptimizerConfig(lr=1e-2, adam_eps=1e-4),
        "schedule": ScheduleConfig(lr_warmup_steps=3),
        "checkpoint": CheckpointConfig(save_interval=4, keep=10),
        "train_steps": STEPS,
        "seq_length": 32,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "eval_interval": 5,
        "log_interval": 1,
        **changes,
    }
    return MidtrainConfig(**values)


CLOCK = ("seconds", "tokens_per_second", "sampling_seconds", "busy_seconds", "busy_seconds_max", "tflops", "memory_gb")


def numbers(run_dir: Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics without those that a clock decides."""
    return [
        {name: value for name, value in line.items() if name not in CLOCK and not name.endswith("_seconds")}
        for line in read_metrics(Path(run_dir) / "metrics.jsonl")
    ]


def column(run_dir: Path | str, name: str) -> list[float]:
    """One value of every line that has it."""
    return [line[name] for line in numbers(run_dir) if name in line]
