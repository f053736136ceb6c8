"""FLOP formulas against counting, on real tensors and by brute force."""

from __future__ import annotations

from pathlib import Path

import pytest
from planning_workers import counted_flops
from tiny_models import save_tiny

from prism_nemo.models.catalog import CATALOG
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.planning.flops import (
    attention_pairs,
    flops_per_token,
    forward_flops,
    layer_flops,
    model_flops_utilisation,
    projection_weights,
    training_flops,
)
from prism_nemo.runtime.launch import launch

# 160 tokens: chunks of 16 divide them, blocks of 128 of the window's kernel do not.
LENGTH = 160
CASES = ("llama", "llama-tied", "mistral-window", "granite", "granite-hybrid", "granite-hybrid-one-group", "nemotron-h")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Architecture, int, int]]:
    root = tmp_path_factory.mktemp("flops")
    folders = {case: save_tiny(case, root / case, max_position_embeddings=256) for case in CASES}
    found = launch(counted_flops, {case: str(folder) for case, folder in folders.items()}, LENGTH)
    return {case: (read_hf_config(Path(folder)), *found[case]) for case, folder in folders.items()}


def computed_by_blocks(window: int, length: int, block: int = 128) -> int:
    """Pairs that `windowed_attention` computes: every block of queries with all keys that one of them sees."""
    return sum(
        (min(start + block, length) - start) * (min(start + block, length) - max(0, start - window + 1))
        for start in range(0, length, block)
    )


@pytest.mark.parametrize("case", CASES)
def test_formulas_are_what_is_counted(counted: dict[str, tuple[Architecture, int, int]], case: str) -> None:
    """Exactly. Beyond the formula torch's scan sums decays by a matrix product with a triangle of ones (2 heads q^2 per
    chunk), and its backward pass computes scores and decays again; both are written out here."""
    a, forward, backward = counted[case]
    expected = forward_flops(a, [LENGTH], masked=True)
    attention = expected.attention
    if a.sliding_window is not None:
        width = 4 * a.num_attention_heads * a.kv_channels * len(a.layers_of("*"))
        attention = width * computed_by_blocks(a.sliding_window, LENGTH)
    scan_forward = scan_backward = 0
    if (m := a.mamba) is not None:
        assert LENGTH % m.chunk_size == 0
        q, h, g, p, n = m.chunk_size, m.heads, m.groups, m.head_dim, m.state_size
        chunks = LENGTH // q * len(a.layers_of("M"))
        scan_forward = chunks * 2 * h * q * q + expected.scan
        scan_backward = chunks * 2 * (2 * h * q * q + 3 * g * q * q * n + 2 * h * q * q * p + 5 * h * q * n * p)
    products = expected.projections + expected.logits
    assert forward == products + attention + scan_forward
    assert backward == 2 * (products + attention) + scan_backward


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_by_brute_force(window: int | None) -> None:
    lengths = [1, 7, 2, 12]
    document = [number for number, n in enumerate(lengths) for _ in range(n)]
    seen = sum(
        document[i] == document[j] and j <= i and (window is None or i - j < window)
        for i in range(len(document))
        for j in range(len(document))
    )
    assert attention_pairs(lengths, window) == seen
    assert attention_pairs(lengths, masked=True) == 1 + 49 + 4 + 144


@pytest.mark.parametrize("model", CATALOG.values(), ids=CATALOG.keys())
def test_weights_of_products_are_the_parameters(model: object) -> None:
    """All parameters but norms, the convolution, numbers of heads and the embedding: below 0.2 % of the layers'."""
    a = model.architecture  # type: ignore[attr-defined]
    layers = sum(projection_weights(a, kind) * len(a.layers_of(kind)) for kind in "M*-" if a.layers_of(kind))
    embeddings = a.vocab_size * a.hidden_size * (1 if a.tied_embeddings else 2)
    rest = model.parameters - embeddings - layers  # type: ignore[attr-defined]
    assert 0 < rest < 0.002 * layers


def test_training_is_three_forward_passes_and_what_is_computed_again() -> None:
    a = CATALOG["nemotron-h-8b"].architecture
    forward = forward_flops(a, [8192])
    assert training_flops(a, [8192]) == 3 * forward.total
    assert training_flops(a, [8192], "selective") - training_flops(a, [8192]) == forward.attention > 0
    assert training_flops(a, [8192], "full") - training_flops(a, [8192]) == forward.total - forward.logits
    assert flops_per_token(a, 8192) == training_flops(a, [8192]) / 8192
    # Documents take away attention alone: 4096 tokens twice see a half of the pairs of 8192 once, and a bit.
    halves = forward_flops(a, [4096, 4096])
    assert (halves.projections, halves.scan, halves.logits) == (forward.projections, forward.scan, forward.logits)
    assert halves.attention / forward.attention == pytest.approx(0.5, abs=1e-3)


def test_replicated_groups_cost_every_rank() -> None:
    """One group at TP 4: each rank projects its own B and C, and scores them."""
    a = CATALOG["granite-4.0-h-micro"].architecture
    assert a.mamba is not None
    one, four = layer_flops(a, "M", [1024]), layer_flops(a, "M", [1024], tp=4)
    assert four.projections - one.projections == 2 * 1024 * a.hidden_size * 3 * 2 * a.mamba.state_size
    assert four.scan - one.scan == 2 * 1024 * 3 * a.mamba.chunk_size * a.mamba.state_size
    assert four.attention == one.attention == 0


def test_utilisation() -> None:
    a = CATALOG["llama-3.1-8b"].architecture
    rate = 64 * 989e12 / flops_per_token(a, 8192)
    assert model_flops_utilisation(a, 8192, rate / 2, 64, 989e12) == pytest.approx(0.5)
