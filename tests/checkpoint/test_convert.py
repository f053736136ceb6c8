"""Conversion is judged by forwarding both models; a round trip alone would pass with a mapping wrong both ways."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_workers as workers
import pytest
import torch
from tiny_llama import LINEAR, LLAMA3, all_tensors, edited_copy, save_tiny_llama
from transformers import LlamaForCausalLM

from prism_nemo.checkpoint.convert import compare_logits, export_hf, import_hf, verify
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
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_export_copies_tokenizer_files_only(converted: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, checkpoint = converted("grouped queries, untied")
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text("{}")
    (tmp_path / "tok/config.json").write_text("not ours")
    export_hf(checkpoint, tmp_path / "out", tokenizer=tmp_path / "tok")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
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


def test_tolerance_scales_with_the_logits() -> None:
    theirs = torch.randn(1, 8, 5, generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 100.0):
        assert compare_logits(theirs * scale * (1 + 1e-6), theirs * scale).passed
        assert not compare_logits(theirs * scale * 1.01, theirs * scale).passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_never_pass(value: float) -> None:
    theirs = torch.ones(1, 2, 3)
    ours = theirs.clone()
    ours[0, 0, 0] = value
    assert not compare_logits(ours, theirs).passed


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
