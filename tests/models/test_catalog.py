"""The catalog against the counts that were stated, against transformers, and against our own weight tables."""

from __future__ import annotations

import math
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from catalog_workers import full_size_differences
from transformers import AutoConfig
from transformers.models.auto import AutoModelForCausalLM

from prism_nemo.errors import InputError
from prism_nemo.models.catalog import (
    _FIELDS,
    CATALOG,
    SURENESS,
    Model,
    _flatten,
    compare_with_catalog,
    find,
)
from prism_nemo.models.family import Architecture, architecture_from_hf, parameter_count, table_of
from prism_nemo.models.weights import Replicated, RowParallel, WeightMapping, expand
from prism_nemo.runtime.launch import launch

STUDY = {
    "ibm-granite/granite-4.0-micro-base", "ibm-granite/granite-3.3-8b-base", "ibm-granite/granite-4.0-h-micro-base",
    "meta-llama/Llama-3.1-8B", "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-Small-24B-Base-2501",
    "nvidia/Nemotron-H-8B-Base-8K",
}  # fmt: skip
every_model = pytest.mark.parametrize("model", CATALOG.values(), ids=CATALOG.keys())
every_layout = pytest.mark.parametrize(
    ("model", "tp"), [(m, tp) for m in CATALOG.values() for tp in m.architecture.tensor_parallel_sizes()],
    ids=lambda value: value.name if isinstance(value, Model) else f"tp{value}",
)  # fmt: skip


@cache
def published_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what transformers builds from the configuration, as a published file names them."""
    model = CATALOG[name]
    config = AutoConfig.for_model(**{k: deepcopy(v) for k, v in model.config.items() if k != "architectures"})
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in built.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    # Nemotron-H was published before transformers had it, with other names than transformers gives it now.
    prefix = "backbone" if model.architecture.family == "nemotron_h" else "model"
    return {f"{prefix}.{k.removeprefix('model.')}" if k.startswith("model.") else k: s for k, s in shapes.items()}


def hf_tensors(a: Architecture, tp: int = 1) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that the weight table names, as often as it names them."""
    return [
        (name, shape)
        for mapping, layer in expand(table_of(a, tp))
        for name, shape in zip(mapping.at(layer)[1], mapping.hf_shapes(), strict=True)
    ]


def test_the_seven_models_of_the_study_are_there() -> None:
    assert {model.hub_id for model in CATALOG.values()} == STUDY
    assert all(name == model.name for name, model in CATALOG.items())


@every_model
def test_parameters_are_those_that_were_stated(model: Model) -> None:
    assert model.parameters_as_stated == model.stated_parameters
    if not model.stated_with:
        assert model.parameters == model.stated_parameters


@every_model
def test_transformers_builds_the_same_tensors(model: Model) -> None:
    theirs = published_tensors(model.name)
    ours = hf_tensors(model.architecture)
    assert Counter(name for name, _ in ours) == Counter(theirs.keys())  # each exactly once
    assert dict(ours) == theirs
    assert model.parameters == parameter_count(model.architecture) == sum(map(math.prod, theirs.values()))


@every_layout
def test_every_element_has_its_owners_at_every_layout(model: Model, tp: int) -> None:
    """Rows and columns of every rank's runs, counted on every tensor: a cut parameter's elements belong to one rank,
    a replicated one's to all of them, and no rank holds an element twice."""
    owned: dict[str, list[tuple[range, range, int, bool]]] = {}
    for mapping, layer in expand(table_of(model.architecture, tp)):
        names = mapping.at(layer)[1]
        for rank in range(tp):
            first, last = mapping.columns(rank, tp)
            for run in mapping.runs(rank, tp):
                if run.source is not None:
                    place = (range(run.start, run.start + run.rows), range(first, last or 1), rank, replicated(mapping))
                    owned.setdefault(names[run.source], []).append(place)
            assert math.prod(mapping.local_shape(rank, tp)) > 0
    shapes = published_tensors(model.name)
    assert owned.keys() == shapes.keys()
    seen: set[tuple[Any, ...]] = set()  # layers are alike; each kind of cut is counted once
    for name, places in owned.items():
        key = (shapes[name], *((r.start, r.stop, c.start, c.stop, rank, whole) for r, c, rank, whole in places))
        if key not in seen:
            seen.add(key)
            check_owners(name, shapes[name], places, tp)


def replicated(mapping: WeightMapping) -> bool:
    return isinstance(mapping, Replicated) and not isinstance(mapping, RowParallel)


def check_owners(name: str, shape: tuple[int, ...], places: list[tuple[range, range, int, bool]], tp: int) -> None:
    columns = shape[1] if len(shape) > 1 else 1
    # Every place covers whole columns at its borders, so one column between two borders stands for all of them.
    borders = sorted({0, *(c.start for _, c, _, _ in places)})
    for column in borders:
        counts = torch.zeros(tp, shape[0], dtype=torch.int8)
        whole = torch.zeros(shape[0], dtype=torch.bool)
        for rows, cut, rank, is_whole in places:
            assert cut.stop <= columns, name
            assert rows.stop <= shape[0], name
            if column in cut:
                counts[rank, rows.start : rows.stop] += 1
                whole[rows.start : rows.stop] |= is_whole
        assert counts.max() == 1, f"{name}: an element twice on one rank"
        expected = torch.where(whole, tp, 1)
        assert torch.equal(counts.sum(0), expected), f"{name}: an element with a wrong number of owners"
    assert {c.stop for _, c, _, _ in places} == {*borders[1:], columns}, f"{name}: a gap between columns"


def share(length: int, rank: int, tp: int, start: int = 0) -> set[int]:
    return set(range(start + rank * length // tp, start + (rank + 1) * length // tp))


def belongs_together(a: Architecture, rank: int, tp: int) -> dict[str, set[int]]:
    """By ending of a tensor's name: rows (of output projections: columns) that a rank needs for its heads."""
    d, ffn = a.kv_channels, a.ffn_hidden_size
    heads, groups = (share(n * d, rank, tp) for n in (a.num_attention_heads, a.num_query_groups))
    width = share(ffn, rank, tp)
    expected = {
        "q_proj.weight": heads, "k_proj.weight": groups, "v_proj.weight": groups, "o_proj.weight": heads,
        "gate_proj.weight": width, "up_proj.weight": width, "down_proj.weight": width,
        "input_linear.weight": width | share(ffn, rank, tp, ffn), "output_linear.weight": width,
    }  # fmt: skip
    if (m := a.mamba) is not None:
        mine = share(m.heads, rank, tp)
        channels = share(m.inner_size, rank, tp)
        used = range(m.groups) if m.groups % tp else {head * m.groups // m.heads for head in mine}
        bc = {g * m.state_size + i for g in used for i in range(m.state_size)}
        size = m.groups * m.state_size
        bc |= {size + i for i in bc}
        conv = channels | {m.inner_size + i for i in bc}
        rest = 2 * m.inner_size
        expected |= {
            "in_proj.weight": channels | {m.inner_size + i for i in conv} | {rest + 2 * size + i for i in mine},
            "conv1d.weight": conv, "conv1d.bias": conv, "dt_bias": mine, "A_log": mine, ".D": mine,
            "mamba.norm.weight": channels, "mixer.norm.weight": channels, "out_proj.weight": channels,
        }  # fmt: skip
    return expected


@every_layout
def test_a_rank_owns_what_belongs_together(model: Model, tp: int) -> None:
    """A valid partition may still give a rank the keys of another rank's queries."""
    a = model.architecture
    for rank in range(tp):
        owned: dict[str, set[int]] = {}
        for mapping in table_of(a, tp):
            for run in mapping.runs(rank, tp):
                if run.source is not None:
                    rows = set(range(run.start, run.start + run.rows))
                    cut = set(range(*mapping.columns(rank, tp))) if isinstance(mapping, RowParallel) else rows
                    owned.setdefault(mapping.hf[run.source], set()).update(cut)
        compared = set()
        for ending, expected in belongs_together(a, rank, tp).items():
            for name in (name for name in owned if name.endswith(ending)):
                assert owned[name] == expected, f"{name} on rank {rank}"
                compared.add(name)
        left = {name for name in owned.keys() - compared if "norm" not in name}
        assert all("embed" in name or "lm_head" in name for name in left), left


@every_model
def test_pipeline_sizes_are_those_that_pass_the_check(model: Model) -> None:
    a = model.architecture
    assert model.pipeline_parallel_sizes == [n for n in range(1, a.num_layers + 1) if a.num_layers % n == 0]
    for tp in (1, 2, 4, 8):
        a.check_layout(tp, 2)


def test_layers_are_said_in_words() -> None:
    layers = {name: model.layers for name, model in CATALOG.items()}
    assert layers["granite-4.0-h-micro"] == "36 Mamba + 4 attention"
    assert layers["nemotron-h-8b"] == "24 Mamba + 4 attention + 24 MLP"
    assert layers["granite-4.0-micro"] == "40 attention"


@every_model
def test_unsure_values_are_marked_and_say_why(model: Model) -> None:
    for key, why in model.unsure.items():
        assert why.sureness in SURENESS.keys() - {"A"}, key
        assert why.source


OTHER: dict[str, Any] = {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "time_step_limit": [0.001, 0.5], "torch_dtype": "float32",
    "normalization_function": "layernorm", "time_step_rank": 7,
}  # fmt: skip


def other(key: str, value: Any) -> Any:
    if key in OTHER:
        return OTHER[key]
    return not value if isinstance(value, bool) else (value or 0) + 1


@every_model
def test_each_unsure_value_decides_the_field_that_is_said(model: Model) -> None:
    """Change the value: exactly that field changes; where none is named, none does, or the family refuses."""
    before = dict(_flatten(model.architecture))
    for key in model.unsure:
        try:
            changed_config = {**model.config, key: other(key, model.config.get(key))}
            after = dict(_flatten(architecture_from_hf(changed_config, "changed")))
        except InputError:
            assert key not in _FIELDS, key
            continue
        changed = {name for name in before | after if before.get(name) != after.get(name)}
        expected = {_FIELDS[key]} & before.keys() if key in _FIELDS else set()
        assert changed == expected, key


@pytest.mark.parametrize("name", ["mistral-small-24b", "mistralai/Mistral-Small-24B-Base-2501", "MISTRAL-small-24B"])
def test_found_by_short_name_and_hub_id(name: str) -> None:
    assert find(name) is CATALOG["mistral-small-24b"]


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("llama-8b", "llama-3.1-8b"), ("granite-4.0-h", "granite-4.0-h-micro"), ("nvidia/Nemotron-H-8B", "nemotron-h-8b")],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"unknown model '{name}'; did you mean {nearest}\\?"):
        find(name)


def test_a_checkpoint_is_compared_with_the_catalog() -> None:
    model = CATALOG["granite-3.3-8b"]
    config = {**model.config, "vocab_size": 49155, "rms_norm_eps": 1e-6, "logits_scaling": 8.0}
    found = compare_with_catalog(architecture_from_hf(config, "here"))
    assert found is not None
    assert found.model is model
    assert found.contradictions == ("logits_scaling: 8.0; the catalog is sure of 16.0",)
    assert found.taken[:2] == (
        "vocab_size: 49155 taken from the checkpoint; the catalog has 49152 (C)",
        "rms_norm_eps: 1e-06 taken from the checkpoint; the catalog has 1e-05 (B)",
    )
    assert "rope_theta: 10000000.0 taken from the checkpoint; as in the catalog (B)" in found.taken


@every_model
def test_a_model_does_not_contradict_its_own_entry(model: Model) -> None:
    found = compare_with_catalog(model.architecture)
    assert found is not None
    assert found.model is model
    assert not found.contradictions
    assert len(found.taken) == len(model.unsure_fields)


def test_an_architecture_of_no_entry_is_not_compared() -> None:
    assert compare_with_catalog(replace(CATALOG["llama-3.1-8b"].architecture, num_layers=16)) is None


def test_a_wrong_mixer_contradicts() -> None:
    model = CATALOG["nemotron-h-8b"]
    found = compare_with_catalog(architecture_from_hf({**model.config, "ssm_state_size": 256}, "here"), model)
    assert found is not None
    assert found.contradictions == ("mamba.state_size: 256; the catalog is sure of 128",)


def test_megatron_builds_every_model_at_full_size() -> None:
    """Without memory: each parameter has the shape that the weight table says, and there is no other."""
    assert launch(full_size_differences) == {name: [] for name in CATALOG}
