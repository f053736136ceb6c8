"""Checkpoints written for NeMo: loaded by Megatron under NeMo's keys, described in NeMo's way, read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from nemo_layouts import RECORDED
from tiny_llama import LINEAR, LLAMA3
from tiny_models import hf_model, save_tiny

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.metadata_file import read_metadata
from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.checkpoint.nemo.folder import open_folder
from prism_nemo.checkpoint.nemo.io_json import IoJson
from prism_nemo.checkpoint.nemo.reading import import_nemo
from prism_nemo.checkpoint.nemo.writing import export_nemo
from prism_nemo.checkpoint.verification import verify
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.build import build_model
from prism_nemo.models.family import read_hf_config
from prism_nemo.models.forward import forward_logits
from prism_nemo.runtime import start, stop
from prism_nemo.runtime.launch import launch

ONE = ParallelConfig()
# Case of tiny_models, changes to it, and fields that NeMo must be told.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {}, {"kv_channels": 20, "vocab_size": 149, "rotary_base": 100}),
    "llama, tied": ("llama-tied", {}, {"share_embeddings_and_output_weights": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3}, {"scale_factor": 4.0, "old_context_len": 64}),
    "linear rope": ("llama", {"rope_parameters": LINEAR}, {"seq_len_interpolation_factor": 3.0}),
    "mistral": ("mistral", {}, {"window_size": None}),
    "mistral, window of 7": ("mistral-window", {}, {"window_size": [6, 0], "cp_comm_type": "a2a"}),
    "nemotron_h": (
        "nemotron-h",
        {"conv_kernel": 4, "chunk_size": 128},
        {"mamba_num_groups": 2, "position_embedding_type": "none"},
    ),
}


def exported(case: str, folder: Path, parallel: ParallelConfig = ONE, **changes: Any) -> Path:
    """The case's model as a NeMo checkpoint, below `folder`."""
    save_tiny(case, folder / "hf", **changes)
    import_hf(folder / "hf", folder / "native", parallel)
    export_nemo(folder / "native", folder / "nemo")
    return folder / "nemo"


@pytest.mark.parametrize("name", MODELS)
def test_read_again_it_is_the_same_model(name: str, tmp_path: Path) -> None:
    case, changes, told = MODELS[name]
    nemo = exported(case, tmp_path, **changes)
    described = IoJson(nemo / "context" / "io.json").model().arguments["config"].arguments
    assert {key: described[key] for key in told} == told
    import_nemo(nemo, tmp_path / "back")
    assert read_architecture(tmp_path / "back").differences(read_architecture(tmp_path / "native")) == []
    assert verify(tmp_path / "hf", tmp_path / "back", ONE).passed


def load_as_transformer_engine(hf: str, weights: str, tokens: torch.Tensor) -> torch.Tensor | None:
    """Megatron's load, asking for everything that a model of Transformer Engine layers asks for, and its logits."""
    runtime = start(ONE, seed=0)
    architecture = read_hf_config(Path(hf))
    model = build_model(architecture, runtime)
    state = model.sharded_state_dict(prefix="module.", metadata={"singleton_local_shards": False})
    layers = architecture.num_layers
    # With Transformer Engine every one of these modules has a state; without, Megatron asks for some of them.
    has = {value.unique_key for value in state.values() if isinstance(value, ShardedObject)}
    modules = [f"self_attention.{part}" for part in ("core_attention", "linear_qkv", "linear_proj")]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    asked = [(f"decoder.layers.{module}", layer, layers) for module in modules for layer in range(layers)]
    for module, layer, count in [*asked, ("decoder.final_layernorm", 0, 1), ("output_layer", 0, 1)]:
        wanted = ShardedObject(f"module.{module}._extra_state", None, (count,), (layer,))
        if wanted.unique_key not in has:
            state[f"asked {module} {layer}"] = wanted
    loaded = dist_checkpointing.load({"state_dict": state}, weights, strict="raise_unexpected")["state_dict"]
    states = {key: value for key, value in loaded.items() if key.startswith("asked") or "_extra_state" in key}
    if len(states) != 5 * layers + 2 or any(value is not None for value in states.values()):
        raise ValueError(f"extra states: {states}")
    own = {k.removeprefix("module."): v for k, v in loaded.items() if not k.startswith("asked")}
    model.load_state_dict(own)
    logits = forward_logits(model, tokens)
    stop()
    return logits


def test_megatron_loads_it_under_nemos_keys(tmp_path: Path) -> None:
    nemo = exported("llama", tmp_path, ParallelConfig(tensor_model_parallel_size=2))
    tokens = torch.randint(0, 149, (2, 64), generator=torch.Generator().manual_seed(1))
    weights = str(nemo / "weights")
    logits = launch(load_as_transformer_engine, str(tmp_path / "hf"), weights, tokens, processes=1)
    with torch.no_grad():
        expected = hf_model(tmp_path / "hf")(tokens).logits
    assert (logits - expected).abs().max() < 1e-4 * expected.std()
    metadata = dist_checkpointing.load_content_metadata(weights)
    assert metadata == {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def test_hybrids_hold_the_states_of_their_mixers(tmp_path: Path) -> None:
    keys = read_metadata(exported("nemotron-h", tmp_path, conv_kernel=4) / "weights").state_dict_metadata
    for part in ("0.mixer.in_proj", "0.mixer.out_proj", "1.mlp.linear_fc1", "3.self_attention.core_attention"):
        assert f"module.decoder.layers.{part}._extra_state/shard_0_1" in keys
    assert "module.decoder.final_norm._extra_state/shard_0_1" in keys


@pytest.mark.parametrize(("recorded", "case"), [("llama31", "llama"), ("mistral", "mistral"), ("hybrid", "nemotron-h")])
def test_what_it_says_has_the_form_of_what_nemo_wrote(recorded: str, case: str, tmp_path: Path) -> None:
    changes = {"llama": {"rope_parameters": LLAMA3}, "nemotron-h": {"conv_kernel": 4}}.get(case, {})
    context = exported(case, tmp_path, **changes) / "context"
    ours, theirs = (json.loads((folder / "io.json").read_text()) for folder in (context, RECORDED / recorded))

    def forms(content: dict[str, Any]) -> dict[str, set[str]]:
        """Of every class, the keys and metadata of its objects; paths of the two that NeMo looks up."""
        found: dict[str, set[str]] = {"top": set(content), "root": set(content["root"])}
        for value in content["objects"].values():
            kind = value["type"]["name"]
            found.setdefault(kind, set()).update(key for key in value if key != "paths")
        paths = {path for value in content["objects"].values() for path in value.get("paths", [])}
        found["paths"] = paths & {"<root>", "<root>.model", "<root>.model.config"}
        return found

    written, expected = forms(ours), forms(theirs)
    assert {kind: written[kind] for kind in expected if kind in written} == {
        kind: expected[kind] for kind in expected if kind in written
    }
    assert ours["version"] == theirs["version"]
    assert ours["refcounts"].keys() == ours["objects"].keys()
    classes = [yaml.safe_load((folder / "model.yaml").read_text()) for folder in (context, RECORDED / recorded)]
    assert classes[0]["_target_"] == classes[1]["_target_"]
    assert classes[0]["config"]["_target_"] == classes[1]["config"]["_target_"]
    # Fields that the class does not have would be dropped by NeMo, with a warning.
    assert set(classes[0]["config"]) <= set(classes[1]["config"])


def test_tokenizer_files_go_where_the_context_says(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "hf")
    import_hf(tmp_path / "hf", tmp_path / "native", ONE)
    assert "no tokenizer" in export_nemo(tmp_path / "native", tmp_path / "bare")[0]
    assert IoJson(tmp_path / "bare" / "context" / "io.json").model().arguments["tokenizer"] is None
    tokenizer = RECORDED / "llama31" / "nemo_tokenizer"
    assert export_nemo(tmp_path / "native", tmp_path / "nemo", tokenizer) == []
    named = IoJson(tmp_path / "nemo" / "context" / "io.json").model().arguments["tokenizer"]
    recorded = IoJson(RECORDED / "llama31" / "io.json").model().arguments["tokenizer"]
    assert named.target == recorded.target
    assert named.arguments["pretrained_model_name"] == recorded.arguments["pretrained_model_name"]
    copied = tmp_path / "nemo" / "context" / named.arguments["pretrained_model_name"] / "tokenizer.json"
    assert copied.read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    with pytest.raises(InputError, match="holds no tokenizer files"):
        export_nemo(tmp_path / "native", tmp_path / "other", tmp_path)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("granite", {}, "granite family cannot be written for NeMo.*multipliers"),
        ("granite-hybrid", {}, "granite_hybrid family cannot be written for NeMo"),
        ("nemotron-h", {}, "conv_kernel"),
        ("nemotron-h", {"conv_kernel": 4, "use_conv_bias": False}, "use_conv_bias"),
        ("nemotron-h", {"conv_kernel": 4, "layer_norm_epsilon": 1e-6}, "epsilon"),
        ("nemotron-h", {"conv_kernel": 4, "time_step_limit": [0.001, 0.1]}, "time_step_limit"),
        ("mistral", {"rope_parameters": LLAMA3}, "llama3 rope_scaling"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.5}}, "rope_theta 100.5"),
    ],
)
def test_what_nemo_cannot_compute_is_refused(case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        exported(case, tmp_path, **changes)
    assert not (tmp_path / "nemo").exists()


def test_types_are_kept_and_said(tmp_path: Path) -> None:
    nemo = exported("llama", tmp_path, dtype=torch.bfloat16)
    config = IoJson(nemo / "context" / "io.json").model().arguments["config"].arguments
    assert (str(config["params_dtype"]), config["bf16"], config["fp16"]) == ("torch.bfloat16", True, False)
    stored = read_metadata(open_folder(nemo).weights).state_dict_metadata
    assert stored["module.decoder.layers.mlp.linear_fc2.weight"].properties.dtype == torch.bfloat16
    with pytest.raises(InputError, match="already exists"):
        export_nemo(tmp_path / "native", nemo)
