"""Checkpoints that Megatron saved with NeMo's keys and options, imported and forwarded beside the original."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from nemo_layouts import RECORDED, edit_yaml, llama_context, save_as_nemo
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny

from prism_nemo.checkpoint.atomic import read_manifest
from prism_nemo.checkpoint.metadata_file import read_metadata
from prism_nemo.checkpoint.nemo.folder import is_nemo_folder, open_folder
from prism_nemo.checkpoint.nemo.reading import import_nemo, open_checkpoint
from prism_nemo.checkpoint.verification import verify
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError

# Options of the save: how Megatron makes keys, the layout, the optimizer.
# A key of each, so that a case is what its name says.
KEYS = {
    "layers stacked": "module.decoder.layers.mlp.linear_fc1.weight",
    "a tensor for each layer": "module.decoder.layers.3.mlp.linear_fc1.weight",
    "gate and up apart": "module.decoder.layers.3.mlp.linear_fc1.weight_v",
    "two ranks, padded vocabulary": "module.decoder.layers.mlp.linear_fc1.weight",
    "optimizer": "optimizer.state.exp_avg.module.decoder.final_layernorm.weight",
}
SAVES: dict[str, dict[str, Any]] = {
    "layers stacked": {},
    "a tensor for each layer": {"metadata": {"non_homogeneous_layers": True}},
    "gate and up apart": {"metadata": {"singleton_local_shards": True}},
    "two ranks, padded vocabulary": {"tp": 2},
    "optimizer": {"optimizer": True},
}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("llama", tmp_path_factory.mktemp("hf") / "llama")


@pytest.fixture(scope="module")
def saved(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_as_nemo(hf, tmp_path_factory.mktemp("nemo") / "saved")
    llama_context(folder)
    return folder


@pytest.mark.parametrize("name", SAVES)
def test_computes_the_same_function_after_import(name: str, hf: Path, tmp_path: Path) -> None:
    folder = save_as_nemo(hf, tmp_path / "saved", **SAVES[name])
    llama_context(folder)
    assert is_nemo_folder(folder)
    assert KEYS[name] in read_metadata(folder / "weights").state_dict_metadata
    found = import_nemo(folder, tmp_path / "ckpt")
    result = verify(hf, tmp_path / "ckpt", ParallelConfig())
    assert result.passed, result
    assert (found.family, found.step) == ("llama", 7)
    notes = " ".join(found.notes)
    assert ("optimizer's state was left out" in notes) == bool(SAVES[name].get("optimizer"))
    assert ("1 rows of padding" in notes) == (SAVES[name].get("tp") == 2)
    assert read_manifest(tmp_path / "ckpt")["has_optimizer"] is False


def test_a_hybrid_is_read(tmp_path: Path) -> None:
    hf = save_tiny("nemotron-h", tmp_path / "hf", conv_kernel=4)
    folder = save_as_nemo(hf, tmp_path / "saved")
    shutil.copytree(RECORDED / "hybrid", folder / "context")
    assert import_nemo(folder, tmp_path / "ckpt").family == "nemotron_h"
    assert verify(hf, tmp_path / "ckpt", ParallelConfig()).passed


def test_vocabulary_comes_from_the_tokenizer_or_the_caller(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unsized"
    shutil.copytree(saved, folder)
    edit_yaml(folder / "context", {"vocab_size": None})
    assert open_checkpoint(folder).architecture.vocab_size == 11  # of the recorded tokenizer
    shutil.rmtree(folder / "context" / "nemo_tokenizer")
    with pytest.raises(InputError, match="says neither vocab_size nor where the tokenizer is"):
        open_checkpoint(folder)
    assert open_checkpoint(folder, vocab_size=149).architecture.vocab_size == 149
    with pytest.raises(InputError, match="149 rows, but the vocabulary 150"):
        open_checkpoint(folder, vocab_size=150)


def test_tokenizer_and_its_ids_come_along(saved: Path, tmp_path: Path) -> None:
    import_nemo(saved, tmp_path / "ckpt")
    assert (tmp_path / "ckpt" / "hf" / "tokenizer.json").is_file()
    config = read_manifest(tmp_path / "ckpt")["architecture"]["hf_config"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 5}, r"has shape \(4, 48\), but the configuration implies \(5, 48\)"),
        ({"num_layers": 3}, r"but the configuration implies \(3, 48\)"),
        ({"share_embeddings_and_output_weights": True}, "'module.output_layer.weight' has no place in a llama model"),
        ({"ffn_hidden_size": 72}, "linear_fc1.weight' has shape"),
        ({"num_query_groups": 4}, "linear_qkv.weight' has shape"),
    ],
)
def test_weights_of_another_model_are_refused(
    saved: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "weights").symlink_to(saved / "weights")
    llama_context(tmp_path / "bad", **changes)
    with pytest.raises(InputError, match=message):
        import_nemo(tmp_path / "bad", tmp_path / "ckpt")
    assert not (tmp_path / "ckpt").exists()


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    hf = save_tiny("llama", tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    folder = save_as_nemo(hf, tmp_path / "saved")
    llama_context(folder)
    assert import_nemo(folder, tmp_path / "ckpt").not_finite == ["module.decoder.layers.mlp.linear_fc2.weight"]
    with pytest.raises(InputError, match="holds NaN or infinity"):
        import_nemo(folder, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_kinds_that_are_not_read_are_refused(saved: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    (broken("peft") / "weights" / "adapter_metadata.json").write_text("{}")
    (broken("modelopt") / "weights" / "modelopt_state").mkdir()
    kind = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (broken("zarr") / "weights" / "metadata.json").write_text(json.dumps(kind))
    (broken("partial") / "weights" / "common.pt").unlink()
    shutil.rmtree(broken("bare") / "context")
    for name, message in {
        "peft": "adapters",
        "modelopt": "ModelOpt",
        "zarr": "format 'zarr'",
        "partial": "incomplete",
        "bare": "holds no folder 'context'",
    }.items():
        with pytest.raises(InputError, match=message):
            open_folder(tmp_path / name)


def test_float8_weights_are_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prism_nemo.checkpoint.nemo import reading

    metadata = read_metadata(saved / "weights")
    key = "module.decoder.layers.mlp.linear_fc2.weight"
    object.__setattr__(metadata.state_dict_metadata[key].properties, "dtype", torch.float8_e4m3fn)
    monkeypatch.setattr(reading, "read_metadata", lambda _: metadata)
    with pytest.raises(InputError, match=r"linear_fc2\.weight' is float8_e4m3fn"):
        open_checkpoint(saved)
