"""Conversion is judged by forwarding both models; a round trip alone would pass with a mapping wrong both ways."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_workers as workers
import pytest
import torch
from tiny_files import write_folder
from tiny_llama import LINEAR, LLAMA3, all_tensors, edited_copy, save_tiny_llama
from tiny_models import save_tiny
from transformers import LlamaForCausalLM

from prism_nemo.checkpoint.atomic import MANIFEST, ORIGIN, read_manifest
from prism_nemo.checkpoint.convert import export_hf, import_hf
from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.checkpoint.verification import verify
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import read_hf_config
from prism_nemo.runtime.launch import launch

ONE, TP2, PP2, TP2_PP2 = ParallelConfig(), ParallelConfig(2, 1), ParallelConfig(1, 2), ParallelConfig(2, 2)


def spell_the_old_way(config: dict[str, Any]) -> None:
    """rope_theta and rope_scaling with 'type', and torch_dtype, as config.json said before transformers 5."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
    config["torch_dtype"] = config.pop("dtype")


# Name: (config of the model, layout of the import, layouts of the verification)
MODELS: dict[str, tuple[dict[str, Any], ParallelConfig, list[ParallelConfig]]] = {
    "grouped queries, untied": ({}, ONE, [ONE, TP2, PP2, TP2_PP2]),
    "tied, vocabulary 301": ({"vocab_size": 301, "tie_word_embeddings": True}, TP2_PP2, [ONE, TP2, PP2, TP2_PP2]),
    "untied, vocabulary 301": ({"vocab_size": 301}, TP2, [TP2_PP2]),
    "every head its own key": ({"num_key_value_heads": 4}, PP2, [TP2_PP2]),
    "head_dim not hidden / heads": ({"head_dim": 20}, ONE, [TP2_PP2]),
    "llama3 rope": ({"rope_parameters": LLAMA3}, ONE, [TP2_PP2]),
    "linear rope": ({"rope_parameters": LINEAR}, ONE, [TP2_PP2]),
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """By name of the model: its Hugging Face folder and the checkpoint imported from it, made on first use."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp("converted")
            config, layout, _ = MODELS[name]
            hf = save_tiny_llama(root / "hf", **config)
            import_hf(hf, root / "checkpoint", layout)
            made[name] = hf, root / "checkpoint"
        return made[name]

    return make


CASES = [
    pytest.param(name, layout, id=f"{name}, {layout.describe()}")
    for name, (_, _, layouts) in MODELS.items()
    for layout in layouts
]


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_imported_model_computes_the_same_logits(
    converted: Callable[[str], tuple[Path, Path]], name: str, layout: ParallelConfig
) -> None:
    hf, checkpoint = converted(name)
    result = verify(hf, checkpoint, layout)
    assert result.passed, result
    assert result.logit_std > 0.3, "logits too small for the comparison to mean anything"
    assert result.argmax_agreement > 0.99
    assert result.tokens == 128


# One layout of the import and another of the model that loads it; every family, with its types of tensors.
FAMILIES = {
    "llama": TP2,
    "mistral-window": PP2,
    "granite": TP2,
    "granite-4": ONE,
    "granite-hybrid": PP2,
    "granite-hybrid-one-group": TP2,
    "nemotron-h": TP2,
    "nemotron-h-other-pattern": ONE,
}


@pytest.mark.parametrize("case", list(FAMILIES))
def test_every_family_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    """bf16 with the mixers' fp32 A_log, D and dt_bias, several files each way."""
    hf = save_tiny(case, tmp_path / "whole", torch.bfloat16)
    tensors = all_tensors(hf)
    for name in tensors:
        if name.endswith(("A_log", ".D", "dt_bias")):
            tensors[name] = tensors[name].float() + 1e-6
    source = write_folder(tensors, tmp_path / "hf", 30_000)
    (source / "config.json").write_text((hf / "config.json").read_text())
    report = import_hf(source, tmp_path / "checkpoint", FAMILIES[case])
    assert (report.not_finite, report.skipped) == ([], [])
    export_hf(tmp_path / "checkpoint", tmp_path / "out", max_shard_bytes=40_000)
    assert hashes(tmp_path / "out") == hashes(source)
    assert json.loads((tmp_path / "out/config.json").read_text()) == json.loads((source / "config.json").read_text())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def hashes(folder: Path) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """By tensor: its hash, type and shape."""
    return {
        name: (
            hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest(),
            str(t.dtype),
            tuple(t.shape),
        )
        for name, t in all_tensors(folder).items()
    }


@pytest.mark.parametrize("layout", [TP2, PP2], ids=["TP2", "PP2"])
@pytest.mark.parametrize("case", ["llama-tied", "granite-hybrid-one-group", "nemotron-h"])
def test_reading_into_a_model_by_rows_and_columns(case: str, layout: ParallelConfig, tmp_path: Path) -> None:
    """Also into another type than the file's."""
    hf = save_tiny(case, tmp_path / "hf", torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        args = (str(hf), layout, dtype)
        assert launch(workers.wrong_parameters_after_reading, *args, processes=layout.world_size) == []


@pytest.mark.parametrize(("stored", "model"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_checkpoint_loads_into_a_model_of_another_type(tmp_path: Path, stored: torch.dtype, model: torch.dtype) -> None:
    hf = save_tiny_llama(tmp_path / "hf", stored)
    import_hf(hf, tmp_path / "checkpoint", ONE)
    loaded = launch(workers.loaded_parameters, str(tmp_path / "checkpoint"), ONE, model)
    embedding = loaded["embedding.word_embeddings.weight"]
    assert embedding.dtype == model
    assert torch.equal(embedding, all_tensors(hf)["model.embed_tokens.weight"].to(model))
    name = "decoder.layers.2.mlp.linear_fc2.weight"
    assert torch.equal(loaded[name], all_tensors(hf)["model.layers.2.mlp.down_proj.weight"].to(model))


@pytest.mark.parametrize("layout", [ONE, TP2], ids=["TP1", "TP2"])
def test_tied_output_layer_that_was_stored_comes_back(tied_hf: Path, tmp_path: Path, layout: ParallelConfig) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    hf = edited_copy(tied_hf, tmp_path / "hf", tensors=add)
    import_hf(hf, tmp_path / "checkpoint", layout)
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(hf)


def test_a_large_tensor_is_several_chunks(tiny_hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 MB in earnest; here so small that every matrix is cut."""
    launch(workers.import_in_chunks, str(tiny_hf), str(tmp_path / "checkpoint"), 3000)
    with CheckpointReader(tmp_path / "checkpoint") as reader:
        sizes = [chunk.sizes for chunks in reader._chunks.values() for chunk in chunks]
    assert max(4 * math.prod(size) for size in sizes) <= 3000
    assert len(sizes) > 100
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert hashes(tmp_path / "out") == hashes(tiny_hf)
    assert verify(tiny_hf, tmp_path / "checkpoint", TP2).passed


def test_describing_a_model_takes_no_memory(tmp_path: Path) -> None:
    """Llama of 8 billion parameters, 32 GB in fp32, as rank 0 of one and of two."""
    size = {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **size, **heads}
    (tmp_path / "config.json").write_text(json.dumps(config))
    devices, parameters, megabytes = launch(workers.allocated_by_description, str(tmp_path), ONE)
    assert devices == ["meta"]
    assert parameters == 8_030_261_248
    assert megabytes < 200


def test_dt_floor_is_recorded_and_written(tmp_path: Path) -> None:
    hf = save_tiny("nemotron-h", tmp_path / "hf")
    import_hf(hf, tmp_path / "checkpoint", ONE, dt_floor=0.01)
    assert read_architecture(tmp_path / "checkpoint").mamba.dt_limit == (0.01, math.inf)
    assert read_manifest(tmp_path / "checkpoint")["dt_floor"] == 0.01
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert read_hf_config(tmp_path / "out").mamba.dt_limit == (0.01, math.inf)


@pytest.mark.parametrize(("case", "floor"), [("granite-hybrid", 0.01), ("nemotron-h", 0.0), ("nemotron-h", math.nan)])
def test_dt_floor_that_means_nothing(tmp_path: Path, case: str, floor: float) -> None:
    hf = save_tiny(case, tmp_path / "hf")
    with pytest.raises(InputError, match="--dt-floor"):
        import_hf(hf, tmp_path / "checkpoint", ONE, dt_floor=floor)


@pytest.mark.parametrize("name", list(MODELS))
def test_export_gives_back_the_same_folder(
    converted: Callable[[str], tuple[Path, Path]], name: str, tmp_path: Path
) -> None:
    hf, checkpoint = converted(name)
    export_hf(checkpoint, tmp_path / "out")
    before, after = all_tensors(hf), all_tensors(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key
    configs = [json.loads((folder / "config.json").read_text()) for folder in (hf, tmp_path / "out")]
    assert configs[0] == configs[1]


def test_old_config_spelling_means_the_same(tmp_path: Path) -> None:
    for kind in (LLAMA3, LINEAR, {"rope_type": "default", "rope_theta": 100.0}):
        new = save_tiny_llama(tmp_path / kind["rope_type"], rope_parameters=kind)
        old = edited_copy(new, tmp_path / f"{kind['rope_type']}-old", config=spell_the_old_way)
        ours, theirs = read_hf_config(new), read_hf_config(old)
        assert ours.rope == theirs.rope
        assert ours.rope.theta == 100.0
        assert (ours.rope.scaling or {}).get("factor") == kind.get("factor")


def test_old_config_spelling_verifies(tmp_path: Path) -> None:
    """Against transformers' own reading of the old keys."""
    new = save_tiny_llama(tmp_path / "new", rope_parameters=LLAMA3)
    old = edited_copy(new, tmp_path / "old", config=spell_the_old_way)
    import_hf(old, tmp_path / "checkpoint", ONE)
    assert verify(old, tmp_path / "checkpoint", ONE).passed


def test_bfloat16_export_rounds_once_and_says_so(tiny_hf: Path, tmp_path: Path) -> None:
    old = edited_copy(tiny_hf, tmp_path / "old", config=spell_the_old_way)
    import_hf(old, tmp_path / "checkpoint", ONE)
    export_hf(tmp_path / "checkpoint", tmp_path / "out", torch.bfloat16)
    before, after = all_tensors(tiny_hf), all_tensors(tmp_path / "out")
    assert all(torch.equal(after[name], before[name].to(torch.bfloat16)) for name in before)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config.get("dtype", "bfloat16") == "bfloat16"
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_tokenizer_files_travel_with_the_checkpoint(tiny_hf: Path, tmp_path: Path) -> None:
    hf = edited_copy(tiny_hf, tmp_path / "hf")
    (hf / "tokenizer.json").write_text('{"mine": 1}')
    (hf / "modeling_evil.py").write_text("raise SystemExit")
    import_hf(hf, tmp_path / "checkpoint", ONE)
    export_hf(tmp_path / "checkpoint", tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"mine": 1}'
    expected = {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", ORIGIN}
    assert {p.name for p in (tmp_path / "out").iterdir()} == expected
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text('{"other": 1}')
    export_hf(tmp_path / "checkpoint", tmp_path / "again", tokenizer=tmp_path / "tok")
    assert (tmp_path / "again/tokenizer.json").read_text() == '{"other": 1}'
    assert not (tmp_path / "again/generation_config.json").exists()


def test_export_copies_tokenizer_files_only(converted: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, checkpoint = converted("grouped queries, untied")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    (tmp_path / "tok/config.json").write_text("not ours")
    export_hf(checkpoint, tmp_path / "out", tokenizer=tmp_path / "tok")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        ORIGIN,
        "tokenizer.json",
    ]
    come_from = json.loads((tmp_path / "out" / ORIGIN).read_text())
    assert come_from["manifest_sha256"] == hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()
    assert come_from["checkpoint"] == checkpoint.name  # no path of this machine: the folder may be published
    assert json.loads((tmp_path / "out/config.json").read_text())["vocab_size"] == 304


@pytest.mark.parametrize("layout", [ONE, TP2], ids=["TP1", "TP2"])
def test_loss_does_not_see_the_vocabulary_padding(tmp_path: Path, layout: ParallelConfig) -> None:
    """Megatron leaves padding rows in the softmax; their logit 0 would add exp(0) to every denominator."""
    hf = save_tiny_llama(tmp_path / "hf", vocab_size=301)
    tokens = torch.randint(0, 301, (2, 33), generator=torch.Generator().manual_seed(3))
    ours, padded = launch(workers.loss_and_padding_gradient, str(hf), tokens, layout, processes=layout.world_size)
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(hf)(input_ids=tokens[:, :-1]).logits
    theirs = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert sum(rows for rows, _ in padded) == layout.tensor_model_parallel_size - 1
    assert all(gradient == 0.0 for _, gradient in padded)


# Negative controls: each must be seen by `verify`.


def test_verify_sees_one_changed_number(converted: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    hf, checkpoint = converted("grouped queries, untied")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.self_attn.k_proj.weight"][5, 7] += 1.0

    result = verify(edited_copy(hf, tmp_path / "other", tensors=change), checkpoint, ONE)
    assert not result.passed
    assert result.different_tensors == ["model.layers.2.self_attn.k_proj.weight"]
    assert result.max_abs_logit_diff > 10 * result.tolerance


def test_verify_sees_another_rope_theta(converted: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    hf, checkpoint = converted("grouped queries, untied")

    def change(config: dict[str, Any]) -> None:
        config["rope_parameters"]["rope_theta"] = 105.0

    assert not verify(edited_copy(hf, tmp_path / "other", config=change), checkpoint, ONE).passed


def test_verify_sees_what_a_round_trip_cannot(tiny_hf: Path, tmp_path: Path) -> None:
    """Keys and values exchanged in import and in export: bit for bit the same folder, and another function."""
    launch(workers.import_with_swapped_key_and_value, str(tiny_hf), str(tmp_path / "checkpoint"))
    launch(workers.export_with_swapped_key_and_value, str(tmp_path / "checkpoint"), str(tmp_path / "out"))
    before, after = all_tensors(tiny_hf), all_tensors(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)
    result = verify(tiny_hf, tmp_path / "checkpoint", ONE)
    assert not result.passed
    assert result.max_abs_logit_diff > 100 * result.tolerance
    assert len(result.different_tensors) == 8


def test_verify_refuses_a_model_of_other_sizes(converted: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, checkpoint = converted("grouped queries, untied")
    other = save_tiny_llama(tmp_path / "other", vocab_size=200)
    with pytest.raises(InputError, match=r"vocab_size is 200 in .*other but 304 in .*not the same model"):
        verify(other, checkpoint, ONE)


# Refusals before any work.


def test_import_refuses_an_existing_output(tiny_hf: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(InputError, match="checkpoint: already exists"):
        import_hf(tiny_hf, tmp_path / "checkpoint", ONE)


def test_export_refuses_an_existing_output(converted: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out: already exists"):
        export_hf(converted("grouped queries, untied")[1], tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (ParallelConfig(4), r"tensor_model_parallel_size 4 .*2 key/value heads.*these do: \[1, 2\]"),
        (ParallelConfig(1, 3), r"pipeline_model_parallel_size 3 .*4 layers.*these do: \[1, 2, 4\]"),
    ],
    ids=["TP4", "PP3"],
)
def test_import_refuses_a_layout_that_does_not_fit(
    tiny_hf: Path, tmp_path: Path, layout: ParallelConfig, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        import_hf(tiny_hf, tmp_path / "checkpoint", layout)
    assert not (tmp_path / "checkpoint").exists()


def test_verify_refuses_what_is_not_a_checkpoint(tiny_hf: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a complete prism-nemo checkpoint"):
        verify(tiny_hf, tmp_path, ONE)


WRONG_SHAPES = [
    ("model.embed_tokens.weight", (303, 48)),
    ("model.norm.weight", (47,)),
    ("model.layers.1.self_attn.q_proj.weight", (32, 48)),
    ("model.layers.1.self_attn.k_proj.weight", (36, 48)),
    ("model.layers.1.self_attn.v_proj.weight", (24, 24)),
    ("model.layers.1.self_attn.o_proj.weight", (48, 40)),
    ("model.layers.1.mlp.gate_proj.weight", (62, 48)),
    ("model.layers.1.mlp.down_proj.weight", (48, 60)),
]


@pytest.mark.parametrize(("name", "shape"), WRONG_SHAPES, ids=[name for name, _ in WRONG_SHAPES])
def test_import_names_a_tensor_of_the_wrong_shape(
    tiny_hf: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = torch.zeros(shape)

    bad = edited_copy(tiny_hf, tmp_path / "bad", tensors=change)
    implied = tuple(all_tensors(tiny_hf)[name].shape)
    message = re.escape(f"'{name}' has shape {shape}, but config.json implies {implied}")
    with pytest.raises(InputError, match=message):
        import_hf(bad, tmp_path / "checkpoint", ONE)
    assert not (tmp_path / "checkpoint").exists()


def test_gate_and_up_of_wrong_shapes_that_add_up_are_refused(tiny_hf: Path, tmp_path: Path) -> None:
    """Together they fill the fused matrix; unnoticed, rows of one projection would become rows of the other."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.gate_proj.weight"] = torch.zeros(60, 48)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(68, 48)

    with pytest.raises(InputError, match="gate_proj"):
        import_hf(edited_copy(tiny_hf, tmp_path / "bad", tensors=change), tmp_path / "checkpoint", ONE)
