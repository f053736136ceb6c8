"""What the family reads, and that it refuses, by name, whatever it cannot represent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import LLAMA3
from transformers import LlamaConfig

from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture, Rope, architecture_from_hf, family_named, read_hf_config

# Llama 3.2 1B, as its config.json says it (old spelling).
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def read(**changes: Any) -> Architecture:
    config = {**LLAMA_3_2_1B, **changes}
    return architecture_from_hf({k: v for k, v in config.items() if v != "REMOVED"}, "here/config.json")


def test_reads_a_real_configuration() -> None:
    a = read()
    assert (a.family, a.vocab_size, a.hidden_size, a.ffn_hidden_size, a.num_layers) == ("llama", 128256, 2048, 8192, 16)
    assert (a.num_attention_heads, a.num_query_groups, a.kv_channels) == (32, 8, 64)
    assert (a.norm_epsilon, a.tied_embeddings, a.max_position_embeddings) == (1e-5, True, 131072)
    assert a.rope == Rope(theta=500000.0, scaling=LLAMA_3_2_1B["rope_scaling"])
    assert a.hf_config == LLAMA_3_2_1B


def test_reads_what_transformers_writes(tmp_path: Path) -> None:
    LlamaConfig(architectures=["LlamaForCausalLM"], rope_parameters=LLAMA3, num_hidden_layers=3).save_pretrained(
        tmp_path
    )
    a = read_hf_config(tmp_path)
    assert a.num_layers == 3
    assert a.rope == Rope(theta=100.0, scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"})


def test_defaults_of_keys_that_may_be_left_out() -> None:
    left_out = ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "tie_word_embeddings", "rms_norm_eps")
    a = read(**dict.fromkeys(left_out, "REMOVED"))
    defaults = LlamaConfig()
    assert (a.num_query_groups, a.kv_channels, a.tied_embeddings) == (32, 64, False)
    assert a.norm_epsilon == defaults.rms_norm_eps
    assert a.rope == Rope(theta=defaults.rope_parameters["rope_theta"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"logits_scaling": 8.0}, "logits_scaling"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "longrope", "long_factor": []}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": "no-such"}}, "'no-such' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, r"missing \['factor'\]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"missing \['low_freq_factor', 'high_freq_factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}}, r"not understood \['beta_fast'\]"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide 32 heads"),
        ({"vocab_size": "REMOVED"}, "key 'vocab_size' is missing"),
        ({"hidden_size": "REMOVED"}, "key 'hidden_size' is missing"),
        ({"intermediate_size": "REMOVED"}, "key 'intermediate_size' is missing"),
        ({"num_hidden_layers": "REMOVED"}, "key 'num_hidden_layers' is missing"),
        ({"num_attention_heads": "REMOVED"}, "key 'num_attention_heads' is missing"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_refuses_what_would_be_another_function(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read(**changes)
    assert "here/config.json" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": "many"},
        {"num_hidden_layers": None},
        {"rope_theta": "high"},
        {"rope_scaling": "linear"},
    ],
    ids=json.dumps,
)
def test_refuses_a_value_of_the_wrong_type(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"here/config\.json"):
        read(**changes)


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 0}, {"num_attention_heads": 0}, {"vocab_size": -1}], ids=json.dumps
)
def test_refuses_a_size_below_one(changes: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(changes))):
        read(**changes)


@pytest.mark.parametrize("names", [["GPT2LMHeadModel"], [], None])
def test_refuses_an_architecture_that_no_family_claims(names: list[str] | None) -> None:
    with pytest.raises(InputError, match=r"unknown architecture .*supported: .*'LlamaForCausalLM'"):
        read(architectures=names)


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown model family 'gpt9'; known: .*llama"):
        family_named("gpt9")


def test_architecture_survives_its_manifest() -> None:
    for architecture in (read(), read(rope_scaling=None)):
        assert Architecture.from_dict(json.loads(json.dumps(architecture.to_dict()))) == architecture


@pytest.mark.parametrize(("vocab", "tp", "padded"), [(301, 1, 301), (301, 2, 302), (301, 4, 304), (304, 4, 304)])
def test_padded_vocabulary(vocab: int, tp: int, padded: int) -> None:
    assert read(vocab_size=vocab).padded_vocab_size(tp) == padded


def test_layouts_that_fit_pass() -> None:
    for tp, pp in ((1, 1), (2, 4), (8, 16)):
        read().check_layout(tp, pp)


@pytest.mark.parametrize(
    ("changes", "tp", "pp", "message"),
    [
        ({}, 16, 1, r"tensor_model_parallel_size 16 .*8 key/value heads.*these do: \[1, 2, 4, 8\]"),
        ({}, 3, 1, r"tensor_model_parallel_size 3 .*32 attention heads"),
        ({"intermediate_size": 8190}, 4, 1, r"MLP width 8190; these do: \[1, 2\]"),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}, 2, 1, r"these do: \[1, 3\]"),
        ({}, 1, 3, r"pipeline_model_parallel_size 3 does not divide 16 layers; these do: \[1, 2, 4, 8, 16\]"),
        ({}, 1, 32, r"pipeline_model_parallel_size 32 .*these do: \[1, 2, 4, 8, 16\]"),
    ],
)
def test_layouts_that_do_not_fit_name_those_that_do(changes: dict[str, Any], tp: int, pp: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(**changes).check_layout(tp, pp)
