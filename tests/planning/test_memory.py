"""Predicted bytes against the tensors of real training on the CPU, and against rehearsals, small and at full size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning_workers import held_in_training, rehearse_many
from tiny_models import save_tiny

from prism_nemo.config import ParallelConfig
from prism_nemo.models.catalog import CATALOG
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.planning.activations import Kernels, Shape, stage_activations
from prism_nemo.planning.flops import forward_flops, layer_flops
from prism_nemo.planning.hardware import Assumptions
from prism_nemo.planning.layouts import model_overrides
from prism_nemo.planning.memory import Workload, buffer_elements, estimate_memory, parameter_sizes, state_bytes
from prism_nemo.planning.rehearsal import Rehearsal
from prism_nemo.runtime.launch import launch

CASES = ("llama", "llama-tied", "granite", "granite-hybrid", "granite-hybrid-one-group", "nemotron-h")
LAYOUTS = {
    "TP1": ParallelConfig(),
    "TP2 SP": ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
    "PP2": ParallelConfig(pipeline_model_parallel_size=2),
    "DP2": ParallelConfig(data_parallel_size=2),
}
LENGTH, ROWS = 48, 1


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("memory")
    return {case: save_tiny(case, root / case) for case in CASES}


@pytest.fixture(scope="module", params=LAYOUTS, ids=LAYOUTS.keys())
def held(request: pytest.FixtureRequest, tiny: dict[str, Path]) -> tuple[ParallelConfig, dict[str, Any]]:
    layout = LAYOUTS[request.param]
    folders = {case: str(folder) for case, folder in tiny.items()}
    return layout, launch(held_in_training, folders, layout, LENGTH, ROWS, processes=layout.world_size)


def test_a_real_run_holds_what_is_predicted(held: tuple[ParallelConfig, dict[str, Any]], tiny: dict[str, Path]) -> None:
    """Parameters, gradients and optimizer to the byte. Of data-parallel ranks the prediction is the largest optimizer:
    the others hold the padding, less than lcm(DP, 128) elements per bucket and 63 per parameter."""
    layout, found = held
    for case, ranks in found.items():
        a = read_hf_config(tiny[case])
        for stage in range(layout.pipeline_model_parallel_size):
            predicted = state_bytes(a, layout, stage, True, 4)
            mine = [rank for rank in ranks if rank["stage"] == stage]
            assert {rank["parameters"] for rank in mine} == {predicted.parameters}, case
            assert {rank["gradients"] for rank in mine} == {predicted.gradients}, case
            optimizer = max(rank["optimizer"] for rank in mine)
            parameters = len(parameter_sizes(a, layout.tensor_model_parallel_size, 1, 0, 0))
            slack = 8 * 63 * parameters if layout.data_parallel_size > 1 else 0
            assert predicted.optimizer - slack <= optimizer <= predicted.optimizer, case


def test_a_real_run_keeps_the_activations_that_are_predicted(
    held: tuple[ParallelConfig, dict[str, Any]], tiny: dict[str, Path]
) -> None:
    """All storages that autograd keeps, to the byte but for the mask of the vocabulary's padding (a byte for each of at
    most 149 columns), which only the ranks with padding have, and 8 bytes of empty storages."""
    layout, found = held
    for case, ranks in found.items():
        a = read_hf_config(tiny[case])
        for rank in ranks:
            shape = Shape.of(layout, ROWS, LENGTH)
            predicted = sum(
                stage_activations(a, layout.pipeline_model_parallel_size, rank["stage"], shape, Kernels.named("cpu"))
            )
            assert predicted - 149 <= rank["kept"] <= predicted + 8, (case, rank["stage"])


SMALL = {
    "TP2 PP2 DP2": ParallelConfig(2, 2, 2, True),
    "PP4 DP3": ParallelConfig(1, 4, 3),
    "TP2 DP5": ParallelConfig(2, 1, 5, False),
}
# Two dense models (a window; a tied embedding) and both kinds of hybrids, with groups cut and groups copied.
FULL = ("mistral-7b-v0.1", "granite-4.0-micro", "granite-4.0-h-micro", "nemotron-h-8b")
FULL_LAYOUT = ParallelConfig(4, 2, 1, True)


@pytest.fixture(scope="module")
def rehearsed(tiny: dict[str, Path]) -> dict[tuple[str, str, str], tuple[Architecture, ParallelConfig, Rehearsal]]:
    runs = {}
    for case in CASES:
        a = read_hf_config(tiny[case])
        for name, layout in SMALL.items():
            runs[case, name, "none"] = (a, layout, LENGTH, ROWS, "none", True, "bf16")
        for recompute in ("selective", "full"):
            runs[case, "TP2 PP2 DP2", recompute] = (a, SMALL["TP2 PP2 DP2"], LENGTH, ROWS, recompute, True, "bf16")
        runs[case, "DP2", "fp32"] = (a, LAYOUTS["DP2"], LENGTH, ROWS, "none", True, "fp32")
        runs[case, "no shards", "none"] = (a, LAYOUTS["DP2"], LENGTH, ROWS, "none", False, "bf16")
    for model in FULL:
        runs[model, "full size", "none"] = (CATALOG[model].architecture, FULL_LAYOUT, 8192, 1, "none", True, "bf16")
    found = launch(rehearse_many, list(runs.values()))
    return {key: (run[0], run[1], result) for (key, run), result in zip(runs.items(), found, strict=True)}


Rehearsed = dict[tuple[str, str, str], tuple[Architecture, ParallelConfig, Rehearsal]]


def test_every_rank_holds_what_is_predicted(rehearsed: Rehearsed) -> None:
    for key, (a, layout, counted) in rehearsed.items():
        value, sharded = 4 if "fp32" in key else 2, "no shards" not in key
        assert len(counted.ranks) == layout.world_size
        for rank in counted.ranks:
            tp, pp, dp = (
                layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size, layout.data_parallel_size
            )  # fmt: skip
            sizes = parameter_sizes(a, tp, pp, rank.tensor, rank.pipeline)
            predicted = state_bytes(a, layout, rank.pipeline, sharded, value)
            assert rank.parameters == sum(count for count, _ in sizes), key
            assert rank.gradient_bytes == predicted.gradients == 4 * buffer_elements(sizes, dp, sharded), key
            assert rank.parameter_bytes == predicted.parameters, key
            assert rank.optimizer_bytes <= predicted.optimizer, key
            assert sum(rank.buckets) * 4 == rank.gradient_bytes, key
        for stage in range(layout.pipeline_model_parallel_size):
            # What one replica's optimizers hold together is every parameter once, whoever holds the padding.
            mine = [r for r in counted.ranks if r.pipeline == stage and r.tensor == 0]
            copies = 1 if sharded else layout.data_parallel_size
            per_parameter = 12 if value == 2 else 8
            assert sum(r.optimizer_bytes for r in mine) == copies * per_parameter * mine[0].parameters, key


def test_totals_are_the_models(rehearsed: Rehearsed) -> None:
    for (name, where, _), (a, layout, counted) in rehearsed.items():
        if where == "full size":
            assert counted.parameters == CATALOG[name].parameters
        else:
            padding = a.padded_vocab_size(layout.tensor_model_parallel_size) - a.vocab_size
            rows = padding * (1 if a.tied_embeddings else 2)
            expected = sum(count for count, _ in parameter_sizes(replace(a), 1, 1, 0, 0))
            assert counted.parameters == expected + rows * a.hidden_size, (name, where)


def test_rehearsed_activations_are_what_is_predicted(rehearsed: Rehearsed) -> None:
    """Every storage that the layers keep with a GPU's kernels, to the byte, in each mode of recomputation."""
    for key, (a, layout, counted) in rehearsed.items():
        if "fp32" in key:
            continue  # the CPU's own functions take fp32 over where the device is the CPU, not in a rehearsal
        length = 8192 if key[1] == "full size" else LENGTH
        shape, pp = Shape.of(layout, ROWS, length), layout.pipeline_model_parallel_size
        assert len(counted.stages) == pp
        for stage in counted.stages:
            kept = stage_activations(a, pp, stage.stage, shape, Kernels.named("torch"), key[2])
            padded = a.padded_vocab_size(shape.tp)
            # Stages run on their first tensor-parallel rank; padding, and its mask, is the last one's.
            mask = padded // shape.tp if padded != a.vocab_size and shape.tp > 1 and kept[1] else 0
            assert stage.kept_bytes == sum(kept) - mask, (key, stage.stage)


def test_rehearsed_flops_are_the_formulas(rehearsed: Rehearsed) -> None:
    """Flash attention's backward pass computes the scores again, a quarter of its forward FLOPs on top of twice."""
    for key, (a, layout, counted) in rehearsed.items():
        if "fp32" in key or key[0] == "mistral-7b-v0.1":  # blocks of the window: see test_flops
            continue
        length, tp = (8192 if key[1] == "full size" else LENGTH), layout.tensor_model_parallel_size
        total = sum(
            (layer_flops(a, kind, [length], masked=True, tp=tp) for kind in "M*-" for _ in a.layers_of(kind)),
            start=forward_flops(replace(a, num_layers=0, layer_pattern="" if not a.layer_pattern else " "), [0]),
        )
        logits = 2 * length * a.hidden_size * a.padded_vocab_size(tp)
        again = {"selective": total.attention, "full": total.total}.get(key[2], 0)
        assert tp * sum(s.forward_flops for s in counted.stages) == total.total + logits, key
        backward = 2 * (total.total + logits) + total.attention // 2 + again
        assert tp * sum(s.backward_flops for s in counted.stages) == backward, key


def test_a_rehearsal_takes_no_memory(rehearsed: Rehearsed) -> None:
    """All of the above in one process, four models of 3B to 8B among them."""
    assert max(counted.peak_bytes for _, _, counted in rehearsed.values()) < 1.5e9


def test_in_flight_micro_batches_and_stages() -> None:
    """1F1B: the first of 4 stages holds 4 micro-batches, the last one; fewer if there are fewer."""
    a = CATALOG["llama-3.1-8b"].architecture
    layout, assumed = ParallelConfig(2, 4, 1, True), Assumptions(reserved_bytes=0, fragmentation=0)
    kernels = Kernels.on_gpu(a)
    shape = Shape.of(layout, 1, 8192)
    one = stage_activations(a, 4, 1, shape, kernels)[0]
    many = [estimate_memory(a, layout, Workload(8192, 1, 16), kernels, assumed, stage) for stage in range(4)]
    few = [estimate_memory(a, layout, Workload(8192, 1, 2), kernels, assumed, stage) for stage in range(4)]
    assert [m.activations // one for m in many] == [4, 3, 2, 1]
    assert [m.activations // one for m in few] == [2, 2, 2, 1]
    assert [m.logits > 0 for m in many] == [False, False, False, True]
    assert many[3].logits > 8192 * a.vocab_size // 2 * 4  # fp32 probabilities
    full = estimate_memory(a, layout, Workload(8192, 1, 16, "full"), kernels, assumed, 1)
    assert full.activations == 3 * 8 * 4096 * a.hidden_size * 2  # 8 layers' inputs, half of the sequence, bf16


def test_recomputation_is_megatrons() -> None:
    assert model_overrides("none") == {}
    assert model_overrides("selective") == {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    assert model_overrides("full")["recompute_num_layers"] == 1
