from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import sharded_copy, write_folder
from tiny_llama import all_tensors, edited_copy
from transformers import LlamaForCausalLM

from prism_nemo.checkpoint.hf import INDEX, SINGLE, HFReader
from prism_nemo.checkpoint.hf_writer import Planned, write_file
from prism_nemo.errors import InputError
from prism_nemo.models.family import read_hf_config, table_of
from prism_nemo.models.weights import expand

Q, K = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "qk")


def check(folder: Path) -> None:
    HFReader(folder).check(read_hf_config(folder))


@pytest.fixture
def sharded(tiny_hf: Path, tmp_path: Path) -> Path:
    """The tiny model in several files with an index."""
    return sharded_copy(tiny_hf, tmp_path / "sharded")


def edit_index(folder: Path, change: Any) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_reads_one_file_and_shards_alike(tiny_hf: Path, sharded: Path) -> None:
    one, many = HFReader(tiny_hf), HFReader(sharded)
    assert one.names() == many.names() == set(all_tensors(tiny_hf))
    assert all(torch.equal(one.get(name), many.get(name)) for name in one.names())
    check(tiny_hf)
    check(sharded)


def test_sharded_folder_loads_in_transformers(tiny_hf: Path, sharded: Path) -> None:
    files = sorted(p.name for p in sharded.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (sharded / SINGLE).exists()
    expected = LlamaForCausalLM.from_pretrained(tiny_hf).state_dict()
    model, info = LlamaForCausalLM.from_pretrained(sharded, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_shards_stay_below_the_limit_and_the_index_is_true(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    total = 0
    for file in sorted(set(index["weight_map"].values())):
        tensors = load_file(sharded / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(tensors)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert size <= 60_000 or len(tensors) == 1
        total += size
    assert index["metadata"]["total_size"] == total


def test_one_tensor_larger_than_a_shard_is_written_whole(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.arange(100.0), "c": torch.arange(3.0)}
    write_folder(tensors, tmp_path / "out", 16)
    assert all(torch.equal(value, tensors[name]) for name, value in all_tensors(tmp_path / "out").items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3


def test_a_file_with_fewer_numbers_than_planned_is_an_error(tmp_path: Path) -> None:
    short = Planned("a", torch.float32, (4,), lambda: iter([torch.ones(3)]))
    with pytest.raises(RuntimeError, match="were planned"):
        write_file(tmp_path / "x.safetensors", [short])


# Refusals; each message names the file or the tensor.


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        HFReader(tmp_path)


def test_pickles_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\), which can run code"):
        HFReader(tmp_path)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: no such file"):
        read_hf_config(tmp_path)


def test_config_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["Llama')
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        read_hf_config(tmp_path)


def test_config_that_is_not_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"config\.json"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("keep", [0.5, 0.999, 100], ids=["half", "almost all", "100 bytes"])
def test_truncated_file(tiny_hf: Path, tmp_path: Path, keep: float) -> None:
    folder = edited_copy(tiny_hf, tmp_path / "cut")
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(InputError, match=r"cut/model\.safetensors: truncated"):
        check(folder)


def test_empty_file(tiny_hf: Path, tmp_path: Path) -> None:
    folder = edited_copy(tiny_hf, tmp_path / "empty")
    (folder / SINGLE).write_bytes(b"")
    with pytest.raises(InputError, match=r"empty/model\.safetensors"):
        check(folder)


def test_missing_shard(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(InputError, match=rf"{lost.name}: missing, but named by {INDEX}"):
        HFReader(sharded)


def test_shard_that_is_a_loop_of_links(sharded: Path) -> None:
    lost = sorted(sharded.glob("*.safetensors"))[1]
    lost.unlink()
    lost.symlink_to(lost.name)
    with pytest.raises(InputError, match=rf"{lost.name}: cannot be opened: Too many levels of symbolic links"):
        HFReader(sharded)


def test_truncated_shard(sharded: Path) -> None:
    short = sorted(sharded.glob("*.safetensors"))[2]
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{short.name}: truncated"):
        HFReader(sharded)


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "{", '{"weight_map": 3}']
)
def test_index_that_is_not_an_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    with pytest.raises(InputError, match=rf"{INDEX}: not a safetensors index"):
        HFReader(sharded)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "{root}/x.safetensors", "sub/x.safetensors", "..", "x.bin", "a\0"]
)
def test_path_that_climbs_out_of_the_folder(sharded: Path, name: str) -> None:
    name = name.format(root=sharded.parent)
    edit_index(sharded, lambda where: where.update({Q: name}))
    with pytest.raises(InputError, match=rf"{INDEX}: names .*only safetensors files in the same folder are read"):
        HFReader(sharded)


def test_tensor_that_the_index_promises_and_no_shard_holds(sharded: Path) -> None:
    """Seen before any process starts, not when its turn to be read comes."""
    index = json.loads((sharded / INDEX).read_text())
    file = sharded / index["weight_map"][Q]
    tensors = load_file(file)
    del tensors[Q]
    save_file(tensors, file)
    with pytest.raises(InputError, match=rf"{file.name}: lacks '{Q}', which {INDEX} promises"):
        HFReader(sharded)


def test_tensor_that_the_index_leaves_out(sharded: Path) -> None:
    edit_index(sharded, lambda where: where.pop(Q))
    with pytest.raises(InputError, match=rf"holds tensor '{Q}', which {INDEX} does not list"):
        HFReader(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(first)))
    save_file({**load_file(second), twice: load_file(first)[twice]}, second)
    with pytest.raises(InputError, match=rf"{second.name}: tensor '{twice}' is also in {first.name}"):
        HFReader(sharded)


def test_folder_with_two_models(sharded: Path, tiny_hf: Path) -> None:
    os.link(tiny_hf / SINGLE, sharded / SINGLE)
    with pytest.raises(InputError, match=rf"has both {INDEX} and {SINGLE}"):
        HFReader(sharded)


def test_missing_tensor(tiny_hf: Path, tmp_path: Path) -> None:
    folder = edited_copy(tiny_hf, tmp_path / "x", tensors=lambda t: (t.pop(Q), t.pop("lm_head.weight")))
    with pytest.raises(InputError, match=r"tensor 'lm_head\.weight' is missing \(2 in all\)"):
        check(folder)
    with pytest.raises(InputError, match="q_proj"):
        HFReader(folder).get(Q)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.4.mlp.up_proj.weight"])
def test_unmapped_tensor(tiny_hf: Path, tmp_path: Path, name: str) -> None:
    folder = edited_copy(tiny_hf, tmp_path / "x", tensors=lambda t: t.update({name: torch.ones(48, 48)}))
    with pytest.raises(InputError, match=f"tensor '{name}' is not mapped by the llama family"):
        check(folder)


def test_config_that_contradicts_the_weights(tiny_hf: Path, tmp_path: Path) -> None:
    folder = edited_copy(tiny_hf, tmp_path / "x", config=lambda c: c.update(num_hidden_layers=5))
    with pytest.raises(InputError, match=r"tensor 'model\.layers\.4\..*' is missing"):
        check(folder)


@pytest.mark.parametrize("other", [K, Q.replace("layers.0", "layers.3")], ids=["same layer", "other layer"])
def test_two_types_in_one_stored_tensor(tiny_hf: Path, tmp_path: Path, other: str) -> None:
    """Megatron keeps query, key and value in one tensor, and the same parameter of all layers too."""
    folder = edited_copy(tiny_hf, tmp_path / "x", tensors=lambda t: t.update({other: t[other].bfloat16()}))
    with pytest.raises(InputError, match=r"q_proj.* is float32 but '.*' is bfloat16") as caught:
        check(folder)
    assert other in str(caught.value)


def test_unsupported_type(tiny_hf: Path, tmp_path: Path) -> None:
    folder = edited_copy(tiny_hf, tmp_path / "x", tensors=lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)}))
    with pytest.raises(InputError, match=rf"tensor '{Q}' is of type F8_E4M3; supported: F32, BF16, F16"):
        check(folder)


def test_rotary_buffers_of_old_checkpoints_are_let_through(tiny_hf: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = edited_copy(tiny_hf, tmp_path / "x", tensors=lambda t: t.update({name: torch.ones(6)}))
    check(folder)
    assert HFReader(folder).skipped() == [name]


def test_tied_model_with_another_output_layer(tied_hf: Path, tmp_path: Path) -> None:
    def add(change: float) -> Any:
        return lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + change})

    check(edited_copy(tied_hf, tmp_path / "same", tensors=add(0.0)))
    with pytest.raises(InputError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        check(edited_copy(tied_hf, tmp_path / "other", tensors=add(1e-3)))


def test_table_names_every_tensor_once(tiny_hf: Path, tied_hf: Path) -> None:
    for folder in (tiny_hf, tied_hf):
        architecture = read_hf_config(folder)
        names = [n for mapping, layer in expand(table_of(architecture)) for n in mapping.at(layer)[1]]
        assert len(names) == len(set(names))
        assert set(names) == HFReader(folder).names()
