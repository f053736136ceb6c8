"""What is said of a path that is no model, before anything is loaded; and the name of what is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from tiny_training import character_tokenizer

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.engines.fingerprint import fingerprint
from prism_nemo.evaluation.engines.open import about, find_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf and native with a tokenizer, bare and bare-native without one."""
    root = tmp_path_factory.mktemp("models")
    save_tiny("llama", root / "bare")
    shutil.copytree(root / "bare", root / "hf")
    character_tokenizer(root / "hf")
    import_hf(root / "hf", root / "runs" / "mid" / "checkpoints" / "step_00000007", ParallelConfig())
    import_hf(root / "bare", root / "bare-native", ParallelConfig())
    return root


STEP = Path("runs") / "mid" / "checkpoints" / "step_00000007"


@pytest.mark.parametrize(("place", "kind"), [(Path("hf"), "huggingface"), (STEP, "native")])
def test_a_checkpoint_brings_its_tokenizer(place: Path, kind: str, models: Path) -> None:
    found = find_model(models / place)
    assert (found.kind, found.engine, found.architecture.vocab_size) == (kind, "megatron", 149)
    assert found.tokenizer.decode(found.tokenizer.encode("3 + 4")) == "3 + 4"


@pytest.mark.parametrize("place", ["bare", "bare-native"])
def test_one_without_a_tokenizer_needs_it_named(place: str, models: Path) -> None:
    with pytest.raises(InputError, match=rf"{place}: has no tokenizer .*--tokenizer DIR"):
        find_model(models / place)
    assert find_model(models / place, tokenizer=models / "hf").tokenizer.vocab_size <= 149


def test_the_tokenizer_of_a_larger_model_is_refused(models: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "small", vocab_size=50)
    with pytest.raises(InputError, match=r"tokens, but the model has 50; it is not this model's tokenizer"):
        find_model(tmp_path / "small", tokenizer=models / "hf")


def _half_written(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / STEP, tmp_path / "step_00000007")
    (tmp_path / "step_00000007" / "manifest.json").unlink()
    return tmp_path / "step_00000007"


def _temporary(models: Path, tmp_path: Path) -> Path:
    (tmp_path / "step_00000008.tmp-123").mkdir()
    return tmp_path / "step_00000008.tmp-123"


def _lacking_a_file(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / STEP, tmp_path / "c")
    next((tmp_path / "c").glob("*.distcp")).unlink()
    return tmp_path / "c"


def _truncated(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / "hf", tmp_path / "hf")
    weights = (tmp_path / "hf" / "model.safetensors").read_bytes()
    (tmp_path / "hf" / "model.safetensors").write_bytes(weights[:-1])
    return tmp_path / "hf"


def _without_weights(models: Path, tmp_path: Path) -> Path:
    shutil.copytree(models / "hf", tmp_path / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_half_written, "was not written to its end"),
        (_temporary, "was not written to its end"),
        (_lacking_a_file, "missing from the checkpoint"),
        (_truncated, "truncated or not a safetensors file"),
        (_without_weights, "neither model.safetensors nor"),
        (lambda models, tmp_path: models / "nowhere", "no such folder"),
        (lambda models, tmp_path: tmp_path, "neither a prism-nemo checkpoint .* nor a Hugging Face folder"),
        (lambda models, tmp_path: models / "runs" / "mid", "name one of them, such as .*step_00000007"),
        (lambda models, tmp_path: models / "runs" / "mid" / "checkpoints", "such as .*step_00000007"),
    ],
)
def test_a_path_that_is_no_whole_model_is_refused(make: Any, said: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        find_model(make(models, tmp_path))


@pytest.mark.parametrize(
    ("place", "options", "said"),
    [
        ("hf", {"engine": "sglang"}, "engine: 'sglang' is unknown; known: megatron, transformers, vllm"),
        ("bare-native", {"engine": "transformers"}, "prism-nemo export"),
        ("hf", {"engine": "transformers", "layout": ParallelConfig(2)}, "runs in one process, not in TP2"),
        ("hf", {"layout": ParallelConfig(3)}, "tensor_model_parallel_size 3 does not divide"),
        ("hf", {"layout": ParallelConfig(context_parallel_size=2)}, "has no use for context_parallel_size"),
        ("hf", {"max_length": 129}, "max_length: 129 is not from 1 to the model's 128"),
        ("hf", {"max_length": 0}, "max_length: 0 is not from 1"),
        (
            "hf",
            {"batch_size": 4},
            "batch_size: no option of engine megatron, which has cache_tokens, pass_tokens, slots",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused(place: str, options: dict[str, Any], said: str, models: Path) -> None:
    tokenizer = models / "hf"
    with pytest.raises(InputError, match=said):
        find_model(models / place, tokenizer=tokenizer, **options)


@pytest.mark.parametrize("place", [Path("hf"), STEP])
def test_the_fingerprint_is_that_of_the_weights_and_not_of_the_place(place: Path, models: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models / place, copy)
    assert fingerprint(copy) == fingerprint(models / place)
    assert len(fingerprint(copy)) == 64


def test_one_bit_of_one_weight_changes_the_fingerprint(models: Path, tmp_path: Path) -> None:
    """Of a file of the same size, and again in a native checkpoint that is made of it."""
    changed = tmp_path / "changed"
    shutil.copytree(models / "hf", changed)
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"].view(torch.int32)[17, 5] ^= 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert (changed / "model.safetensors").stat().st_size == (models / "hf" / "model.safetensors").stat().st_size
    assert fingerprint(changed) != fingerprint(models / "hf")
    import_hf(changed, tmp_path / "native", ParallelConfig())
    assert fingerprint(tmp_path / "native") != fingerprint(models / STEP)


def test_another_function_of_the_same_weights_has_another_fingerprint(models: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(models / "hf", changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    assert fingerprint(changed) != fingerprint(models / "hf")


def test_a_checkpoint_without_recorded_hashes_is_read(models: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(models / STEP, old)
    manifest = json.loads((old / "manifest.json").read_text())
    del manifest["sha256"]
    (old / "manifest.json").write_text(json.dumps(manifest))
    before = fingerprint(old)
    assert before == fingerprint(models / STEP)
    file = next(old.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert fingerprint(old) != before


def test_a_folder_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a prism-nemo checkpoint nor a folder with safetensors"):
        fingerprint(tmp_path)


def test_results_name_a_step_with_its_run(models: Path) -> None:
    found = about(models / STEP)
    assert (found["kind"], found["name"]) == ("native", "mid/step_00000007")
    assert (about(models / "hf")["name"], about(models / "hf")["hash"]) == ("hf", fingerprint(models / "hf"))
