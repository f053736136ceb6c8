"""What each family reads of a configuration, and that it refuses, by file and key, what it cannot represent.

Llama's own tests are in test_llama.py. What transformers writes, and does where a key is absent, transformers is asked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import CASES
from transformers import GraniteConfig, GraniteMoeHybridConfig, MistralConfig, NemotronHConfig, PreTrainedConfig

from prism_nemo.errors import InputError
from prism_nemo.models.catalog import CATALOG
from prism_nemo.models.family import Architecture, Mamba, Rope, architecture_from_hf, family_named, read_hf_config

# Family (and form) -> a published configuration of it, and the class that reads it in transformers.
PUBLISHED: dict[str, tuple[dict[str, Any], type[PreTrainedConfig]]] = {
    "mistral": (CATALOG["mistral-7b-v0.1"].config, MistralConfig),
    "granite": (CATALOG["granite-3.3-8b"].config, GraniteConfig),
    "granite-4": (CATALOG["granite-4.0-micro"].config, GraniteMoeHybridConfig),
    "granite_hybrid": (CATALOG["granite-4.0-h-micro"].config, GraniteMoeHybridConfig),
    "nemotron_h": (CATALOG["nemotron-h-8b"].config, NemotronHConfig),
}
every_family = pytest.mark.parametrize("name", PUBLISHED)
GONE = object()


def read(name: str, /, **changes: Any) -> Architecture:
    """A published configuration with changes, read."""
    values = {**PUBLISHED[name][0], **changes}
    return architecture_from_hf({k: v for k, v in values.items() if v is not GONE}, "here/config.json")


def same_function(a: Architecture, b: Architecture) -> bool:
    return not a.differences(b) and a.max_position_embeddings == b.max_position_embeddings


def written(cls: type[PreTrainedConfig], values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What transformers makes of a configuration and writes."""
    config = cls(**{k: deepcopy(v) for k, v in values.items() if k != "model_type"})  # it edits what it is given
    config.save_pretrained(folder)
    result: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return result


# Reading


@every_family
def test_what_transformers_writes_is_read_as_what_was_published(name: str, tmp_path: Path) -> None:
    values, cls = PUBLISHED[name]
    current = written(cls, values, tmp_path)
    assert current != values
    ours = read_hf_config(tmp_path)
    assert same_function(ours, read(name))
    assert ours.hf_config == current


@pytest.mark.parametrize("case", CASES)
def test_reads_what_transformers_writes_of_a_tiny_model(case: str, tmp_path: Path) -> None:
    cls, values = CASES[case]
    architecture = {
        "LlamaConfig": "LlamaForCausalLM",
        "MistralConfig": "MistralForCausalLM",
        "GraniteConfig": "GraniteForCausalLM",
        "GraniteMoeHybridConfig": "GraniteMoeHybridForCausalLM",
        "NemotronHConfig": "NemotronHForCausalLM",
    }[cls.__name__]
    written(cls, {**values, "architectures": [architecture]}, tmp_path)
    a = read_hf_config(tmp_path)
    scalars = (a.embedding_multiplier, a.residual_multiplier, a.attention_multiplier, a.logits_scaling)
    assert scalars == ((3.0, 0.6, 0.4, 1.7) if case.startswith("granite") else (1.0, 1.0, None, 1.0))
    assert (a.rope is None) == ("nemotron" in case or case in ("granite-hybrid", "granite-hybrid-one-group"))
    assert a.sliding_window == (7 if case == "mistral-window" else None)
    assert (a.hidden_size, a.ffn_hidden_size, a.vocab_size) == (48, 80, 149)
    assert a.kv_channels == (20 if case.startswith(("llama", "mistral", "nemotron")) and case != "llama-tied" else 12)


def test_new_spellings_of_layer_kinds() -> None:
    hybrid = PUBLISHED["granite_hybrid"][0]["layer_types"]
    new = [{"mamba": "linear_attention", "attention": "full_attention"}[kind] for kind in hybrid]
    assert same_function(read("granite_hybrid", layer_types=new), read("granite_hybrid"))
    assert same_function(read("granite_hybrid", layer_types=GONE, layers_block_type=new), read("granite_hybrid"))
    assert same_function(read("granite-4", layer_types=["full_attention"] * 40), read("granite-4"))
    pattern = PUBLISHED["nemotron_h"][0]["hybrid_override_pattern"]
    for kinds in (
        {"M": "mamba", "*": "attention", "-": "mlp"},
        {"M": "linear_attention", "*": "full_attention", "-": "mlp"},
    ):
        changes = {"hybrid_override_pattern": GONE, "layers_block_type": [kinds[symbol] for symbol in pattern]}
        assert same_function(read("nemotron_h", **changes), read("nemotron_h"))
        assert same_function(read("nemotron_h", **{**changes, "num_hidden_layers": GONE}), read("nemotron_h"))


def test_layers_of_the_hybrids() -> None:
    granite, nemotron = read("granite_hybrid"), read("nemotron_h")
    assert granite.num_layers == len(granite.layer_pattern) == 80
    assert granite.layers_of("*") == (10, 30, 50, 70)
    assert granite.layers_of("-") == tuple(range(1, 80, 2))
    assert nemotron.num_layers == 52
    assert nemotron.layers_of("*") == (7, 18, 29, 40)
    assert [len(nemotron.layers_of(kind)) for kind in "M-"] == [24, 24]


def test_granite_4_belongs_to_one_family_by_its_layers() -> None:
    one_mamba = ["attention"] * 39 + ["mamba"]
    mixers = {"mamba_n_heads": 128, "mamba_d_head": 40}
    assert read("granite-4").family == "granite"
    assert read("granite-4", layer_types=one_mamba, **mixers).family == "granite_hybrid"
    assert read("granite_hybrid", layer_types=["attention"] * 40).family == "granite"


@pytest.mark.parametrize("prefix", ["backbone", "model"])
@pytest.mark.parametrize("sharded", [False, True])
def test_nemotron_s_prefix_is_that_of_its_tensors(prefix: str, sharded: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["nemotron_h"][0]))
    names = [f"{prefix}.norm_f.weight", "lm_head.weight"]
    if sharded:
        index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    a = read_hf_config(tmp_path)
    assert a.hf_prefix == prefix
    table = family_named("nemotron_h").weight_table(a, 1)
    assert {name.split(".")[0] for mapping in table for name in mapping.hf} == {prefix, "lm_head"}


def test_dt_limit_in_every_spelling() -> None:
    for name in ("granite_hybrid", "nemotron_h"):
        for spelling, limit in (
            (GONE, (0.0, math.inf)),
            (None, (0.0, math.inf)),
            ([0.0, math.inf], (0.0, math.inf)),
            ([0.0, {"__float__": "Infinity"}], (0.0, math.inf)),
            ([0.001, 0.5], (0.001, 0.5)),
        ):
            mamba = read(name, time_step_limit=spelling).mamba
            assert mamba is not None
            assert mamba.dt_limit == limit


def test_nemotron_s_initialisation_is_not_taken_for_a_limit() -> None:
    mamba = read("nemotron_h", time_step_min=0.01, time_step_max=0.2, time_step_floor=0.02).mamba
    assert mamba is not None
    assert mamba.dt_limit == (0.0, math.inf)


def test_rope_spellings() -> None:
    linear = {"rope_type": "linear", "factor": 2.0}
    expected = Rope(theta=5e5, scaling=linear)
    for changes in (
        {"rope_theta": 5e5, "rope_scaling": linear},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": GONE, "rope_scaling": {**linear, "rope_theta": 5e5}},
        {"rope_theta": GONE, "rope_parameters": {**linear, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {**linear, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": linear},
    ):
        assert read("mistral", **changes).rope == expected
        # The same as transformers makes of it.
        config = MistralConfig(**{k: deepcopy(v) for k, v in changes.items() if v is not GONE})
        theirs = {k: v for k, v in config.rope_parameters.items() if k != "type"}
        assert theirs == {**linear, "rope_theta": 5e5}


# Keys that may be left out

# Key of config.json -> what the architecture makes of it.
FIELDS: dict[str, dict[str, Callable[[Architecture], Any]]] = {
    "mistral": {
        "sliding_window": lambda a: a.sliding_window,
        "num_key_value_heads": lambda a: a.num_query_groups,
        "head_dim": lambda a: a.kv_channels,
        "rms_norm_eps": lambda a: a.norm_epsilon,
        "tie_word_embeddings": lambda a: a.tied_embeddings,
        "max_position_embeddings": lambda a: a.max_position_embeddings,
        "rope_theta": lambda a: a.rope and a.rope.theta,
    },
    "granite": {
        "num_key_value_heads": lambda a: a.num_query_groups,
        "rms_norm_eps": lambda a: a.norm_epsilon,
        "tie_word_embeddings": lambda a: a.tied_embeddings,
        "max_position_embeddings": lambda a: a.max_position_embeddings,
        "embedding_multiplier": lambda a: a.embedding_multiplier,
        "residual_multiplier": lambda a: a.residual_multiplier,
        "attention_multiplier": lambda a: a.attention_multiplier,
        "logits_scaling": lambda a: a.logits_scaling,
        "rope_theta": lambda a: a.rope and a.rope.theta,
    },
    "granite_hybrid": {
        "mamba_n_heads": lambda a: a.mamba and a.mamba.heads,
        "mamba_d_head": lambda a: a.mamba and a.mamba.head_dim,
        "mamba_d_state": lambda a: a.mamba and a.mamba.state_size,
        "mamba_n_groups": lambda a: a.mamba and a.mamba.groups,
        "mamba_d_conv": lambda a: a.mamba and a.mamba.conv_kernel,
        "mamba_conv_bias": lambda a: a.mamba and a.mamba.conv_bias,
        "mamba_chunk_size": lambda a: a.mamba and a.mamba.chunk_size,
        "time_step_limit": lambda a: a.mamba and a.mamba.dt_limit,
    },
    "nemotron_h": {
        "num_key_value_heads": lambda a: a.num_query_groups,
        "num_attention_heads": lambda a: a.num_attention_heads,
        "vocab_size": lambda a: a.vocab_size,
        "intermediate_size": lambda a: a.ffn_hidden_size,
        "layer_norm_epsilon": lambda a: a.norm_epsilon,
        "tie_word_embeddings": lambda a: a.tied_embeddings,
        "max_position_embeddings": lambda a: a.max_position_embeddings,
        "head_dim": lambda a: a.kv_channels,
        "mamba_num_heads": lambda a: a.mamba and a.mamba.heads,
        "mamba_head_dim": lambda a: a.mamba and a.mamba.head_dim,
        "ssm_state_size": lambda a: a.mamba and a.mamba.state_size,
        "n_groups": lambda a: a.mamba and a.mamba.groups,
        "conv_kernel": lambda a: a.mamba and a.mamba.conv_kernel,
        "use_conv_bias": lambda a: a.mamba and a.mamba.conv_bias,
        "chunk_size": lambda a: a.mamba and a.mamba.chunk_size,
        "time_step_limit": lambda a: a.mamba and a.mamba.dt_limit,
    },
}  # fmt: skip
FIELDS["granite-4"] = {**FIELDS["granite"], "shared_intermediate_size": lambda a: a.ffn_hidden_size}
FIELDS["granite_hybrid"] = {
    **{key: value for key, value in FIELDS["granite-4"].items() if key != "rope_theta"}, **FIELDS["granite_hybrid"]
}  # fmt: skip
# Where leaving out one key alone would contradict others.
ALSO: dict[str, dict[str, Any]] = {"mamba_n_heads": {"mamba_d_head": "auto"}, "head_dim": {"attention_head_dim": GONE}}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in FIELDS.items() for key in keys])
def test_defaults_are_those_of_transformers(name: str, key: str) -> None:
    values, cls = PUBLISHED[name]
    changes = {key: GONE, **ALSO.get(key, {})}
    left = {k: v for k, v in {**values, **changes}.items() if v is not GONE and k != "model_type"}
    config = cls(**left)
    theirs = config.rope_parameters["rope_theta"] if key == "rope_theta" else getattr(config, key)
    assert FIELDS[name][key](read(name, **changes)) == theirs


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, keys in FIELDS.items() for k in keys if k in PUBLISHED[n][0]])
def test_every_value_is_read(name: str, key: str) -> None:
    """A reader that always gave the default would pass the test above."""
    other: dict[str, Any] = {"tie_word_embeddings": not PUBLISHED[name][0].get("tie_word_embeddings")}
    sizes = {"mamba_n_heads": 32, "mamba_d_head": 32, "mamba_n_groups": 2, "num_key_value_heads": 4, "n_groups": 4}
    value = other.get(key, sizes.get(key, 16))
    if key.endswith("conv_bias"):
        value = False
    also = {"mamba_n_heads": {"mamba_d_head": 128}, "mamba_d_head": {"mamba_n_heads": 128}}.get(key, {})
    if key == "layer_norm_epsilon":
        also = {"rms_norm_eps": 16}
    assert FIELDS[name][key](read(name, **{key: value, **also})) == value


def test_a_window_that_is_null_is_none_and_one_that_is_absent_is_the_class_s() -> None:
    assert read("mistral", sliding_window=None).sliding_window is None
    assert read("mistral", sliding_window=GONE).sliding_window == MistralConfig().sliding_window == 4096
    assert read("mistral", sliding_window=512).sliding_window == 512


@pytest.mark.parametrize("kind", [GONE, None, "nope"])
def test_granite_4_has_no_positions_unless_the_file_says_rope(kind: Any) -> None:
    assert read("granite-4", position_embedding_type=kind).rope is None
    assert read("granite_hybrid", position_embedding_type=kind).rope is None


def test_granite_4_with_positions() -> None:
    assert read("granite-4").rope == Rope(theta=1e7)
    assert read("granite_hybrid", position_embedding_type="rope").rope == Rope(theta=10000.0)


def test_granite_4_without_the_key_is_all_mamba() -> None:
    config = GraniteMoeHybridConfig(num_hidden_layers=3)
    a = read("granite_hybrid", layer_types=GONE, num_hidden_layers=3)
    assert a.layer_pattern == "M-" * 3
    assert config.layer_types == ["linear_attention"] * 3


def test_a_missing_count_of_experts_is_refused_because_the_class_has_some() -> None:
    assert GraniteMoeHybridConfig().num_local_experts == 8
    for name in ("granite-4", "granite_hybrid"):
        with pytest.raises(InputError, match=r"here/config\.json: num_local_experts is 8; mixtures"):
            read(name, num_local_experts=GONE)


def test_a_missing_pattern_is_refused_because_the_class_has_experts_in_it() -> None:
    assert "moe" in NemotronHConfig().layers_block_type
    with pytest.raises(InputError, match=r"here/config\.json: hybrid_override_pattern or layers_block_type must"):
        read("nemotron_h", hybrid_override_pattern=GONE)


# Refusals

NEMOTRON = PUBLISHED["nemotron_h"][0]["hybrid_override_pattern"]
DENSE: list[dict[str, Any]] = [
    {"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}, {"hidden_act": "relu2"},
    {"quantization_config": {"bits": 4}}, {"num_key_value_heads": 7},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": True}},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}},
    {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"partial_rotary_factor": 0.5}, {"attention_sinks": 4}, {"qk_norm": True},
    {"num_nextn_predict_layers": 1}, {"architectures": "MistralForCausalLM"}, {"architectures": 5},
]  # fmt: skip
GRANITE_4: list[dict[str, Any]] = [
    *DENSE, {"num_local_experts": 4}, {"normalization_function": "layernorm"}, {"position_embedding_type": "alibi"},
    {"layer_types": ["attention"] * 39}, {"layer_types": ["attention"] * 41}, {"layer_types": "attention"},
    {"layer_types": 5}, {"layer_types": ["attention"] * 39 + ["sliding_attention"]},
    {"layer_types": ["attention"] * 39 + [["mamba"]]}, {"layers_block_type": ["moe"] * 40}, {"sliding_window": 4096},
]  # fmt: skip
REFUSED: dict[str, list[dict[str, Any]]] = {
    "mistral": [
        *DENSE, {"attention_dropout": 0.1}, {"layer_types": ["full_attention"] * 32}, {"logits_scaling": 8.0},
        {"residual_multiplier": 0.22}, {"num_local_experts": 8}, {"sliding_window": 0}, {"use_sliding_window": True},
    ],
    "granite": [*DENSE, {"num_local_experts": 8}, {"sliding_window": 4096}, {"shared_intermediate_size": 512}],
    "granite-4": GRANITE_4,
    "granite_hybrid": [
        *GRANITE_4, {"mamba_proj_bias": True}, {"mamba_expand": 3}, {"mamba_d_head": 32}, {"mamba_n_heads": 32},
        {"mamba_n_groups": 3}, {"mamba_d_head": "manual"}, {"mamba_use_mlp": True},
        {"time_step_limit": [0.5, 0.001]}, {"time_step_limit": [math.nan, 1.0]}, {"time_step_limit": [0.0]},
        {"time_step_limit": 0.001}, {"time_step_limit": [False, 1.0]}, {"time_step_limit": [0.0, {"__float__": "NaN"}]},
    ],
    "nemotron_h": [
        {"attention_bias": True}, {"mlp_bias": True}, {"use_bias": True}, {"mamba_proj_bias": True},
        {"mlp_hidden_act": "silu"}, {"mlp_hidden_act": "swiglu"}, {"hidden_act": "silu"}, {"mamba_hidden_act": "relu"},
        {"num_nextn_predict_layers": 1}, {"sliding_window": 4096},
        {"position_embedding_type": "rope"}, {"attention_dropout": 0.1}, {"hidden_dropout": 0.1},
        {"quantization_config": {"bits": 8}}, {"mlp_gate": True}, {"logits_scaling": 2.0},
        {"hybrid_override_pattern": NEMOTRON.replace("-", "E", 1)},
        {"hybrid_override_pattern": NEMOTRON.replace("-", "|", 1)}, {"hybrid_override_pattern": NEMOTRON + "-"},
        {"hybrid_override_pattern": NEMOTRON[:-1]}, {"hybrid_override_pattern": ""}, {"hybrid_override_pattern": 5},
        {"layers_block_type": ["mlp"] * 52}, {"layers_block_type": ["moe"] * 52}, {"layer_types": [["M"]] * 52},
        {"num_hidden_layers": 51}, {"n_groups": 3}, {"num_key_value_heads": 5}, {"head_dim": 64},
        {"num_query_groups": 4}, {"rms_norm_eps": 1e-6}, {"time_step_limit": [0.001]}, {"architectures": {"a": 1}},
        {"mamba_n_groups": 4},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, all_changes in REFUSED.items() for changes in all_changes],
    ids=lambda value: value if isinstance(value, str) else json.dumps(value)[:60],
)
def test_refuses_what_would_be_another_function(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        read(name, **changes)
    message, key = str(caught.value), next(iter(changes))
    assert message.startswith("here/config.json: ")
    # A nested value is named by what is wrong in it, a layer kind by the list that all of its spellings share.
    names = {"rope_parameters": "rope|rotary", "rope_scaling": "rope|rotary", "layers_block_type": "layer"}
    assert re.search(names.get(key, key), message), message
    assert caught.value.exit_code == 2


SIZES = {
    "mistral": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "granite": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "granite-4": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "granite_hybrid": ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    "nemotron_h": ("hidden_size",),
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in SIZES.items() for key in keys])
@pytest.mark.parametrize("value", [GONE, None])
def test_refuses_a_missing_size(name: str, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"here/config.json: key '{key}' is (missing|null)"):
        read(name, **{key: value})


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in FIELDS.items() for key in keys])
@pytest.mark.parametrize("value", ["many", math.nan, math.inf, [1], {"a": 1}], ids=str)
def test_refuses_a_value_of_the_wrong_type(name: str, key: str, value: Any) -> None:
    with pytest.raises(InputError, match=r"here/config\.json: .*" + ("rotary|rope_theta" if "rope" in key else key)):
        read(name, **{key: value})


FLAGS = ("tie_word_embeddings", "mamba_conv_bias", "use_conv_bias")


@pytest.mark.parametrize(("name", "key"), [(n, key) for n, keys in FIELDS.items() for key in keys if key not in FLAGS])
def test_refuses_true_for_a_number(name: str, key: str) -> None:
    with pytest.raises(InputError, match=key):
        read(name, **{key: True})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_attention_heads"])
@every_family
def test_refuses_a_size_below_one(name: str, key: str) -> None:
    for value in (0, -1, 1.5):
        with pytest.raises(InputError, match=f"here/config.json: {key} is {value}"):
            read(name, **{key: value})


# Both ways, and layouts


@every_family
def test_architecture_survives_its_manifest(name: str) -> None:
    a = read(name)
    for architecture in (a, replace(a, mamba=a.mamba and replace(a.mamba, dt_limit=(0.001, 0.5)))):
        again = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
        assert again == architecture
        assert hash(again.mamba) == hash(architecture.mamba)  # a tuple, not a list


def test_infinity_survives_the_manifest() -> None:
    a = read("nemotron_h", time_step_limit=[0.0, {"__float__": "Infinity"}])
    again = Architecture.from_dict(json.loads(json.dumps(a.to_dict())))
    assert isinstance(again.mamba, Mamba)
    assert again.mamba.dt_limit == (0.0, math.inf)
    assert again.hf_config == a.hf_config


@pytest.mark.parametrize(
    ("name", "changes", "sizes"),
    [
        ("mistral", {}, [1, 2, 4, 8]),
        ("granite-4", {}, [1, 2, 4, 8]),
        ("granite_hybrid", {}, [1, 2, 4, 8]),  # one group: B and C are every rank's own
        ("granite_hybrid", {"mamba_n_heads": 4, "mamba_d_head": 1024}, [1, 2, 4]),
        ("granite_hybrid", {"mamba_n_heads": 96, "mamba_d_head": 128, "mamba_n_groups": 3, "mamba_expand": 6}, [1]),
        ("granite_hybrid", {"shared_intermediate_size": 8190}, [1, 2]),
        ("nemotron_h", {}, [1, 2, 4, 8]),
        ("nemotron_h", {"n_groups": 2}, [1, 2, 4, 8]),
        ("nemotron_h", {"num_key_value_heads": 2}, [1, 2]),
    ],
)
def test_layouts_that_fit(name: str, changes: dict[str, Any], sizes: list[int]) -> None:
    a = read(name, **changes)
    assert a.tensor_parallel_sizes() == sizes
    for tp in range(1, 17):
        if tp in sizes:
            a.check_layout(tp, 1)
            assert family_named(a.family).weight_table(a, tp)
        else:
            with pytest.raises(InputError, match=re.escape(f"tensor_model_parallel_size {tp} ")) as caught:
                a.check_layout(tp, 1)
            assert str(caught.value).endswith(f"these do: {sizes}")


def test_a_layout_that_does_not_fit_names_what_it_must_divide() -> None:
    a = read("granite_hybrid", mamba_n_heads=4, mamba_d_head=1024)
    with pytest.raises(InputError, match=r"32 attention heads, 8 key/value .* 8192, 4 Mamba heads in 1 groups; these"):
        a.check_layout(8, 1)


@pytest.mark.parametrize(("name", "layers"), [("granite-4", 40), ("granite_hybrid", 80), ("nemotron_h", 52)])
def test_pipeline_sizes_divide_megatron_s_layers(name: str, layers: int) -> None:
    for pp in range(1, 100):
        if layers % pp:
            with pytest.raises(InputError, match=f"pipeline_model_parallel_size {pp} does not divide {layers} layers"):
                read(name).check_layout(1, pp)
        else:
            read(name).check_layout(1, pp)
