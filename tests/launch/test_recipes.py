from __future__ import annotations

import itertools
import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.config import MidtrainConfig, ParallelConfig, RLConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.models.catalog import CATALOG, find
from prism_nemo.planning.hardware import GPUS
from recipes import evaluate, longcontext, midtrain, rl, show
from recipes.fit import check_fit, predict
from recipes.hardware import HARDWARE, layout_of
from recipes.layouts import ROWS, size_of
from recipes.provenance import DEFAULT, GIVEN, INFERRED, OURS, STUDY, Values, explain, fill

WITH_GPUS = [name for name, machine in HARDWARE.items() if machine.gpu is not None]
USUAL = [name for name in WITH_GPUS if name != "h100x144"]  # 144 is the long-context phase's alone: 128 % 36 != 0


def made(recipe: str, model: str, hardware: str, context: str = "8192") -> MidtrainConfig | RLConfig | EvaluateConfig:
    if recipe == "midtrain":
        return midtrain.midtrain("c", "d", "r", hardware, model, context)
    if recipe == "longcontext":
        return longcontext.longcontext("c", "d", "r", model, hardware)
    if recipe == "rl":
        return rl.rl("c", "t", "r", hardware, model, "prompts")
    return evaluate.evaluate("c", "o", "reasoning", hardware, model)


@pytest.mark.parametrize("hardware", WITH_GPUS)
@pytest.mark.parametrize("model", list(CATALOG))
def test_every_recipe_fits_every_model_and_machine(model: str, hardware: str) -> None:
    recipes = [("midtrain", c) for c in midtrain.CONTEXTS if int(c) <= find(model).context_length] + [("rl", "")]
    if hardware == "h100x144":
        recipes = []
    if find(model).context_length >= longcontext.LEAST:
        recipes.append(("longcontext", ""))
    for recipe, context in [*recipes, ("evaluate", "")]:
        check_fit(made(recipe, model, hardware, context), model, hardware)


@pytest.mark.parametrize("hardware", ["cpu", "cpu2"])
@pytest.mark.parametrize("recipe", ["midtrain", "rl", "evaluate", "longcontext"])
def test_recipes_resolve_without_gpus(recipe: str, hardware: str) -> None:
    config = made(recipe, "llama-3.1-8b", hardware)
    assert config.parallel == ParallelConfig(data_parallel_size=HARDWARE[hardware].processes)
    check_fit(config, "llama-3.1-8b", hardware)


def test_no_machine_has_more_layouts_than_the_table_says() -> None:
    """A row that was lost would otherwise only make one machine fewer to be asked about."""
    found = set()
    for use, hardware, model in itertools.product(("8k", "rl"), WITH_GPUS, CATALOG):
        try:
            layout_of(hardware, model, use)
        except InputError:
            found.add((use, hardware))
    assert found == {("8k", "h100x144"), ("rl", "h100x144")}
    assert {row.use for row in ROWS} == {"8k", "16k", "32k", "long", "rl", "eval"}


def test_a_layout_without_a_model_fits_all_models() -> None:
    for hardware in USUAL:
        config = midtrain.midtrain("c", "d", "r", hardware)
        for model in CATALOG:
            check_fit(config, model, hardware)


@pytest.mark.parametrize(
    ("model", "hardware", "change", "message"),
    [
        (
            "mistral-small-24b",
            "h100x8",
            {"tensor_model_parallel_size": 2, "data_parallel_size": 4},
            "GB more than h100",
        ),
        ("llama-3.1-8b", "h100x64", {"data_parallel_size": 8}, "needs 32 processes, but there are 64"),
        (
            "granite-3.3-8b",
            "h100x64",
            {"tensor_model_parallel_size": 64, "data_parallel_size": 1},
            "tensor_model_parallel_size",
        ),
    ],
)
def test_what_does_not_fit_is_refused(model: str, hardware: str, change: dict[str, Any], message: str) -> None:
    config = made("midtrain", model, hardware)
    assert isinstance(config, MidtrainConfig)
    with pytest.raises(InputError, match=message):
        check_fit(replace(config, parallel=replace(config.parallel, **change)), model, hardware)


def test_rl_counts_the_reference_model_and_the_caches() -> None:
    """8 ranks share the reference; the planner reserves 4 GB and a tenth of the activations by itself; 8 GB: caches."""
    config = made("rl", "mistral-small-24b", "h100x8")
    assert isinstance(config, RLConfig)
    with_all = predict(config, "mistral-small-24b", "h100x8").memory
    assert with_all is not None
    weights = 2 * find("mistral-small-24b").parameters / 8
    activations = 0.1 * (with_all.activations + with_all.logits + with_all.working)
    assert 4e9 + 8e9 + weights <= with_all.reserved <= 4e9 + 8e9 + weights + activations


def test_rl_prompts_are_shared_out_evenly() -> None:
    config = made("rl", "granite-4.0-micro", "h100x64")
    assert isinstance(config, RLConfig)
    uneven = replace(config, rollout=replace(config.rollout, prompts_per_step=60))
    with pytest.raises(InputError, match=r"prompts_per_step 60 is not a multiple of data_parallel_size 16"):
        check_fit(uneven, "granite-4.0-micro", "h100x64")


@pytest.mark.parametrize("context", list(midtrain.CONTEXTS))
def test_tokens_of_a_step_are_the_same_at_every_context(context: str) -> None:
    config = midtrain.midtrain("c", "d", "r", "h100x64", "granite-4.0-micro", context)
    assert config.global_batch_size * config.seq_length == 1_048_576
    assert config.seq_length == int(context)


def test_long_context_is_the_studys() -> None:
    """arXiv 2603.17074, Table 17, stated anew."""
    config = longcontext.longcontext("c", "d", "r", "granite-3.3-8b")
    assert (config.train_steps, config.global_batch_size, config.seq_length) == (1000, 36, 131_072)
    assert (config.optimizer.lr, config.schedule.lr_warmup_steps, config.schedule.min_lr_ratio) == (5e-5, 100, 0.0)
    assert longcontext.longcontext("c", "d", "r", "mistral-7b-v0.1").seq_length == 32_768
    with pytest.raises(InputError, match="nemotron-h-8b reads 8192 tokens: there is no long context to restore"):
        longcontext.longcontext("c", "d", "r", "nemotron-h-8b")


def test_rl_lengths_fit_every_model() -> None:
    for model in CATALOG:
        config = made("rl", model, "h100x64")
        assert isinstance(config, RLConfig)
        assert config.rollout.max_new_tokens + rl.PROMPT == min(16_384, find(model).context_length)
    assert rl.rl("c", "t", "r", prompts="p", mixture="mc").tasks == ["prompts:p/math.jsonl", "prompts:p/code.jsonl"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: midtrain.midtrain("c", "d", "r", "cpu", "granite-4.0-micro", "4096"), "context '4096' is none of"),
        (lambda: midtrain.midtrain("c", "d", "r", "cpu", "nemotron-h-8b", "16384"), "more than the 8192 tokens"),
        (lambda: midtrain.midtrain("c", "d", "r", "h100x64", "gpt-5"), "unknown model 'gpt-5'"),
        (lambda: midtrain.midtrain("c", "d", "r", "h100x144", "llama-3.1-8b"), "no layout of llama-3.1-8b on 144 GPUs"),
        (lambda: rl.rl("c", "t", "r", mixture="all"), "mixture 'all' of RL prompts is unknown"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


# Provenance.

TABLES: list[tuple[str, type, Values]] = [
    ("midtrain", MidtrainConfig, midtrain.values("c", "d", "r", "h100x64", "llama-3.1-8b")),
    ("longcontext", MidtrainConfig, longcontext.values("c", "d", "r", "llama-3.1-8b")),
    ("rl", RLConfig, rl.values("c", "t", "r", "h100x64", "llama-3.1-8b", "p")),
    ("evaluate", EvaluateConfig, evaluate.values("c", "o", "reasoning", "h100x64", "llama-3.1-8b")),
]


@pytest.mark.parametrize(("name", "schema", "values"), TABLES, ids=[name for name, _, _ in TABLES])
def test_every_value_that_is_no_default_has_an_origin(name: str, schema: type, values: Values) -> None:
    config = fill(schema, values)
    lines = {line.key: line for line in explain(config, values)}
    assert set(lines) >= set(values)
    for key, value in values.items():
        assert (lines[key].value, lines[key].origin, lines[key].where) == (value.value, value.origin, value.where)
        assert value.where
        if value.origin in (STUDY, INFERRED):
            assert any(word in value.where for word in ("Table", "Section", "Appendix")), key
    assert {line.origin for line in lines.values()} <= {STUDY, INFERRED, OURS, GIVEN, DEFAULT}
    assert count_leaves(config) == len(lines)


def count_leaves(config: Any) -> int:
    values = [getattr(config, f.name) for f in fields(config)]
    return sum(count_leaves(value) if is_dataclass(value) else 1 for value in values)


def test_what_the_study_states_is_not_called_ours() -> None:
    """Tables 16 and 21 again, from the text and not from the recipe."""
    stated = {"optimizer.lr", "train_steps", "schedule.lr_warmup_steps", "schedule.decay", "optimizer.adam_eps"}
    assert {key for key in stated if midtrain.STUDY_VALUES[key].origin != STUDY} == set()
    left_open = {"grpo.clip_low", "grpo.clip_high", "grpo.reference_alpha", "optimizer.weight_decay"}
    assert {key for key in left_open if rl.STUDY_VALUES[key].origin != OURS} == set()
    assert midtrain.STUDY_VALUES["optimizer.clip_grad"].origin == OURS


def test_show_tells_overrides_from_the_recipe() -> None:
    arguments = ["checkpoint=c", "data=d", "run_dir=r", "model=llama-3.1-8b", "hardware=h100x64"]
    lines = {line.key: line for line in show.lines_of("midtrain", [*arguments, "optimizer.lr=1e-4", "seed=7"])}
    assert (lines["optimizer.lr"].value, lines["optimizer.lr"].origin) == (1e-4, GIVEN)
    assert "the recipe has 5e-05 (Table 16)" in lines["optimizer.lr"].where
    assert (lines["seed"].value, lines["seed"].origin) == (7, GIVEN)
    assert lines["guards.spike_z"].where == "robust z-score from which a loss is a spike"
    assert lines["checkpoint.save_interval"].where == ""  # not the comment of the line below it


def test_show_prints_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert show.main(["rl", "checkpoint=c", "tokenizer=t", "run_dir=r", "--json"]) == 0
    assert {"key": "grpo.kl_beta", "value": 0.05, "origin": "study", "where": "Table 21"} in json.loads(
        capsys.readouterr().out
    )
    for arguments, message in (
        (["midtrain"], "midtrain() needs checkpoint=..., data=..., run_dir=..."),
        (["train"], "recipe 'train' is unknown"),
        ([], "name a recipe"),
        (["midtrain", "checkpoint=c", "data=d", "run_dir=r", "sed=7"], "did you mean 'seed'"),
    ):
        assert show.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_gpus_of_machines_are_known_to_the_planner() -> None:
    assert {machine.gpu for machine in HARDWARE.values() if machine.gpu} <= set(GPUS)
    assert [size_of(model) for model in ("granite-4.0-micro", "llama-3.1-8b", "mistral-small-24b", "")] == [
        "3b",
        "8b",
        "24b",
        "24b",
    ]


def test_mixtures_of_recipes_are_files() -> None:
    folder = Path(midtrain.__file__).parent / "mixtures"
    assert {p.stem for p in folder.glob("*.yaml")} >= {"math", "mc", "mcs", "long-context"}
