"""Predicted bytes against the tensors of real training on the CPU, and against rehearsals, small and at full size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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
from prism_nemo.planning.memory import (
    Workload,
    buffer_elements,
    estimate_memory,
    in_flight,
    parameter_sizes,
    replicas,
    state_bytes,
)
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
    "CP4": ParallelConfig(context_parallel_size=4),
    "PP2 VPP2": ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2),
    "TP2 PP2 VPP2 CP2 DP2": ParallelConfig(2, 2, 2, True, 2, 2),
}
ALL_MODES = ("TP2 PP2 DP2", "TP2 PP2 VPP2 CP2 DP2")
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
            for name in ALL_MODES:
                runs[case, name, recompute] = (a, SMALL[name], LENGTH, ROWS, recompute, True, "bf16")
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
            tp, pp, parts = (
                layout.tensor_model_parallel_size,
                layout.pipeline_model_parallel_size,
                layout.virtual_pipeline_model_parallel_size,
            )
            each = [parameter_sizes(a, tp, pp, rank.tensor, rank.pipeline, parts, part) for part in range(parts)]
            sizes = [size for part in each for size in part]
            buffers = sum(buffer_elements(part, replicas(layout), sharded) for part in each)
            predicted = state_bytes(a, layout, rank.pipeline, sharded, value)
            assert rank.parameters == sum(count for count, _ in sizes), key
            assert rank.gradient_bytes == predicted.gradients == 4 * buffers, key
            assert rank.parameter_bytes == predicted.parameters, key
            assert rank.optimizer_bytes <= predicted.optimizer, key
            assert sum(rank.buckets) * 4 == rank.gradient_bytes, key
        for stage in range(layout.pipeline_model_parallel_size):
            # What one replica's optimizers hold together is every parameter once, whoever holds the padding.
            mine = [r for r in counted.ranks if r.pipeline == stage and r.tensor == 0]
            copies = 1 if sharded else replicas(layout)
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
            parts = layout.virtual_pipeline_model_parallel_size
            kept = stage_activations(a, pp, stage.stage, shape, Kernels.named("torch"), key[2], parts)
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
        cp = layout.context_parallel_size
        total = sum(
            (layer_flops(a, kind, [length], masked=True, tp=tp, cp=cp) for kind in "M*-" for _ in a.layers_of(kind)),
            start=forward_flops(replace(a, num_layers=0, layer_pattern="" if not a.layer_pattern else " "), [0]),
        )
        logits = 2 * length * a.hidden_size * a.padded_vocab_size(tp)
        again = {"selective": total.attention, "full": total.total}.get(key[2], 0)
        assert tp * cp * sum(s.forward_flops for s in counted.stages) == total.total + logits, key
        backward = 2 * (total.total + logits) + total.attention // 2 + again
        assert tp * cp * sum(s.backward_flops for s in counted.stages) == backward, key


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


@pytest.mark.parametrize(("pp", "parts", "many"), [(2, 2, 4), (4, 2, 8), (4, 3, 4), (2, 4, 6), (4, 1, 8), (4, 1, 2)])
def test_what_is_in_flight_follows_megatrons_schedule(pp: int, parts: int, many: int) -> None:
    """Beside Megatron's own number of warm-up passes and its table of who is next."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    for stage in range(pp):
        group = SimpleNamespace(size=lambda: pp, rank=lambda stage=stage: stage)
        told = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=parts if parts > 1 else None)
        total, _, warmup, _ = get_pp_rank_microbatches(many, parts, pp, p2p_communicator=told)
        order = [part for _, part in get_schedule_table(many, parts, pp)]
        held, states = [0] * parts, []
        for i, part in enumerate(order):
            held[part] += 1
            states.append(list(held))
            if i >= warmup:
                held[parts - 1 - order[i - warmup]] -= 1
        assert in_flight(pp, parts, stage, many) == states
        assert len(states) == total


def test_a_virtual_pipeline_holds_more() -> None:
    """(p - 1)(v - 1) / v more micro-batches of a v-th of the layers, on the first stage (arXiv 2104.04473, 2.2)."""
    a, assumed = CATALOG["llama-3.1-8b"].architecture, Assumptions(reserved_bytes=0, fragmentation=0)
    kernels, work = Kernels.on_gpu(a), Workload(8192, 1, 64)
    plain = estimate_memory(a, ParallelConfig(1, 4), work, kernels, assumed, 1)
    parts = ParallelConfig(1, 4, virtual_pipeline_model_parallel_size=2)
    virtual = estimate_memory(a, parts, work, kernels, assumed, 1)
    assert plain.activations == 3 * 8 * (plain.activations // 24)
    # 2 x 2 + 1 x 4 warm-up passes and one more, of 4 layers each.
    assert virtual.activations == 9 * 4 * (plain.activations // 24)
    assert virtual.parameters == pytest.approx(plain.parameters, rel=1e-6)


def test_context_parallelism_cuts_tokens_and_optimizer() -> None:
    """Half of the tokens on each rank, and a kv head for each of its query heads' groups; the state is shared by all
    ranks that hold the same weights."""
    a, assumed = CATALOG["llama-3.1-8b"].architecture, Assumptions(reserved_bytes=0, fragmentation=0)
    kernels, work = Kernels.on_gpu(a), Workload(32768, 1, 8, "full")
    one = estimate_memory(a, ParallelConfig(1, 1, 8), work, kernels, assumed, 0)
    two = estimate_memory(a, ParallelConfig(1, 1, 4, context_parallel_size=2), work, kernels, assumed, 0)
    assert two.activations * 2 == one.activations
    assert two.logits * 2 == one.logits
    assert (two.parameters, two.gradients, two.optimizer) == (one.parameters, one.gradients, one.optimizer)


def test_fp8_weights_and_activations() -> None:
    """7.0B weights of linear layers: two copies of a byte beside the bf16 parameters, or one as the parameter and one
    beside it; the inputs of linear layers take a byte less."""
    a, assumed = CATALOG["llama-3.1-8b"].architecture, Assumptions(reserved_bytes=0, fragmentation=0)
    layout, work = ParallelConfig(1, 1, 8), Workload(8192, 1, 8)
    linear = 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
    bf16, fp8 = (estimate_memory(a, layout, work, Kernels.on_gpu(a, r), assumed, 0) for r in (None, "tensorwise"))
    assert (bf16.fp8_weights, fp8.fp8_weights) == (0, 2 * linear)
    assert fp8.parameters == bf16.parameters
    gathered = estimate_memory(
        a, layout, replace(work, fp8_param_gather=True), Kernels.on_gpu(a, "tensorwise"), assumed, 0
    )
    assert gathered.fp8_weights == linear
    assert gathered.parameters == bf16.parameters - linear
    # Norms' outputs and the second projection's input lose a byte; the attention's output is kept a second time.
    assert bf16.activations - fp8.activations == 32 * 8192 * (2 * 4096 + 14336 - 4096)
    blocks = estimate_memory(a, layout, work, Kernels.on_gpu(a, "mxfp8"), assumed, 0)
    assert blocks.fp8_weights == 2 * (linear + linear // 32)
    # Two of 32 layers in bf16.
    outside = replace(work, bf16_at_start=1, bf16_at_end=1)
    some = estimate_memory(a, layout, outside, Kernels.on_gpu(a, "tensorwise"), assumed, 0)
    assert some.fp8_weights == 2 * linear * 30 // 32
    assert (bf16.activations - some.activations) * 32 == (bf16.activations - fp8.activations) * 30


def test_recomputation_is_megatrons() -> None:
    assert model_overrides("none") == {}
    assert model_overrides("selective") == {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    assert model_overrides("full")["recompute_num_layers"] == 1
