"""The whole way of one model: import, mid-train, restore long context, RL, evaluate; as stages that depend on another.

Everything is below one folder; see `recipes.folders`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from prism_nemo.errors import InputError
from prism_nemo.models.catalog import find
from recipes import evaluate as evaluations
from recipes import longcontext as long_contexts
from recipes import midtrain as midtrainings
from recipes import rl as rls
from recipes.fit import check_fit
from recipes.folders import Folders
from recipes.provenance import Values, fill, study
from recipes.stages import Stage, StageConfig, last_checkpoint

MIXTURES = ("math", "mc", "mcs")
PROMPT_SETS = ("unbalanced", "balanced")
SUITES = ("reasoning", "retention", "longcontext")
BASE_SHARE = study(0.15, "Table 7: 15 % base, 85 % mid-trained")


@dataclass(frozen=True)
class Route:
    """What is done to a model.

    Attributes:
        model: Name in the catalog.
        mixture: Of mid-training: math, mc or mcs; empty for none.
        rl_mixture: Of RL prompts: mc or mcs; empty for no RL.
        prompts: Set of RL prompts: unbalanced or balanced (the study, section 9.1).
        context: Tokens of a row in mid-training.
        steps: Of mid-training.
        merge: Whether a share of the base is mixed in after it.
        long: Whether the long-context phase follows.
    """

    model: str
    mixture: str = "mcs"
    rl_mixture: str = ""
    prompts: str = "unbalanced"
    context: int = 8192
    steps: int = 25_000
    merge: bool = False
    long: bool = False

    def check(self) -> None:
        """Refuse a route that there is none of.

        Raises:
            InputError: Naming the argument.
        """
        find(self.model)
        for name, value, known in (
            ("mixture", self.mixture, ("", *MIXTURES)),
            ("rl_mixture", self.rl_mixture, ("", *rls.MIXTURES)),
            ("prompts", self.prompts, PROMPT_SETS),
        ):
            if value not in known:
                raise InputError(f"{name} '{value}' is unknown; choose one of {', '.join(k or 'none' for k in known)}")
        if not self.mixture and (self.merge or self.long):
            raise InputError("merge and long follow mid-training: give a mixture")


class _Builder:
    """Adds stages one after another; each starts from what the one before left."""

    def __init__(self, route: Route, hardware: str, root: Path) -> None:
        self.route, self.hardware, self.folders = route, hardware, Folders(root)
        self.stages: list[Stage] = []
        self.name = route.model
        self.hf = self.folders.hf(route.model)
        self.checkpoint = self.folders.checkpoint(route.model)
        self.work(f"{self.name}-import", "import", self.hf, "--out", self.checkpoint)

    @property
    def last(self) -> tuple[str, ...]:
        return (self.stages[-1].name,) if self.stages else ()

    def work(self, name: str, verb: str, *arguments: str) -> None:
        self.stages.append(Stage(name, verb, "cpu", self.last, arguments=arguments))

    def train(self, verb: str, config: StageConfig, values: Values) -> None:
        check_fit(config, self.route.model, self.hardware)
        self.stages.append(Stage(self.name, verb, self.hardware, self.last, config, values))

    def run_dir(self) -> str:
        return self.folders.run(self.name)

    def data(self, mixture: str) -> str:
        return self.folders.data(self.route.model, mixture)

    def midtrain(self) -> None:
        route = self.route
        self.name += f"-{route.mixture}" + (f"-{route.context // 1024}k" if route.context != 8192 else "")
        self.name += f"-{route.steps}" if route.steps != 25_000 else ""
        values = midtrainings.values(
            self.checkpoint,
            self.data(route.mixture),
            self.run_dir(),
            self.hardware,
            route.model,
            str(route.context),
        )
        if route.steps != 25_000:
            values["train_steps"] = study(route.steps, "Tables 9 and 20: token budgets in steps of 1,048,576 tokens")
        config = fill(midtrainings.MidtrainConfig, values)
        self.train("midtrain", config, values)
        self.checkpoint = last_checkpoint(config)

    def merge(self) -> None:
        """Weights are mixed as Hugging Face folders, and come back as a checkpoint."""
        exported, self.name = self.folders.hf(self.name), f"{self.name}-merged"
        merged = self.folders.hf(self.name)
        self.work(f"{self.name}-export", "export", self.checkpoint, "--out", exported, "--tokenizer", self.hf)
        share = f"{BASE_SHARE.value}"
        self.work(self.name, "merge", self.hf, exported, "--weight", share, "--out", merged)
        self.checkpoint = self.folders.checkpoint(self.name)
        self.work(f"{self.name}-import", "import", merged, "--out", self.checkpoint)

    def long(self) -> None:
        self.name += "-long"
        values = long_contexts.values(
            self.checkpoint, self.data("long-context"), self.run_dir(), self.route.model, self.hardware
        )
        config = fill(long_contexts.MidtrainConfig, values)
        self.train("midtrain", config, values)
        self.checkpoint = last_checkpoint(config)

    def rl(self) -> None:
        route = self.route
        self.name += f"-rl-{route.rl_mixture}" + ("-balanced" if route.prompts == "balanced" else "")
        prompts = self.folders.prompts(route.prompts)
        arguments = (self.checkpoint, self.hf, self.run_dir(), self.hardware, route.model, prompts, route.rl_mixture)
        values = rls.values(*arguments)
        config = fill(rls.RLConfig, values)
        self.train("rl", config, values)
        self.checkpoint = last_checkpoint(config)

    def evaluate(self, suites: tuple[str, ...]) -> None:
        after = self.last
        for suite in suites:
            name = f"{self.name}-{suite}"
            arguments = (self.checkpoint, self.folders.evaluation(name), suite, self.hardware)
            values = evaluations.values(*arguments, self.route.model)
            config = fill(evaluations.EvaluateConfig, values)
            check_fit(config, self.route.model, self.hardware)
            self.stages.append(Stage(name, "eval", self.hardware, after, config, values))


def stages_of(
    route: Route, hardware: str = "h100x64", root: str | Path = "study", suites: tuple[str, ...] = SUITES
) -> list[Stage]:
    """The stages of a route, each after those that it needs.

    Args:
        route: What is done to the model.
        hardware: Name in `recipes.hardware`, for every stage with a layout.
        root: Folder of everything.
        suites: That the last checkpoint is evaluated with.

    Raises:
        InputError: For a model, mixture or machine that is unknown, or a stage that the model cannot have.
    """
    route.check()
    builder = _Builder(route, hardware, Path(root))
    if route.mixture:
        builder.midtrain()
    if route.merge:
        builder.merge()
    if route.long:
        builder.long()
    if route.rl_mixture:
        builder.rl()
    builder.evaluate(suites)
    return builder.stages


def pipeline(
    model: str,
    mixture: str = "mcs",
    hardware: str = "h100x64",
    root: str = "study",
    rl_mixture: str = "mcs",
    prompts: str = "unbalanced",
) -> list[Stage]:
    """The study's way of a model: mid-train, RL, evaluate.

    Args:
        model: Name in the catalog.
        mixture: Of mid-training: math, mc or mcs; empty for RL on the base.
        hardware: Name in `recipes.hardware`.
        root: Folder of everything.
        rl_mixture: Of RL prompts: mc or mcs; empty for none.
        prompts: unbalanced or balanced.
    """
    route = replace(Route(find(model).name), mixture=mixture, rl_mixture=rl_mixture, prompts=prompts)
    return stages_of(route, hardware, root)
