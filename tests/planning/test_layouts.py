"""Layouts: none is forgotten, each refusal has its reason, and what fits is ranked."""

from __future__ import annotations

from dataclasses import replace

import pytest

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.models.catalog import CATALOG
from prism_nemo.planning.activations import Kernels, stage_layers
from prism_nemo.planning.flops import forward_flops, layer_flops
from prism_nemo.planning.hardware import GPUS, Assumptions, assumptions, find_gpu
from prism_nemo.planning.layouts import divisions, enumerate_layouts, evaluate, proposals, refusal
from prism_nemo.planning.memory import Workload, state_bytes
from prism_nemo.planning.step_time import estimate_time

MODEL = CATALOG["granite-4.0-h-micro"].architecture
WORK = Workload(8192, 1, 128)
IDEAL = Assumptions(**{name: 1.0 for name in Assumptions().to_dict() if name.endswith("efficiency")})  # type: ignore[arg-type]


def key(layout: ParallelConfig) -> tuple[int, int, int, bool]:
    return (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.data_parallel_size,
        layout.sequence_parallel,
    )


@pytest.mark.parametrize("gpus", [1, 6, 16])
def test_enumeration_is_complete(gpus: int) -> None:
    wanted = {
        (tp, pp, dp, sp)
        for tp in range(1, gpus + 1)
        for pp in range(1, gpus + 1)
        for dp in range(1, gpus + 1)
        for sp in (False, True)
        if tp * pp * dp == gpus and (tp > 1 or not sp)
    }
    found = [key(layout) for layout in divisions(gpus)]
    assert len(found) == len(set(found))
    assert set(found) == wanted


def test_candidates_are_every_layout_in_every_mode_once() -> None:
    found = enumerate_layouts(MODEL, 16, WORK, GPUS["h100"], Assumptions(), Kernels.on_gpu(MODEL))
    assert len(found) == 3 * len(list(proposals(MODEL, 16, WORK)))
    assert len({(c.layout.describe(), c.recompute) for c in found}) == len(found)
    plain = [c for c in found if "CP" not in c.layout.describe() and "VPP" not in c.layout.describe()]
    assert {key(c.layout) for c in plain} == {key(layout) for layout in divisions(16)}
    fits = [c.refusal is None for c in found]
    assert fits == sorted(fits, reverse=True)
    speeds = [c.time.step for c in found if c.refusal is None and c.time]
    assert len(speeds) > 10
    assert speeds == pytest.approx(sorted(speeds), abs=1e-6)
    for c in found:
        # What cannot be has a reason and no figures; what is too large has both.
        assert (c.memory is None) == (refusal(MODEL, c.layout, WORK) is not None)
        if c.memory is not None:
            assert (c.refusal is None) == (c.memory.total <= 80e9)


def test_long_rows_are_shared_and_stages_are_divided() -> None:
    """Context parallelism where a rank keeps 4,096 tokens, virtual pipelines of parts that divide the layers."""
    a = CATALOG["llama-3.1-8b"].architecture
    for length, most in ((4096, 1), (8192, 2), (32768, 8)):
        found = list(proposals(a, 16, Workload(length, 1, 128)))
        assert {layout.context_parallel_size for layout in found} == {n for n in (1, 2, 4, 8) if n <= most}
        assert all(layout.world_size == 16 for layout in found)
    parts = {(x.pipeline_model_parallel_size, x.virtual_pipeline_model_parallel_size) for x in found}
    assert {v for pp, v in parts if pp == 4} == {1, 2, 4, 8}
    assert {v for pp, v in parts if pp == 16} == {1, 2}
    assert {v for pp, v in parts if pp == 1} == {1}


@pytest.mark.parametrize(
    ("layout", "work", "message"),
    [
        (ParallelConfig(1, 1, context_parallel_size=3), WORK, "context_parallel_size 3 at tensor_model_parallel"),
        (ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=3), WORK, "size 3 does not divide the 40 layers"),
        (
            ParallelConfig(1, 2, virtual_pipeline_model_parallel_size=2),
            Workload(8192, 1, 3),
            "deals micro-batches in rounds of pipeline_model_parallel_size 2, but a step has 3",
        ),
        (ParallelConfig(3), WORK, "tensor_model_parallel_size 3 does not divide"),
        (ParallelConfig(1, 3), WORK, "pipeline_model_parallel_size 3 does not divide 80 layers"),
        (
            ParallelConfig(1, 1, 3),
            WORK,
            "global_batch_size 128 is not a multiple of micro_batch_size 1 x data_parallel",
        ),
        (ParallelConfig(8, 1, 1, True), Workload(8190, 1, 128), "seq_length 8190 is not a multiple"),
    ],
)
def test_what_cannot_be_says_why(layout: ParallelConfig, work: Workload, message: str) -> None:
    found = evaluate(MODEL, layout, work, GPUS["h100"], Assumptions(), Kernels.on_gpu(MODEL))
    assert found.memory is None
    assert found.time is None
    assert found.refusal is not None
    assert message in found.refusal


def test_what_is_too_large_shows_the_sum() -> None:
    a = CATALOG["mistral-small-24b"].architecture
    found = evaluate(a, ParallelConfig(), WORK, GPUS["h100"], Assumptions(), Kernels.on_gpu(a))
    assert found.refusal is not None
    words = found.refusal.split(" = ")
    terms = [float(part.split()[-1]) for part in words[0].split(" + ")]
    total = float(words[1].split()[0])
    assert sum(terms) == pytest.approx(total, abs=0.05 * len(terms) + 0.05)
    assert "optimizer 282.9" in words[0]  # 23,572,403,200 x 12 bytes
    assert f"{total - 80:.1f} GB more than h100 has (80 GB)" in found.refusal


def test_time_of_one_gpu_is_its_flops_and_bytes() -> None:
    """With every efficiency 1, one GPU and no documents: worked out by hand."""
    a, gpu = CATALOG["llama-3.1-8b"].architecture, GPUS["h200"]
    found = estimate_time(a, ParallelConfig(), WORK, gpu, IDEAL, Kernels.on_gpu(a))
    forward = forward_flops(a, [8192])
    assert found.gemm == pytest.approx(128 * 3 * (forward.projections + forward.logits) / gpu.bf16_flops)
    assert found.attention == pytest.approx(128 * 3.5 * forward.attention / gpu.bf16_flops)
    assert found.scan == found.tensor_parallel == found.bubble == found.pipeline == found.data_parallel == 0
    parameters = CATALOG["llama-3.1-8b"].parameters
    assert found.update == pytest.approx((2 * 12 + 4) * parameters / gpu.memory_bandwidth, rel=1e-3)
    full = estimate_time(a, ParallelConfig(), replace(WORK, recompute="full"), gpu, IDEAL, Kernels.on_gpu(a))
    again = 128 * forward.projections / gpu.bf16_flops
    assert full.gemm - found.gemm == pytest.approx(again)


def test_pipelines_wait_and_ranks_talk() -> None:
    a, gpu, kernels = CATALOG["nemotron-h-8b"].architecture, GPUS["h100"], Kernels.on_gpu(MODEL)
    layout = ParallelConfig(4, 2, 8, True)
    found = estimate_time(a, layout, WORK, gpu, IDEAL, kernels)
    # 16 micro-batches and two stages of which one is slower: the other one's time is waited for, once.
    busy = found.gemm + found.attention + found.scan + found.elementwise + found.tensor_parallel
    assert 0.7 * busy / 16 < found.bubble < busy / 16
    # Two all-reduces (forward, backward) of the hidden states per Megatron layer, 2 x 3/4 of them, one direction.
    moved = 16 * len(stage_layers(a, 2, 0)) * 2 * 2 * 3 / 4 * 8192 * a.hidden_size * 2
    assert found.tensor_parallel == pytest.approx(moved / (gpu.nvlink_bandwidth / 2))
    state = state_bytes(a, layout, 1, True, 2)
    moved = 7 / 8 * (state.gradients + state.parameters)
    assert found.data_parallel == pytest.approx(moved / gpu.network_bandwidth, rel=1e-6)
    near = estimate_time(a, layout, WORK, gpu, replace(IDEAL, gpus_per_node=64), kernels)
    assert near.data_parallel == pytest.approx(moved / (gpu.nvlink_bandwidth / 2), rel=1e-6)
    assert layer_flops(a, "M", [8192]).scan * 3 * 12 * 16 / 4 / gpu.bf16_flops == pytest.approx(found.scan, rel=0.1)


def test_a_virtual_pipeline_waits_less_and_sends_more() -> None:
    """(p - 1) / (m v) of the work, arXiv 2104.04473, section 2.2; 4 equal stages but for the logits of the last."""
    a, gpu = CATALOG["llama-3.1-8b"].architecture, GPUS["h100"]
    kernels, work = Kernels.on_gpu(a), Workload(8192, 1, 16)
    plain, virtual = (
        estimate_time(a, ParallelConfig(1, 4, virtual_pipeline_model_parallel_size=v), work, gpu, IDEAL, kernels)
        for v in (1, 4)
    )
    assert virtual.bubble == pytest.approx(plain.bubble / 4)
    hop = 8192 * 4096 * 2 / (gpu.nvlink_bandwidth / 2)
    assert plain.pipeline == pytest.approx(2 * hop * (16 + 3))
    assert virtual.pipeline == pytest.approx(2 * hop * (4 * 16 + 3))
    for name in ("gemm", "attention", "elementwise", "update"):
        assert getattr(virtual, name) == pytest.approx(getattr(plain, name), rel=1e-6)


def test_context_parallel_ranks_share_the_work_and_exchange_tokens_for_heads() -> None:
    a, gpu = CATALOG["llama-3.1-8b"].architecture, GPUS["h100"]
    kernels, work = Kernels.on_gpu(a), Workload(32768, 1, 4)
    one = estimate_time(a, ParallelConfig(), work, gpu, IDEAL, kernels)
    two = estimate_time(a, ParallelConfig(context_parallel_size=2), work, gpu, IDEAL, kernels)
    for name in ("gemm", "attention"):
        assert getattr(two, name) == pytest.approx(getattr(one, name) / 2)
    # 32 query heads, 2 x 8 keys and values in front, 32 heads behind, forward and backward; a half stays where it is.
    moved = 4 * 32 * 2 / 2 * 16384 * (32 + 16 + 32) * 128 * 2
    assert one.context_parallel == 0
    assert two.context_parallel == pytest.approx(moved / (gpu.nvlink_bandwidth / 2))
    # The optimizer's state is cut over both: gradients are reduced and parameters gathered.
    state = state_bytes(a, ParallelConfig(context_parallel_size=2), 0, True, 2)
    assert two.data_parallel == pytest.approx((state.gradients + state.parameters) / 2 / (gpu.nvlink_bandwidth / 2))
    # With 16 ranks 8 keys and values are copied: a head of each for every rank.
    many = estimate_time(
        a, ParallelConfig(context_parallel_size=16), work, gpu, replace(IDEAL, gpus_per_node=16), kernels
    )
    moved = 4 * 32 * 2 * 15 / 16 * 2048 * (32 + 2 * 16 + 32) * 128 * 2
    assert many.context_parallel == pytest.approx(moved / (gpu.nvlink_bandwidth / 2))


def test_fp8_takes_half_of_the_time_of_linear_layers() -> None:
    """At efficiencies of 1: not of the logits, and not of the layers that stay in bf16."""
    a, gpu = CATALOG["llama-3.1-8b"].architecture, GPUS["h100"]
    forward, ratio = forward_flops(a, [8192]), GPUS["h100"].fp8_flops / GPUS["h100"].bf16_flops  # type: ignore[operator]
    kernels = Kernels.on_gpu(a, "tensorwise")
    for outside in (0, 1):
        work = replace(WORK, bf16_at_start=outside, bf16_at_end=outside)
        found = estimate_time(a, ParallelConfig(), work, gpu, IDEAL, kernels)
        in_fp8 = forward.projections * (32 - 2 * outside) / 32
        expected = in_fp8 / ratio + forward.projections - in_fp8 + forward.logits
        assert found.gemm == pytest.approx(128 * 3 * expected / gpu.bf16_flops)
    # Rounding an operand reads 2 bytes and writes 2: in bf16 elementwise work is what is kept, here less but that.
    bf16 = estimate_time(a, ParallelConfig(), WORK, gpu, IDEAL, Kernels.on_gpu(a))
    fp8 = estimate_time(a, ParallelConfig(), WORK, gpu, IDEAL, kernels)
    operands = 4096 + 4096 + (4096 + 2048 + 4096) + 4096 + 14336 + (2 * 14336 + 4096)
    kept_less = 2 * 4096 + 14336 - 4096
    change = 128 * 32 * 8192 * (4 * operands - 4 * kept_less) / gpu.memory_bandwidth
    assert fp8.elementwise - bf16.elementwise == pytest.approx(change)


def test_sizes_that_fp8_cannot_have_are_refused() -> None:
    a = replace(CATALOG["llama-3.1-8b"].architecture, ffn_hidden_size=14344)  # 8 x 11 x 163
    found = evaluate(a, ParallelConfig(), WORK, GPUS["h200"], Assumptions(), Kernels.on_gpu(a, "tensorwise"))
    assert "MLP size per tensor-parallel rank, 14344, is not a multiple of 16" in str(found.refusal)
    assert evaluate(a, ParallelConfig(), WORK, GPUS["h200"], Assumptions(), Kernels.on_gpu(a)).time is not None


def test_gpus_and_assumptions() -> None:
    for gpu in GPUS.values():
        assert gpu.sources
        assert gpu.fp8_flops is None or gpu.fp8_flops == pytest.approx(2 * gpu.bf16_flops, rel=1e-3)
    assert find_gpu("H100") is GPUS["h100"]
    with pytest.raises(InputError, match="--gpu 'h300' is unknown; did you mean h"):
        find_gpu("h300")
    assert assumptions(["gemm_efficiency=0.5"]).gemm_efficiency == 0.5
    with pytest.raises(InputError, match="did you mean 'gemm_efficiency'"):
        assumptions(["gem_efficiency=0.5"])
    with pytest.raises(InputError, match="expected a share"):
        assumptions(["gemm_efficiency=1.5"])
