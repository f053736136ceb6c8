"""Hidden states against transformers', for texts of different length, in every batch size; the random update."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from analysis_workers import moved_randomly, states_of
from tiny_llama import all_tensors
from tiny_models import hf_model, save_tiny
from tiny_stages import moved_copy
from tiny_training import character_tokenizer

from prism_nemo.analysis.activations import States, pick_tokens, texts_of
from prism_nemo.analysis.token_rows import (
    TokenRows,
    check_rows,
    equal_length_batches,
    file_inputs,
)
from prism_nemo.analysis.weights import compare_weights
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.runtime.launch import launch

ROWS = [[(7 * i + 3 * j) % 149 for j in range(length)] for i, length in enumerate((9, 4, 9, 1, 17, 9))]


def test_batches_are_of_one_length_and_hold_every_row_once() -> None:
    batches = list(equal_length_batches(ROWS, batch_tokens=20))
    assert sorted(place for places, _ in batches for place in places) == list(range(6))
    for places, tokens in batches:
        assert tokens.tolist() == [ROWS[place] for place in places]
    assert [tuple(tokens.shape) for _, tokens in batches] == [(1, 17), (2, 9), (1, 9), (1, 4), (1, 1)]
    assert all(len(places) == 1 for places, _ in equal_length_batches(ROWS, batch_tokens=1))


def test_picked_tokens_are_the_same_for_every_model() -> None:
    picks = pick_tokens(ROWS, 4, seed=0)
    assert [len(own) for own in picks] == [4, 4, 4, 1, 4, 4]
    for own, row in zip(picks, ROWS, strict=True):
        assert own == sorted(set(own))
        assert max(own) < len(row)
    assert picks == pick_tokens(ROWS, 4, seed=0)
    assert picks != pick_tokens(ROWS, 4, seed=1)
    assert len({tuple(picks[i]) for i in (0, 2, 5)}) > 1  # rows of one length do not all get the same places
    assert texts_of(picks).tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] + [4] * 4 + [5] * 4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, States]]:
    """By case its folder and its states."""
    root = tmp_path_factory.mktemp("models")
    folders = {case: save_tiny(case, root / case) for case in ("llama", "nemotron-h")}
    states = launch(states_of, [str(f) for f in folders.values()], ROWS, pick_tokens(ROWS, 3, seed=0), 40)
    return {case: (folder, own) for (case, folder), own in zip(folders.items(), states, strict=True)}


@pytest.mark.parametrize("case", ["llama", "nemotron-h"])
def test_states_are_those_of_transformers(case: str, found: dict[str, tuple[Path, States]]) -> None:
    """Of each text by itself, where ours share forward passes: nothing leaks between texts, none is in another's place.

    Tolerance: fp32 states of some 1 to 10 after up to 8 layers; wrong masks or rows show at 1e-1 and above.
    """
    folder, states = found[case]
    picks, pooled, tokens = pick_tokens(ROWS, 3, seed=0), states.pooled, states.tokens
    theirs = hf_model(folder)
    first = 0
    largest = torch.zeros(len(pooled), 48)
    for number, row in enumerate(ROWS):
        with torch.no_grad():
            expected = theirs(torch.tensor([row]), output_hidden_states=True, use_cache=False).hidden_states
        assert len(expected) == len(pooled)
        # transformers' last one is after the final norm, which ours is not.
        for layer, state in enumerate(expected[:-1]):
            assert torch.allclose(pooled[layer][number], state[0].mean(dim=0), atol=2e-4)
            own = tokens[layer][first : first + len(picks[number])]
            assert torch.allclose(own, state[0][picks[number]], atol=2e-4)
            largest[layer] = torch.maximum(largest[layer], state[0].abs().amax(dim=0))
        first += len(picks[number])
    for layer in range(len(pooled) - 1):
        for size in states.sizes[layer].largest(1000):
            assert size["magnitude"] == pytest.approx(float(largest[layer][size["dimension"]]), abs=2e-4)


@pytest.mark.parametrize("case", ["llama", "granite-hybrid"])
def test_random_update_has_the_norm_of_the_real_one_tensor_by_tensor(case: str, tmp_path: Path) -> None:
    """Also for tensors that are parts of one parameter (query, key and value; gate and up), and for Mamba mixers."""
    folder = save_tiny(case, tmp_path / "a")
    other = moved_copy(folder, tmp_path / "b", 0.02, seed=3)
    change = compare_weights(folder, other)
    relative = {name: c.relative_l2 * (1 + i % 5) for i, (name, c) in enumerate(sorted(change.tensors.items()))}
    still = sorted(relative)[4]
    relative[still] = 0.0
    before = all_tensors(folder)
    (distance, first), (again, same), (_, second) = launch(moved_randomly, str(folder), relative, (0, 0, 1))
    assert first.keys() == before.keys()
    moved = total = 0.0
    for name, old in before.items():
        step = (first[name] - old).double()
        # fp32 weights: the rounding of w + noise is 6e-8 of w, 3e-6 of an update of 2 %.
        assert float(step.norm() / old.double().norm()) == pytest.approx(relative[name], rel=1e-4)
        assert torch.equal(first[name], same[name])
        moved, total = moved + float(step.square().sum()), total + float(old.double().square().sum())
        if name == still:
            continue
        other_step = (second[name] - old).double()
        # Independent directions: a cosine of standard deviation 1 / sqrt(size); 5 of them.
        cosine = float((step * other_step).sum() / (step.norm() * other_step.norm()))
        assert abs(cosine) < min(0.99, 5 / step.numel() ** 0.5)
    assert torch.equal(first[still], before[still])
    assert distance == again == pytest.approx((moved / total) ** 0.5, rel=1e-6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return character_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_texts_of_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    records.write_text('{"text": "abcdef"}\n{"text": ""}\n{"text": "xyz"}\n{"text": "123456789"}\n')
    plain = tmp_path / "plain.txt"
    plain.write_text("abcdefghij")
    found = file_inputs([str(records), str(plain)], tokenizer, texts=10, seq_length=4)
    assert [item.name for item in found] == ["records", "plain"]
    assert [tokenizer.decode(row) for row in found[0].rows] == ["abcd", "xyz", "1234"]
    assert [tokenizer.decode(row) for row in found[1].rows] == ["abcd", "efgh"]
    assert len(file_inputs([str(records)], tokenizer, texts=2, seq_length=4)[0].rows) == 2


def test_texts_that_cannot_be_used(tokenizer: Tokenizer, tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.write_text('{"text": ""}\n')
    broken.write_text('{"text": "a"}\n{"txt": "b"}\n')
    for file, match in ((empty, "no text"), (broken, "broken.jsonl:2"), (tmp_path / "none.txt", "no such file")):
        with pytest.raises(InputError, match=match):
            file_inputs([str(file)], tokenizer, 5, 5)
    with pytest.raises(InputError, match="two files are called"):
        file_inputs([str(empty), str(tmp_path / "empty.txt")], tokenizer, 5, 5)
    for rows, least, match in (
        ([[1, 2]], 2, "1 texts"),
        ([[1, 99]], 1, "outside the vocabulary of m"),
        ([[1] * 9], 1, "9 tokens, but m reads 8"),
    ):
        with pytest.raises(InputError, match=match):
            check_rows([TokenRows("x", rows)], 99, 8, "m", least)
