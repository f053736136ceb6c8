"""The description of a model: NeMo's own files, and files that lie, contradict each other or want to run something."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from nemo_layouts import copied_context, edit_yaml

from prism_nemo.checkpoint.nemo.context import ModelContext, read_context
from prism_nemo.checkpoint.nemo.folder import NemoFolder, read_common
from prism_nemo.checkpoint.nemo.io_json import Call, IoJson, Opaque, Symbol
from prism_nemo.checkpoint.nemo.reading_config import architecture_of
from prism_nemo.errors import InputError
from prism_nemo.models.family import Architecture


def parts(root: Path) -> NemoFolder:
    return NemoFolder(root, root / "weights", root / "context")


def architecture(root: Path) -> Architecture:
    return architecture_of(read_context(parts(root)), 149, {})


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_sparse_io_json_takes_the_rest_from_model_yaml(tmp_path: Path) -> None:
    root = copied_context("llama31", tmp_path / "c")
    given = IoJson(root / "context" / "io.json").model()
    assert given.arguments["config"].target.endswith("llama.Llama31Config")
    assert "low_freq_factor" not in given.arguments["config"].arguments
    a = architecture(root)
    assert a.family == "llama"
    assert a.rope is not None
    assert a.rope.theta == 500000.0
    assert a.rope.scaling == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192.0,
    }
    assert (a.num_layers, a.kv_channels, a.ffn_hidden_size, a.num_query_groups) == (4, 20, 80, 2)


def test_mistral_has_the_window_that_nemo_computes(tmp_path: Path) -> None:
    # Megatron's [4096, 0] is 4096 positions to the left and the token itself.
    assert architecture(copied_context("mistral", tmp_path / "c")).sliding_window == 4097


def test_nemotron_h_is_told_by_its_lambda(tmp_path: Path) -> None:
    a = architecture(copied_context("hybrid", tmp_path / "c"))
    assert (a.family, a.layer_pattern, a.activation, a.rope) == ("nemotron_h", "M-M*-MM-", "relu2", None)
    assert a.mamba is not None
    assert (a.mamba.heads, a.mamba.head_dim, a.mamba.groups, a.mamba.state_size) == (
        8,
        12,
        2,
        8,
    )


@pytest.mark.parametrize("name", ["llama31", "mistral", "hybrid"])
def test_without_model_yaml_defaults_of_classes_are_not_guessed(name: str, tmp_path: Path) -> None:
    root = copied_context(name, tmp_path / "c")
    (root / "context" / "model.yaml").unlink()
    with pytest.raises(InputError, match="does not say normalization"):
        architecture(root)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("mistral", "window_size"),
        ("llama31", "low_freq_factor"),
        ("llama31", "rotary_base"),
        ("hybrid", "normalization"),
    ],
)
def test_a_missing_field_that_matters_is_refused(name: str, field: str, tmp_path: Path) -> None:
    root = copied_context(name, tmp_path / "c")
    edit_yaml(root / "context", {}, drop=(field,))
    with pytest.raises(InputError, match=f"does not say {field}"):
        architecture(root)


def test_files_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    root = copied_context("llama31", tmp_path / "c")
    path = root / "context" / "model.yaml"
    path.write_text(path.read_text().replace("num_query_groups: 2", "num_query_groups: 4"))
    with pytest.raises(InputError, match=r"num_query_groups is 2, but 4 in model\.yaml"):
        read_context(parts(root))


# Each would give another function if it were passed over.
REFUSED: dict[str, Any] = {
    "layernorm_zero_centered_gamma": True,
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "qk_layernorm": True,
    "rotary_percent": 0.5,
    "rotary_interleaved": True,
    "softmax_scale": 0.5,
    "num_moe_experts": 8,
    "multi_latent_attention": True,
    "position_embedding_type": "learned_absolute",
    "gated_linear_unit": False,
    "no_rope_freq": 4,
    "window_size": [64, 64],
    "rope_scaling": True,
    "seq_len_interpolation_factor": 2.0,
    "transformer_layer_spec": {"_target_": "mine.custom_layers", "_call_": False},
    "activation_func": {"_target_": "torch.nn.functional.gelu", "_call_": False},
    "logit_softcapping": 30.0,
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_value_that_changes_the_function_is_refused_by_name(key: str, tmp_path: Path) -> None:
    root = copied_context("llama31", tmp_path / "c")
    edit_yaml(root / "context", {key: REFUSED[key]})
    with pytest.raises(InputError, match=key):
        architecture(root)


def test_a_field_that_is_off_or_harmless_passes(tmp_path: Path) -> None:
    root = copied_context("llama31", tmp_path / "c")
    edit_yaml(root / "context", {"of_a_later_release": None, "another": False, "tensor_model_parallel_size": 8})
    assert architecture(root).num_layers == 4


@pytest.mark.parametrize(
    ("what", "name", "message"),
    [
        ("config", "nemo.collections.llm.gpt.model.gemma.GemmaConfig2B", "GemmaConfig2B"),
        ("config", "mine.models.LlamaConfig", r"mine\.models\.LlamaConfig"),
        ("model", "nemo.collections.llm.gpt.model.mixtral.MixtralModel", "MixtralModel"),
        ("model", "mine.LlamaModel", r"mine\.LlamaModel"),
    ],
)
def test_classes_that_are_not_known_are_refused(what: str, name: str, message: str, tmp_path: Path) -> None:
    root = copied_context("llama31", tmp_path / "c")
    (root / "context" / "io.json").unlink()
    path = root / "context" / "model.yaml"
    model = yaml.safe_load(path.read_text())
    (model if what == "model" else model["config"])["_target_"] = name
    path.write_text(yaml.safe_dump(model))
    with pytest.raises(InputError, match=message):
        architecture(root)


def test_adapters_are_refused(tmp_path: Path) -> None:
    context = read_context(parts(copied_context("llama31", tmp_path / "c")))
    lora = Call("nemo.collections.llm.peft.lora.LoRA")
    with pytest.raises(InputError, match="model_transform is set"):
        architecture_of(ModelContext(**{**vars(context), "transform": lora}), 149, {})


# What runs nothing.


def test_common_that_wants_to_run_something_is_passed_over(tmp_path: Path) -> None:
    torch.save({"global_step": 3, "trap": Trap(tmp_path / "ran")}, tmp_path / "common.pt")
    values, note = read_common(tmp_path)
    assert values == {}
    assert "not safe" in note
    assert not (tmp_path / "ran").exists()
    torch.save({"global_step": 3}, tmp_path / "common.pt")
    assert read_common(tmp_path) == ({"global_step": 3}, "")


def pickled_config(root: Path) -> Path:
    """A context whose configuration is in a pickle beside it, as NeMo does with what Fiddle cannot say."""
    path = root / "context" / "io.json"
    content = json.loads(path.read_text())
    key = next(k for k, v in content["objects"].items() if v.get("paths") == ["<root>.model.config"])
    config = content["objects"][key]
    config["type"] = {"type": "pyref", "module": "nemo.collections.llm.gpt.model.llama", "name": "Llama31Config"}
    config["items"] = [["IdentityElement()", {"type": "leaf", "value": "0c5e", "paths": ["<root>.model.config"]}]]
    config["metadata"] = None
    path.write_text(json.dumps(content))
    (root / "context" / "0c5e").write_bytes(pickle.dumps(Trap(root / "ran")))
    return root


def test_a_pickled_configuration_is_not_opened(tmp_path: Path) -> None:
    root = pickled_config(copied_context("llama31", tmp_path / "c"))
    assert IoJson(root / "context" / "io.json").model().arguments["config"] == Opaque(
        "nemo.collections.llm.gpt.model.llama.Llama31Config", "0c5e"
    )
    assert architecture(root).num_layers == 4  # model.yaml says it in text
    (root / "context" / "model.yaml").unlink()
    with pytest.raises(InputError, match=r"is in the pickle .*0c5e, which is not opened"):
        read_context(parts(root))
    assert not (root / "ran").exists()


def test_yaml_that_wants_to_run_something_is_refused(tmp_path: Path) -> None:
    root = copied_context("llama31", tmp_path / "c")
    (root / "context" / "io.json").unlink()
    trap = f"!!python/object/apply:os.mkdir [{tmp_path / 'ran'}]"
    (root / "context" / "model.yaml").write_text(f"_target_: x\nconfig: {trap}\n")
    with pytest.raises(InputError, match="not readable as plain YAML"):
        read_context(parts(root))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_outside_the_context_is_not_read(tmp_path: Path) -> None:
    from prism_nemo.checkpoint.nemo.tokenizer import HF_TOKENIZER, find_tokenizer

    root = copied_context("hybrid", tmp_path / "c")
    outside = tmp_path / "c" / "secret"
    outside.mkdir()
    (outside / "tokenizer.json").write_text("{}")
    context = read_context(parts(root))
    for name in ("../secret", str(outside)):
        there = ModelContext(**{**vars(context), "tokenizer": Call(HF_TOKENIZER, {"pretrained_model_name": name})})
        assert find_tokenizer(parts(root), there).folder is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"root": 1, "objects": {}}', '{"root": {"type": "ref", "key": "x"}, "objects": {}}']
)
def test_files_that_are_no_contexts_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "io.json").write_text(text)
    with pytest.raises(InputError, match="not a context that NeMo wrote"):
        IoJson(tmp_path / "io.json").model()


def test_objects_within_themselves_end(tmp_path: Path) -> None:
    ref = {"type": "ref", "key": "l"}
    content = {
        "root": ref,
        "objects": {
            "l": {
                "type": {"type": "pyref", "module": "builtins", "name": "list"},
                "items": [["", ref]],
                "metadata": None,
            }
        },
    }
    (tmp_path / "io.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="deep"):
        IoJson(tmp_path / "io.json").value(ref)


def test_symbols_print_as_their_name() -> None:
    assert str(Symbol("torch.bfloat16")) == "torch.bfloat16"
