from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prism_nemo.config import MidtrainConfig, ParallelConfig, RLConfig, check_positive, load_yaml, resolve, to_yaml
from prism_nemo.errors import InputError

NEEDED: dict[str, Any] = {"run_dir": "runs/x", "data": {"path": "tokens"}}
RL_NEEDED = {"run_dir": "runs/x", "init_from": "ckpt", "tokenizer": "tok"}


def mid(*overrides: str, **values: Any) -> MidtrainConfig:
    return resolve(MidtrainConfig, {**NEEDED, **values}, overrides, source="here.yaml")


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def test_defaults_values_overrides_later_ones_win() -> None:
    assert mid().optimizer.lr == 5e-5
    assert mid(optimizer={"lr": 1e-3}).optimizer.lr == 1e-3
    config = mid("optimizer.lr=2e-3", "optimizer.lr=3e-3", optimizer={"lr": 1e-3})
    assert config.optimizer.lr == 3e-3
    assert config.optimizer.weight_decay == 0.1
    assert config.data.path == "tokens"


def test_resolving_gives_plain_dataclasses() -> None:
    config = mid("parallel.tensor_model_parallel_size=2", "parallel.data_parallel_size=3")
    assert type(config) is MidtrainConfig
    assert type(config.parallel) is ParallelConfig
    assert config.parallel.world_size == 6


def test_resolving_leaves_the_defaults_alone() -> None:
    mid("optimizer.lr=1.0", "train_steps=1")
    assert mid() == mid()
    assert mid().optimizer.lr == 5e-5


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train_steps=7", 7),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        ("init_from=null", None),
        ("max_seconds=1.5", 1.5),
        ("use_distributed_optimizer=false", False),
        ("data.validation_source=held=out", "held=out"),
        ("run_dir=a b", "a b"),
    ],
)
def test_values_of_overrides(override: str, value: Any) -> None:
    found = value_of(mid(override), override.partition("=")[0])
    assert found == value
    assert type(found) is type(value)


AS_WRITTEN = [
    ("run_dir", "2026_11_28"), ("run_dir", "0123"), ("data.validation_source", "no"), ("guards.spike", "off"),
    ("monitor.wandb", "off"), ("precision.fp8", "on"), ("run_dir", "1e3"), ("init_from", "12:30:00"),
    ("data.validation_source", "~x"), ("run_dir", "true"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text"), AS_WRITTEN)
def test_strings_are_taken_as_they_are_written(key: str, text: str, tmp_path: Path) -> None:
    """YAML would make another string of them: 'False', '83', '20261128'."""
    given = f"{key}={text}"
    assert value_of(mid(given), key) == text
    section, _, name = key.rpartition(".")
    lines = [f"{section}:", f"  {name}: {text}"] if section else [f"{name}: {text}"]
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    values = load_yaml(tmp_path / "mine.yaml", MidtrainConfig)
    config = mid(**{**values, "data": {**NEEDED["data"], **values.get("data", {})}})
    assert value_of(config, key) == text
    (tmp_path / "written.yaml").write_text(to_yaml(config))
    assert resolve(MidtrainConfig, load_yaml(tmp_path / "written.yaml", MidtrainConfig)) == config


def test_other_types_and_none_are_still_yaml(tmp_path: Path) -> None:
    for text in ("null", "~"):
        assert mid(f"init_from={text}", init_from="c").init_from is None
    assert mid("run_dir='0123'").run_dir == "0123"
    assert mid("run_dir=runs/a #2").run_dir == "runs/a #2"
    assert mid("recompute.granularity=none").recompute.granularity == "none"
    assert mid("monitor.tensorboard=off").monitor.tensorboard is False
    assert mid("evaluation.sources=[no, 0123]").evaluation.sources == ["no", "0123"]
    assert mid("model.tie_word_embeddings=no", model={}).model == {"tie_word_embeddings": False}
    assert resolve(RLConfig, RL_NEEDED, ["rewards.verifiers.off=no"]).rewards.verifiers == {"off": "no"}
    (tmp_path / "mine.yaml").write_text(
        "init_from: null\nuse_distributed_optimizer: off\nmodel: {a: no, b: 010}\nevaluation: {tasks: [no]}\n"
        "optimizer: &o {lr: 1e-3}\nguards: {<<: {spike: off}, spike_z: 9}\n"
    )
    config = mid(**load_yaml(tmp_path / "mine.yaml", MidtrainConfig))
    assert (config.init_from, config.use_distributed_optimizer, config.model) == (None, False, {"a": False, "b": 8})
    assert (config.evaluation.tasks, config.optimizer.lr) == (["no"], 1e-3)
    assert (config.guards.spike, config.guards.spike_z) == ("off", 9.0)


def test_lists_and_free_mappings() -> None:
    assert resolve(RLConfig, RL_NEEDED, ["tasks=[a, b]"]).tasks == ["a", "b"]
    assert mid("model.vocab_size=301", model={"hidden_size": 48}).model == {"hidden_size": 48, "vocab_size": 301}
    assert mid(model={"anything": {"goes": [1]}}).model == {"anything": {"goes": [1]}}


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"train_step": 3}, [], "here.yaml: unknown key 'train_step'; did you mean 'train_steps'?"),
        ({"optimizer": {"learning_rate": 3}}, [], "here.yaml: unknown key 'optimizer.learning_rate'; "),
        ({"optimizer": {"weight_decai": 3}}, [], "did you mean 'optimizer.weight_decay'?"),
        ({"zzz": 3}, [], "here.yaml: unknown key 'zzz'; known keys: run_dir, "),
        ({}, ["global_batchsize=3"], "override 'global_batchsize=3': unknown key 'global_batchsize'; did you mean"),
        ({}, ["global_batchsize=3"], "'global_batch_size'?"),
        ({}, ["parallel.tensor_parallel_size=2"], "did you mean 'parallel.tensor_model_parallel_size'?"),
        ({}, ["opt.lr=2"], "unknown key 'opt'; did you mean 'optimizer'?"),
        ({}, ["train_steps"], "override 'train_steps' is not of the form key=value"),
        ({}, ["train_steps=many"], "train_steps"),
        ({}, ["optimizer.lr=[1]"], "optimizer.lr"),
        ({"train_steps": "many"}, [], "here.yaml (train_steps)"),
        ({"optimizer": {"lr": "high"}}, [], "here.yaml (optimizer.lr)"),
        ({"optimizer": 3}, [], "here.yaml"),
        ({"optimizer": None}, [], "here.yaml"),
        ({"use_distributed_optimizer": "perhaps"}, [], "here.yaml (use_distributed_optimizer)"),
        ({"train_steps": 1.5}, [], "here.yaml (train_steps)"),
        ({}, ["train_steps.more=3"], "train_steps"),
        ({}, ["run_dir=[1, 2"], "run_dir=[1, 2"),
        ({}, ["run_dir={a"], "run_dir={a"),
        ({}, ["run_dir=${nowhere}"], "nowhere"),
        ({}, ["=3"], "=3"),
        ({}, ["data.path="], "here.yaml (data.path)"),
    ],
)
def test_refusals_name_the_key(values: dict[str, Any], overrides: list[str], message: str) -> None:
    with pytest.raises(InputError) as caught:
        mid(*overrides, **values)
    assert message in str(caught.value)


def test_missing_values_are_all_named() -> None:
    with pytest.raises(InputError, match=r"here\.yaml: no value for data\.path, run_dir; give it as key=value"):
        resolve(MidtrainConfig, {}, source="here.yaml")
    with pytest.raises(InputError, match=r"RLConfig: no value for init_from, run_dir, tokenizer"):
        resolve(RLConfig)


def test_yaml_round_trip(tmp_path: Path) -> None:
    """config.yaml of a run is itself a recipe that gives the same configuration."""
    for config in (mid("optimizer.lr=3e-4", model={"vocab_size": 7}), resolve(RLConfig, RL_NEEDED, ["tasks=[a]"])):
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert resolve(type(config), load_yaml(tmp_path / "config.yaml")) == config


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        load_yaml(tmp_path / "none.yaml")
    for name, text, message in (
        ("list.yaml", "[1, 2]", "expected a mapping"),
        ("broken.yaml", "a: [1", "not readable as YAML"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=f"{name}: {message}"):
            load_yaml(tmp_path / name)


def test_describe_is_short() -> None:
    assert ParallelConfig(2, 4, 8, True).describe() == "TP2 PP4 DP8 SP"
    assert ParallelConfig().describe() == "TP1 PP1 DP1"
    everything = ParallelConfig(2, 4, 8, True, context_parallel_size=3, virtual_pipeline_model_parallel_size=5)
    assert everything.describe() == "TP2 PP4 VPP5 CP3 DP8 SP"
    assert everything.world_size == 2 * 4 * 3 * 8


@pytest.mark.parametrize("name", ["train_steps", "checkpoint.keep", "parallel.data_parallel_size"])
def test_counts_below_one_are_refused_by_name(name: str) -> None:
    names = ("train_steps", "checkpoint.keep", "parallel.data_parallel_size")
    check_positive(mid(f"{name}=1"), *names)
    for value in (0, -1):
        with pytest.raises(InputError, match=f"{name}: {value} must be at least 1"):
            check_positive(mid(f"{name}={value}"), *names)
