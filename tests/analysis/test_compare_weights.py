"""Weight comparison on checkpoints small enough to count by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from prism_nemo.analysis import weights
from prism_nemo.analysis.tensor_names import component_of, layer_of
from prism_nemo.analysis.weights import WeightComparison, compare_weights
from prism_nemo.errors import InputError

Q, UP, EMBED, NORM, HEAD = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def save(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: files[i % shards] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def compare(tmp_path: Path, before: dict[str, Tensor], after: dict[str, Tensor]) -> WeightComparison:
    return compare_weights(save(tmp_path / "before", before), save(tmp_path / "after", after))


def model(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = {Q: (8, 4), UP: (6, 4), EMBED: (10, 4), NORM: (4,)}
    return {name: torch.randn(*size, generator=g) + 0.1 for name, size in sizes.items()}


def test_thresholds_by_hand(tmp_path: Path) -> None:
    before = torch.tensor([100.0, 100.0, 100.0, 100.0, -100.0, -100.0, 100.0, 0.0, 0.0, 0.0])
    after = torch.tensor([100.0, 100.2, 101.0, 101.5, -97.0, -80.0, -100.0, 0.0, -0.0, 1e-30])
    # relative change in percent: 0, 0.2, exactly 1, 1.5, 3, 20, 200, then zero kept, zero kept, zero left
    result = compare(tmp_path, {Q: before}, {Q: after})
    assert result.total.thresholds == {"0.1": 0.7, "0.5": 0.6, "1": 0.5, "2": 0.4, "5": 0.3, "10": 0.3}
    assert result.total.changed_fraction_1pct == 0.5  # exactly 1 % is not above 1 %
    assert result.total.equal_fraction == 0.3  # -0.0 equals 0.0
    # bf16 near 100 has a spacing of 0.5: 100.2 rounds to 100, 101.0 does not
    assert result.total.bf16_equal_fraction == 0.4
    change = math.sqrt(0.2**2 + 1 + 1.5**2 + 3**2 + 20**2 + 200**2)
    assert result.total.relative_l2 == pytest.approx(change / math.sqrt(7 * 100**2), rel=1e-6)


def test_bf16_storage(tmp_path: Path) -> None:
    before = torch.tensor([1.0, 1.0, 1.0, 0.0]).bfloat16()
    after = torch.tensor([1.0, 1.0078125, 0.99609375, 1e-38]).bfloat16()  # one spacing up 0.78 %, down 0.39 %
    result = compare(tmp_path, {Q: before}, {Q: after}).total
    assert result.thresholds == {"0.1": 0.75, "0.5": 0.5, "1": 0.25, "2": 0.25, "5": 0.25, "10": 0.25}
    assert result.equal_fraction == result.bf16_equal_fraction == 0.25
    assert result.relative_l2 == pytest.approx(math.sqrt((0.0078125**2 + 0.00390625**2) / 3), rel=1e-12)


def test_sums_are_float64(tmp_path: Path) -> None:
    # In float32 the squares vanish (1e-60) or overflow (1e60).
    for scale in (1e-30, 1e30):
        result = compare(tmp_path / f"{scale}", {Q: torch.full((4,), scale)}, {Q: torch.full((4,), 1.5 * scale)})
        assert result.total.relative_l2 == pytest.approx(0.5, rel=1e-6)
    # A float32 sum of a million squares of 1e-4 beside 1 loses all of them one by one.
    before, after = torch.ones(1_000_001), torch.ones(1_000_001)
    after[1:] += 1e-3
    after[0] = 2
    change = math.sqrt(1 + 1e6 * float(after[1].double() - 1) ** 2)
    result = compare(tmp_path / "many", {Q: before}, {Q: after})
    assert result.total.relative_l2 == pytest.approx(change / math.sqrt(1_000_001), rel=1e-12)
    assert result.total.thresholds["0.1"] == pytest.approx(1)


def test_types_may_differ(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 1.001, 2.0])
    result = compare(tmp_path, {Q: values.bfloat16()}, {Q: values})
    assert result.total.equal_fraction == pytest.approx(2 / 3)
    assert result.total.bf16_equal_fraction == 1
    assert result.stored_dtypes == {"before": ["BF16"], "after": ["F32"]}


def test_parts(tmp_path: Path) -> None:
    before = {
        Q: torch.ones(4),
        "model.layers.0.mlp.gate_proj.weight": torch.ones(2, 3),
        UP: torch.full((2,), 3.0),
        "model.layers.10.mlp.up_proj.weight": torch.ones(1),
        "model.layers.2.self_attn.q_proj.weight": torch.ones(1),
        EMBED: torch.zeros(2, 2),
        NORM: torch.ones(5),
    }
    after = {name: tensor.clone() for name, tensor in before.items()}
    after[Q] = torch.tensor([1.0, 1.0, 1.0, 3.0])
    after[UP] = torch.tensor([3.0, 7.0])
    after[EMBED][0, 0] = 2
    result = compare(tmp_path, before, after)
    assert list(result.by_layer) == ["0", "1", "2", "10"]
    assert list(result.by_component) == ["attention", "embedding", "mlp", "norm"]
    assert result.by_component["attention"].parameters == 5
    assert result.by_component["attention"].changed_fraction_1pct == pytest.approx(1 / 5)
    assert result.by_component["attention"].relative_l2 == pytest.approx(2 / math.sqrt(5))
    assert result.by_component["mlp"].changed_fraction_1pct == pytest.approx(1 / 9)
    assert result.by_component["mlp"].relative_l2 == pytest.approx(4 / math.sqrt(6 + 18 + 1))
    assert result.by_component["embedding"].relative_l2 is None  # from zeros: undefined, not Inf
    assert result.by_component["norm"].relative_l2 == 0
    assert result.by_subcomponent["mlp.gate"].equal_fraction == 1
    assert result.by_subcomponent["mlp.up"].changed_fraction_1pct == pytest.approx(1 / 3)
    assert result.by_layer["0"].parameters == 10
    assert result.by_layer["0"].relative_l2 == pytest.approx(2 / math.sqrt(10))
    assert result.tensors[UP].thresholds["10"] == 0.5
    assert result.total.parameters == 23 == sum(change.parameters for change in result.tensors.values())
    assert result.total.changed_fraction_1pct == pytest.approx(3 / 23)
    assert result.total.relative_l2 == pytest.approx(math.sqrt((4 + 16 + 4) / (4 + 6 + 18 + 1 + 1 + 5)))


def test_all_zero_tensor_that_stays(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    both = {Q: torch.ones(2), bias: torch.zeros(3)}
    result = compare(tmp_path, both, both)
    assert result.tensors[bias].relative_l2 == 0
    assert result.tensors[bias].changed_fraction_1pct == 0
    assert result.by_subcomponent["attention.q"].parameters == 5


def test_dictionary_is_json_with_the_agreed_keys(tmp_path: Path) -> None:
    result = compare(tmp_path, model(0), model(1)).to_dict()
    assert {
        "changed_fraction_1pct",
        "relative_l2",
        "by_component",
        "by_layer",
        "thresholds",
        "equal_fraction",
        "bf16_equal_fraction",
        "tensors",
    } <= result.keys()
    assert set(result["tensors"]) == {Q, UP, EMBED, NORM}
    assert result["changed_fraction_1pct"] == result["thresholds"]["1"] > 0.9
    assert result["by_component"]["attention"] == result["tensors"][Q]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 1000), st.sampled_from([1e-4, 1e-2, 1.0]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_blocks_and_shards_do_not_matter(tmp_path: Path, seed: int, scale: float, dtype: torch.dtype) -> None:
    before = {name: tensor.to(dtype) for name, tensor in model(seed).items()}
    after = {name: (tensor + scale * torch.randn_like(tensor)).to(dtype) for name, tensor in before.items()}
    where = tmp_path / f"{seed}-{scale}-{dtype}"
    whole = compare_weights(save(where / "a", before), save(where / "b", after)).to_dict()
    previous = weights._BLOCK, weights._STRETCH
    weights._BLOCK, weights._STRETCH = 9, 14  # blocks of two rows, the last one of one; tasks of three rows
    try:
        parts = compare_weights(save(where / "c", before, shards=3), save(where / "d", after, shards=2)).to_dict()
    finally:
        weights._BLOCK, weights._STRETCH = previous
    a, b = (torch.cat([t.double().reshape(-1) for t in tensors.values()]) for tensors in (before, after))
    for result in (whole, parts):
        for key, share in result["thresholds"].items():
            assert share == float((((b - a).abs() > float(key) / 100 * a.abs()).double()).mean())
        assert result["equal_fraction"] == float((a == b).double().mean())
        assert result["bf16_equal_fraction"] == float((a.bfloat16() == b.bfloat16()).double().mean())
        assert result["relative_l2"] == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
        assert result["parameters"] == a.numel()


def test_tied_embedding_counts_once(tmp_path: Path) -> None:
    before, after = model(0), model(1)
    plain = compare(tmp_path / "absent", before, after)
    with_copy = [{**tensors, HEAD: tensors[EMBED]} for tensors in (before, after)]
    both = compare(tmp_path / "both", *with_copy)
    one = compare(tmp_path / "one", before, with_copy[1])
    assert plain.skipped == ()
    assert both.skipped == one.skipped == (HEAD,)
    assert plain.total == both.total == one.total
    assert plain.total.parameters == 32 + 24 + 40 + 4
    assert HEAD not in both.tensors


def test_untied_head_counts(tmp_path: Path) -> None:
    before, after = model(0), model(1)
    before[HEAD] = before[EMBED]  # equal at first, as after untying a model
    after[HEAD] = after[EMBED] + 1
    result = compare(tmp_path, before, after)
    assert result.total.parameters == 32 + 24 + 40 + 4 + 40
    assert result.by_subcomponent["head"].parameters == 40
    assert result.by_component["embedding"].parameters == 80
    reverse = compare(tmp_path / "reverse", after, before)
    assert reverse.by_subcomponent["head"].parameters == 40
    del before[HEAD]
    with pytest.raises(InputError, match=r"before: tensor lm_head.weight is missing.*ties its embeddings"):
        compare(tmp_path, before, after)


def test_buffers_and_empty_tensors_are_skipped(tmp_path: Path) -> None:
    inverse = "model.layers.0.self_attn.rotary_emb.inv_freq"
    before = {**model(0), inverse: torch.ones(2), "model.extra": torch.ones(0, 3)}
    after = {**model(1), "model.extra": torch.ones(0, 3)}
    result = compare(tmp_path, before, after)
    assert result.skipped == ("model.extra", inverse)
    assert result.total == compare(tmp_path / "without", model(0), model(1)).total


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["before", "after", "both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_is_refused(tmp_path: Path, value: float, side: str, dtype: torch.dtype) -> None:
    models = {name: {key: tensor.to(dtype) for key, tensor in model(0).items()} for name in ("before", "after")}
    for name, tensors in models.items():
        if side in (name, "both"):
            tensors[UP][1, 2] = value
    blamed = "after" if side == "after" else "before"
    with pytest.raises(InputError, match=rf"{blamed}: tensor {UP} holds NaN"):
        compare(tmp_path, models["before"], models["after"])


def test_single_file_comes_before_shards(tmp_path: Path) -> None:
    a, b = save(tmp_path / "a", model(0)), save(tmp_path / "b", model(1))
    save(a, model(1), shards=2)
    assert compare_weights(a, b).total.changed_fraction_1pct > 0.9


def test_refused_checkpoints(tmp_path: Path) -> None:
    good = model(0)
    without = {name: tensor for name, tensor in good.items() if name != NORM}
    with pytest.raises(InputError, match=rf"after: tensor {NORM} is missing"):
        compare(tmp_path / "1", good, without)
    with pytest.raises(InputError, match=rf"before: tensor {NORM} is missing"):
        compare(tmp_path / "2", without, good)
    with pytest.raises(InputError, match=rf"tensor {UP} has shape \[4, 6\], but \[6, 4\]"):
        compare(tmp_path / "3", good, {**good, UP: good[UP].T})
    with pytest.raises(InputError, match=rf"after: tensor {UP} is stored as I8"):
        compare(tmp_path / "4", good, {**good, UP: good[UP].to(torch.int8)})
    with pytest.raises(InputError, match="every weight is zero"):
        compare(tmp_path / "5", {Q: torch.zeros(3)}, {Q: torch.ones(3)})
    with pytest.raises(InputError, match="holds no tensors"):
        compare(tmp_path / "6", {}, good)


def test_refused_files(tmp_path: Path) -> None:
    good = save(tmp_path / "good", model(0))
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=rf"{folder.name}: no checkpoint here"):
            compare_weights(good, folder)
    broken = save(tmp_path / "broken", model(0)) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"broken.model.safetensors: not a readable"):
        compare_weights(good, broken.parent)

    sharded = save(tmp_path / "sharded", model(0), shards=2)
    index = sharded / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    for text in ("{", "{}", "[]", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index.json: key weight_map"):
            compare_weights(good, sharded)
    swapped = {**table["weight_map"], Q: table["weight_map"][UP]}
    index.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(InputError, match=rf"00002-of-00002.safetensors: no tensor {Q}"):
        compare_weights(good, sharded)
    index.write_text(json.dumps(table))
    (sharded / table["weight_map"][UP]).unlink()
    with pytest.raises(InputError, match=rf"00002-of-00002.safetensors: missing, .*{UP}"):
        compare_weights(good, sharded)


@pytest.mark.parametrize(
    ("name", "group", "component", "layer"),
    [
        ("model.layers.31.self_attn.k_proj.weight", "attention", "attention.k", "31"),
        ("model.layers.0.self_attn.v_proj.bias", "attention", "attention.v", "0"),
        ("model.layers.0.self_attn.o_proj.weight", "attention", "attention.o", "0"),
        ("model.layers.0.self_attn.q_norm.weight", "norm", "norm", "0"),
        ("model.layers.7.mlp.down_proj.weight", "mlp", "mlp.down", "7"),
        ("model.layers.7.post_attention_layernorm.weight", "norm", "norm", "7"),
        ("model.layers.7.shared_mlp.input_linear.weight", "mlp", "mlp.gate_up", "7"),  # Granite 4
        ("model.layers.7.shared_mlp.output_linear.weight", "mlp", "mlp.down", "7"),
        ("model.layers.7.mamba.A_log", "mamba", "mamba.a_dt", "7"),
        ("model.layers.7.mamba.norm.weight", "norm", "norm", "7"),
        ("backbone.embeddings.weight", "embedding", "embedding", None),  # Nemotron-H
        ("backbone.layers.3.mixer.in_proj.weight", "mamba", "mamba.in_proj", "3"),
        ("backbone.layers.3.mixer.conv1d.bias", "mamba", "mamba.conv1d", "3"),
        ("backbone.layers.3.mixer.dt_bias", "mamba", "mamba.a_dt", "3"),
        ("backbone.layers.3.mixer.D", "mamba", "mamba.d", "3"),
        ("backbone.layers.3.mixer.q_proj.weight", "attention", "attention.q", "3"),
        ("backbone.layers.3.mixer.up_proj.weight", "mlp", "mlp.up", "3"),
        ("backbone.norm_f.weight", "norm", "norm", None),
        ("model.decoder.layers.3.self_attn.out_proj.weight", "attention", "attention.o", "3"),
        ("lm_head.weight", "embedding", "head", None),
        ("model.something.weight", "other", "other", None),
    ],
)
def test_names(name: str, group: str, component: str, layer: str | None) -> None:
    assert component_of(name) == (group, component)
    assert layer_of(name) == layer
