from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.config import MidtrainConfig, ParallelConfig, RLConfig, to_yaml
from prism_nemo.errors import InputError
from prism_nemo.recipe import load_recipe

RECIPES = Path(__file__).parent.parent / "recipes"
RECIPE = """
from prism_nemo.config import MidtrainConfig, DataConfig

def midtrain(data: str, steps: str = "10") -> MidtrainConfig:
    return MidtrainConfig(data=DataConfig(path=data), train_steps=int(steps), seed=7)
"""


def mid(path: Path, *overrides: str) -> MidtrainConfig:
    return load_recipe(path, "midtrain", MidtrainConfig, list(overrides))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return tmp_path / "recipe.py"


def test_arguments_go_to_the_function_and_the_rest_to_its_result(recipe: Path) -> None:
    config = mid(recipe, "data=tokens", "run_dir=r", "steps=20", "optimizer.lr=1e-3")
    assert (config.data.path, config.run_dir, config.train_steps, config.seed) == ("tokens", "r", 20, 7)
    assert config.optimizer.lr == 1e-3


def test_fields_win_over_what_the_function_returned(recipe: Path) -> None:
    assert mid(recipe, "data=tokens", "run_dir=r", "seed=8", "train_steps=3").seed == 8


def test_config_yaml_of_a_run_is_a_recipe(recipe: Path, tmp_path: Path) -> None:
    config = mid(recipe, "data=tokens", "run_dir=r")
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert mid(tmp_path / "config.yaml") == config
    assert mid(tmp_path / "config.yaml", "seed=9").seed == 9


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run_dir=r"], r"recipe\.py: midtrain\(\) needs data=\.\.\."),
        (["data=d"], r"recipe\.py: no value for run_dir"),
        (["data=d", "run_dir=r", "stepz=3"], "unknown key 'stepz'"),
        (["data", "run_dir=r"], "override 'data' is not of the form key=value"),
    ],
)
def test_wrong_overrides(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        mid(recipe, *overrides)


def test_files_that_are_no_recipes(tmp_path: Path, recipe: Path) -> None:
    for name, message in (
        ("none.py", r"none\.py: no such file"),
        ("none.yaml", r"none\.yaml: no such file"),
        ("recipe.txt", r"recipe\.txt: a recipe is a \.py file or a config\.yaml"),
    ):
        with pytest.raises(InputError, match=message):
            mid(tmp_path / name)
    with pytest.raises(InputError, match=r"recipe\.py: defines no function 'rl'"):
        load_recipe(recipe, "rl", RLConfig, [])


@pytest.mark.parametrize("returned", ["None", "3", "{'a': 1}", "__import__('prism_nemo.config').config.RLConfig()"])
def test_function_that_returns_something_else(tmp_path: Path, returned: str) -> None:
    (tmp_path / "recipe.py").write_text(f"def midtrain():\n    return {returned}\n")
    with pytest.raises(InputError, match=r"recipe\.py: "):
        mid(tmp_path / "recipe.py")


@pytest.mark.parametrize(
    "text", ["def midtrain(:\n", "import no_such_module\n", "def midtrain():\n    return int('x')\n"]
)
def test_recipe_that_does_not_run(tmp_path: Path, text: str) -> None:
    (tmp_path / "recipe.py").write_text(text)
    with pytest.raises(InputError, match=r"recipe\.py"):
        mid(tmp_path / "recipe.py")


# The recipes that we ship.


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_every_shipped_recipe_is_known_here() -> None:
    recipes = {"evaluate", "longcontext", "merge", "midtrain", "pipeline", "pocket_study", "rl"}
    parts = {
        "__init__",
        "fit",
        "folders",
        "grid",
        "hardware",
        "launch",
        "layouts",
        "machine",
        "provenance",
        "show",
        "stages",
    }
    assert {p.stem for p in RECIPES.glob("*.py")} == recipes | parts


def test_folders_follow_from_model_and_mixture() -> None:
    recipe = RECIPES / "midtrain.py"
    config = mid(recipe, "model=granite-3.3-8b", "mixture=mcs", "root=/big", "hardware=h100x64")
    from recipes.pipeline import pipeline as build

    pipeline = build("granite-3.3-8b", "mcs", "h100x64", "/big")
    stage = next(stage for stage in pipeline if stage.verb == "midtrain")
    assert config == stage.config
    assert config.data.path == "/big/data/granite-3.3-8b/mcs"
    longer = mid(recipe, "model=granite-3.3-8b", "mixture=mcs", "context=16384", "data=/elsewhere")
    assert (longer.run_dir, longer.data.path) == ("study/runs/granite-3.3-8b-mcs-16k", "/elsewhere")
    for arguments, message in (
        (["model=granite-3.3-8b"], r"midtrain\(\) needs data=\.\.\., run_dir=\.\.\.; or model=NAME mixture=NAME"),
        (
            ["model=granite-3.3-8b", "mixture=mix"],
            r"mixture 'mix' is unknown; choose one of math, mc, mcs, or give data",
        ),
    ):
        with pytest.raises(InputError, match=message):
            mid(recipe, *arguments)


# 144 GPUs are for the long-context phase: its 36 rows are shared out over them, the 128 rows of this one are not.
@pytest.mark.parametrize("hardware", sorted(set(module("hardware").HARDWARE) - {"h100x144"}))
def test_midtrain_recipe_is_the_studys(hardware: str) -> None:
    """arXiv 2603.17074, table 16."""
    config = mid(RECIPES / "midtrain.py", "checkpoint=c", "data=d", "run_dir=r", f"hardware={hardware}")
    assert config.train_steps * config.global_batch_size * config.seq_length == 26_214_400_000
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.adam_eps) == (5e-5, 0.1, 1e-10)
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (0.9, 0.95)
    assert (config.schedule.lr_warmup_steps, config.schedule.decay, config.schedule.min_lr_ratio) == (
        500,
        "cosine",
        0.1,
    )
    assert config.global_batch_size % (config.micro_batch_size * config.parallel.data_parallel_size) == 0
    if hardware.startswith("h100x"):
        assert config.parallel.world_size == int(hardware.removeprefix("h100x"))


def test_midtrain_recipe_names_its_hardware() -> None:
    with pytest.raises(InputError, match="hardware 'tpu' is unknown; choose one of cpu, cpu2, h100x8, h100x64"):
        mid(RECIPES / "midtrain.py", "checkpoint=c", "data=d", "run_dir=r", "hardware=tpu")


def test_rl_recipe_is_the_studys() -> None:
    """arXiv 2603.17074, table 21."""
    config = load_recipe(
        RECIPES / "rl.py", "rl", RLConfig, ["checkpoint=c", "tokenizer=t", "run_dir=r", "tasks=[arithmetic]"]
    )
    assert (config.rollout.prompts_per_step, config.rollout.group_size, config.train_steps) == (64, 16, 1000)
    assert (config.optimizer.lr, config.grpo.kl_beta) == (5e-7, 0.05)
    assert config.tasks == ["arithmetic"]
    assert config.parallel == ParallelConfig()


def test_recipe_functions_take_text_only() -> None:
    """Arguments come from the command line, unparsed."""
    for name in ("midtrain", "rl"):
        parameters = inspect.signature(getattr(module(name), name)).parameters.values()
        assert {str(p.annotation) for p in parameters} <= {"str", "<class 'str'>", "str | None"}


def test_a_recipe_may_define_a_dataclass(tmp_path: Path) -> None:
    path = tmp_path / "json.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from prism_nemo.config import MidtrainConfig\n"
        "@dataclass\n"
        "class Size:\n"
        "    steps: int = 7\n"
        "def midtrain() -> MidtrainConfig:\n"
        "    return MidtrainConfig(run_dir='r', train_steps=Size().steps, init_from='c')\n"
    )
    config = load_recipe(path, "midtrain", MidtrainConfig, ["data.path=d"])
    assert config.train_steps == 7
    import json

    assert json.dumps(1) == "1"


def test_the_merge_recipe_is_the_command_with_its_weight(tmp_path: Path) -> None:
    """15 % base: one number of two models is the first one's share."""
    from prism_nemo.analysis.merge_methods import recipe_of

    settings = module("merge").merge("base", "mid", str(tmp_path / "out"))
    assert settings.models == ("base", "mid")
    recipe = recipe_of(settings.method, len(settings.models), settings.weights, settings.density)
    assert recipe.weights == pytest.approx((0.15, 0.85))
