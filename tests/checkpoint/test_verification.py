"""What `verify` compares with, how it decides, and the card that it writes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_llama import edited_copy, save_tiny_llama
from tiny_models import save_tiny
from transformers.models.auto import AutoModelForCausalLM

from prism_nemo.checkpoint.card import write_card
from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.verification import Verification, compare_logits, set_dt_limits, verify
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.family import read_hf_config


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_tolerance_scales_with_the_logits() -> None:
    theirs = normal(1, 8, 5)
    for scale in (1.0, 100.0):
        assert compare_logits(theirs * scale * (1 + 1e-6), theirs * scale).passed
        assert not compare_logits(theirs * scale * 1.01, theirs * scale).passed


def test_rounding_everywhere_passes_and_a_wrong_row_does_not() -> None:
    """The mean over all logits would not see one row of the vocabulary, nor the largest alone a small shift of all."""
    theirs = normal(2, 64, 300)
    noise = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1))
    assert compare_logits(theirs + 0.9e-5 * noise, theirs).passed
    assert not compare_logits(theirs + 1.2e-5 * noise, theirs).passed
    one = theirs.clone()
    one[:, 5, 7] += 1e-4
    result = compare_logits(one, theirs)
    assert result.rms_logit_diff < result.rms_tolerance
    assert not result.passed
    everywhere = compare_logits(theirs + 1.5e-5, theirs)
    assert everywhere.max_abs_logit_diff < everywhere.tolerance
    assert not everywhere.passed


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_never_pass(value: float) -> None:
    theirs = normal(1, 2, 3)
    ours = theirs.clone()
    ours[0, 0, 0] = value
    assert not compare_logits(ours, theirs).passed


def test_one_different_tensor_is_enough() -> None:
    theirs = normal(1, 2, 3)
    assert compare_logits(theirs, theirs, tensors=2).passed
    assert not compare_logits(theirs, theirs, tensors=2, different_tensors=["a"]).passed


def token_by_token(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """The recurrence as it is defined: x [l, h, p], dt [l, h], a [h], b and c [l, h, n]."""
    state, outputs = torch.zeros(x.shape[1], x.shape[2], b.shape[2], dtype=x.dtype), []
    for t in range(len(x)):
        decay = torch.exp(dt[t] * a)[:, None, None]
        state = state * decay + (dt[t][:, None] * x[t])[:, :, None] * b[t][:, None, :]
        outputs.append((state * c[t][:, None, :]).sum(-1))
    return torch.stack(outputs)


@pytest.mark.parametrize("case", ["nemotron-h", "granite-hybrid"])
def test_the_reference_itself(case: str, tmp_path: Path) -> None:
    """Some releases of transformers carry the state from chunk to chunk wrongly on the CPU. A mixer over 51 tokens in
    chunks of 16 against the recurrence, in fp64; and that one chunk alone would not have shown it.
    """
    hf = save_tiny(case, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float64)
    set_dt_limits(model, read_hf_config(hf))
    mixer: Any = next(m for m in model.modules() if hasattr(m, "A_log"))
    heads, groups, size = mixer.num_heads, mixer.n_groups, mixer.ssm_state_size
    hidden = 0.5 * normal(1, 51, 48).double()
    with torch.no_grad():
        ours = mixer(hidden)
        ours = ours[0] if isinstance(ours, tuple) else ours
        inner, bc = heads * mixer.head_dim, groups * size
        gate, xbc, dt = mixer.in_proj(hidden)[0].split([inner, inner + 2 * bc, heads], dim=-1)
        xbc = torch.nn.functional.silu(mixer.conv1d(xbc.T[None])[0, :, : len(hidden[0])].T)
        x, b, c = xbc.split([inner, bc, bc], dim=-1)
        x = x.reshape(-1, heads, mixer.head_dim)
        b, c = (t.reshape(-1, groups, size).repeat_interleave(heads // groups, dim=1) for t in (b, c))
        dt = torch.nn.functional.softplus(dt + mixer.dt_bias)
        y = token_by_token(x, dt, -torch.exp(mixer.A_log), b, c) + mixer.D[None, :, None] * x
        theirs = mixer.out_proj(mixer.norm(y.reshape(1, -1, inner), gate[None]))
    assert mixer.chunk_size == 16
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.std().item())


@pytest.mark.parametrize("case", ["nemotron-h", "granite-hybrid", "llama"])
def test_only_nemotron_is_given_its_limit(case: str, tmp_path: Path) -> None:
    hf = save_tiny(case, tmp_path / "hf")
    notes = set_dt_limits(AutoModelForCausalLM.from_pretrained(hf), read_hf_config(hf))
    assert len(notes) == (case == "nemotron-h")
    assert all("Plain transformers scores this model a little differently" in note for note in notes)


def test_nemotron_with_a_floor_is_another_function_than_without(tmp_path: Path) -> None:
    """The tiny model's step sizes begin at 0.0005; a floor of 0.01 moves the logits, on both sides alike."""
    hf = save_tiny("nemotron-h", tmp_path / "hf")
    import_hf(hf, tmp_path / "floor", ParallelConfig(), dt_floor=0.01)
    import_hf(hf, tmp_path / "none", ParallelConfig())
    with_floor = verify(hf, tmp_path / "floor", ParallelConfig())
    without = verify(hf, tmp_path / "none", ParallelConfig(2))
    assert with_floor.passed
    assert without.passed
    assert with_floor.logit_std != without.logit_std


def test_checkpoint_of_another_type_is_compared_after_a_stated_cast(tmp_path: Path) -> None:
    hf = save_tiny_llama(tmp_path / "hf")
    half = edited_copy(hf, tmp_path / "half", tensors=lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    import_hf(half, tmp_path / "checkpoint", ParallelConfig())
    result = verify(hf, tmp_path / "checkpoint", ParallelConfig())
    assert result.cast == ["float32 to bfloat16"]
    assert result.different_tensors == []
    assert not result.passed  # the logits are those of rounded weights


# Cards.

RESULT = Verification(1e-6, 5e-5, 2e-7, 1e-5, 1.0, 1.0, 128, tensors=39)
ONE, TP2 = ParallelConfig(), ParallelConfig(2)


def test_card_says_what_was_verified_and_what_was_not(tmp_path: Path) -> None:
    path = tmp_path / "docs/tiny.yaml"
    write_card(path, "tiny", "llama", RESULT, ONE, "prism-nemo verify a b")
    card = yaml.safe_load(path.read_text())
    assert "&id" not in path.read_text()  # entries that people edit are not tied to each other
    assert list(card) == ["model", "family", "verified", "not_verified"]
    entry = card["verified"]["logits at TP 1, PP 1"]
    assert entry["command"] == "prism-nemo verify a b"
    assert entry["figures"]["largest_difference"] == 1e-6
    assert {"torch", "megatron-core", "transformers"} <= entry["versions"].keys()
    assert card["verified"]["weights bit for bit"]["figures"]["tensors"] == 39
    assert "gradients" in card["not_verified"]


def test_card_keeps_what_others_wrote(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    write_card(path, "tiny", "llama", RESULT, ONE, "first")
    card = yaml.safe_load(path.read_text())
    card["note"] = "by hand"
    card["verified"]["gradients"] = {"command": "pytest"}
    del card["not_verified"]["gradients"]
    path.write_text(yaml.safe_dump(card))
    write_card(path, "tiny", "llama", RESULT, TP2, "second")
    again = yaml.safe_load(path.read_text())
    assert again["note"] == "by hand"
    assert again["verified"]["gradients"] == {"command": "pytest"}
    assert "gradients" not in again["not_verified"]
    commands = {name: again["verified"][name]["command"] for name in again["verified"]}
    assert commands["logits at TP 1, PP 1"] == "first"
    assert commands["logits at TP 2, PP 1"] == "second"
    text = path.read_text()
    write_card(path, "tiny", "llama", RESULT, TP2, "second")
    assert path.read_text() == text


def test_what_fails_is_no_longer_verified(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    write_card(path, "tiny", "llama", RESULT, ONE, "first")
    bad = Verification(math.inf, 5e-5, math.inf, 1e-5, 1.0, 0.1, 128, tensors=39, different_tensors=["a"])
    write_card(path, "tiny", "llama", bad, ONE, "second")
    card = yaml.safe_load(path.read_text())
    assert set(card["failed"]) == {"weights bit for bit", "logits at TP 1, PP 1"}
    assert "verified" not in card


def test_card_of_another_model_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    write_card(path, "tiny", "llama", RESULT, ONE, "first")
    before = path.read_text()
    with pytest.raises(InputError, match=r"is the card of family 'llama', not of 'granite'"):
        write_card(path, "tiny", "granite", RESULT, ONE, "second")
    assert path.read_text() == before
    path.write_text("- a list")
    with pytest.raises(InputError, match="not a verification card"):
        write_card(path, "tiny", "llama", RESULT, ONE, "third")
