"""What stands for the real things when a command of the documentation is run at pocket size.

The reader sees the real command; the test runs that very command. What a mark ``at pocket size: NAME, NAME`` names is
looked up in `STAND_INS`: files that take the place of the reader's, or a value in place of another. Verbs, options and
keys stay; what makes the work small (`SIZES`) is added behind them, where the command does not say it itself.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from pages import Block, Command, commands_of


@dataclass(frozen=True)
class StandIn:
    """What stands for a name of a block.

    Attributes:
        value: In its place in the command: of a word, of a part of a path, or of ``key=value`` behind the sign. None
            leaves the command as it is.
        files: Path in the block's folder -> path of what Getting started made, or of `workspace`, that is copied there.
    """

    value: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)


BASE, CHECKPOINT, TOKENS, LAST = "models/base", "checkpoints/base", "data/pocket", "runs/mid/checkpoints/step_00000004"


def _study(model: str) -> StandIn:
    """What `recipes.folders` has of a model."""
    return StandIn(files={f"study/checkpoints/{model}": CHECKPOINT, f"study/data/{model}/mcs": TOKENS})


# By the text in the block. A name of two words is an option and its value.
STAND_INS = {
    "HF_DIR": StandIn(files={"HF_DIR": BASE}),
    "hf/base": StandIn(files={"hf/base": BASE}),
    "hf/mid": StandIn(files={"hf/mid": "hf/prism"}),
    "granite-3.3-8b-base": StandIn(files={"granite-3.3-8b-base": BASE}),
    "CKPT": StandIn(files={"CKPT": CHECKPOINT}),
    "checkpoints/mid": StandIn(files={"checkpoints/mid": LAST}),
    "checkpoints/granite-3.3-8b": StandIn(files={"checkpoints/granite-3.3-8b": CHECKPOINT}),
    "TOKENS": StandIn(files={"TOKENS": TOKENS}),
    "data/mix": StandIn(files={"data/mix": TOKENS}),
    "model=granite-3.3-8b": _study("granite-3.3-8b"),
    "model=llama-3.1-8b": _study("llama-3.1-8b"),
    "runs/quickstart": StandIn(files={"runs/quickstart": "made-up-quickstart"}),
    "web": StandIn("general-heldout"),  # a held-out source of data/pocket
    "h100x64": StandIn("cpu"),
    "/scratch": StandIn("."),
    "step_00025000": StandIn("step_00000004"),
    "step_00001000": StandIn("step_00000002"),
    "--step 40": StandIn("2"),
    "27e9": StandIn("20e3"),  # tokens of a run: as many as the mixture allows of a few rows
    "gpu": StandIn("debug"),  # a partition of the tests' Slurm
}


@dataclass(frozen=True)
class Sizes:
    """Words that are added to some commands.

    Attributes:
        beginning: First words of these commands.
        words: Each ``key=value``, ``--option`` or ``--option value``. One that the command has itself is left out.
        having: A word that they have; empty for all.
    """

    beginning: str
    words: tuple[str, ...]
    having: str = ""


_STEP = ("hardware=cpu", "micro_batch_size=4", "schedule.lr_warmup_steps=1")
_ANSWERS = ("--samples 1", "--max-new-tokens 8")
SIZES = (
    Sizes("prism-nemo midtrain", (*_STEP, "train_steps=4", "checkpoint.save_interval=4")),
    Sizes("prism-nemo midtrain", ("seq_length=64", "global_batch_size=4")),
    Sizes("prism-nemo midtrain", ("evaluation.questions=2", "evaluation.max_new_tokens=8", "evaluation.rows=4")),
    Sizes("prism-nemo rl", (*_STEP, "train_steps=2", "checkpoint.save_interval=2", "rollout.max_new_tokens=8")),
    Sizes("prism-nemo rl", ("rollout.prompts_per_step=2", "rollout.group_size=2")),
    Sizes("prism-nemo rl", ("rewards.workers=1", "rewards.sandbox=process")),
    # A model of random weights never closes its thinking.
    Sizes("prism-nemo prompts filter", ("--max-new-tokens 8", "--gate none")),
    Sizes("prism-nemo eval", ("--questions 1",)),
    Sizes("prism-nemo eval", (*_ANSWERS, "--reward sandbox=process"), having="reasoning"),
    Sizes("prism-nemo eval", _ANSWERS, having="longcontext"),
    Sizes("prism-nemo retention", ("--questions 4", "--task arc_challenge", "--data benchmarks")),
    # 64 processes of 8B are not started; what would be is printed.
    Sizes("python -m recipes.launch", ("--dryrun",)),
    # Nodes of the tests' Slurm have no real GPUs: one process. Jobs that ask for 64 are queued, and held.
    Sizes("sbatch", ("--ntasks-per-node=1", "--gpus-per-node=0", "--time=00:30:00"), having="slurm/stage.sh"),
    Sizes("sbatch", ("--hold",), having="slurm/mid_24b.sh"),
    Sizes("sbatch", ("--hold",), having="slurm/rl_24b.sh"),
    Sizes("sbatch", ("--hold",), having="slurm/eval.sh"),
    Sizes("bash slurm/prism_24b.sh", ("--hold",)),
)


@dataclass(frozen=True)
class Refusal:
    """A command that most machines refuse: it has to end with exit code 2 and the documented message.

    Attributes:
        word: That such a command has.
        message: Part of what is said.
        possible: Whether this machine can do it after all.
        elsewhere: Whether it is then left to other tests; else it is run.
    """

    word: str
    message: str
    possible: Callable[[], bool]
    elsewhere: bool = True


def has_nemo_run() -> bool:
    """Whether NeMo-Run is installed."""
    return importlib.util.find_spec("nemo_run") is not None


REFUSALS = (
    Refusal("precision.fp8=on", "there is no CUDA device", torch.cuda.is_available),
    Refusal("rollout.backend=vllm", "rollout.backend: vllm ", torch.cuda.is_available),
    Refusal("recipes.launch", "pip install 'prism-nemo[nemo]'", has_nemo_run, elsewhere=False),
)


def refusal_of(command: Command) -> Refusal | None:
    """The refusal that is expected of a command, if any."""
    return next((refusal for refusal in REFUSALS if refusal.word in command.words), None)


def stands_in(name: str, block: Block) -> bool:
    """Whether a name is in a command of a block, as a whole: `gpu` is not in `--gpu` or `gpus`."""
    return any(_pattern(name).search(" ".join(command.words)) for command in commands_of(block))


def check_stand_ins(block: Block) -> None:
    """Refuse names that say nothing.

    Raises:
        ValueError: For a name that `STAND_INS` does not have, or that no command of the block has.
    """
    for name in block.stand_ins or ():
        if name not in STAND_INS:
            raise ValueError(f"{block.page}:{block.line}: no stand-in is called '{name}'; see tests/docs/stand_ins.py")
        if not stands_in(name, block):
            raise ValueError(f"{block.page}:{block.line}: '{name}' is in no command of the block")


def files_for(block: Block) -> dict[str, str]:
    """Path in the block's folder -> what is copied there."""
    return {path: source for name in block.stand_ins or () for path, source in STAND_INS[name].files.items()}


def at_pocket_size(command: Command) -> Command:
    """The command that is run: as it stands, or with its stand-ins and sizes.

    Args:
        command: As written.

    Returns:
        The same words in the same order with some values changed, and more behind them; sbatch has its own options
        before the script.
    """
    names = command.block.stand_ins
    if names is None:
        return command
    words = [command.words[0]]
    for before, word in pairwise(command.words):
        words.append(_replaced(word, before, names))
    added = [more for sizes in _sizes_of(command.words) for more in _added(sizes, words)]
    place = 1 if words[0] == "sbatch" else len(words)
    return replace(
        command,
        words=(*words[:place], *added, *words[place:]),
        environment={key: _value(value, names) for key, value in command.environment.items()},
    )


def _sizes_of(words: Sequence[str]) -> list[Sizes]:
    text = f"{' '.join(words)} "
    return [s for s in SIZES if text.startswith(f"{s.beginning} ") and (not s.having or s.having in words)]


def _added(sizes: Sizes, words: Sequence[str]) -> list[str]:
    """Those of `sizes` whose key or option the command does not have."""
    given = {word.partition("=")[0] for word in words}
    return [part for more in sizes.words if re.split("[= ]", more)[0] not in given for part in more.split(" ")]


def _replaced(word: str, before: str, names: Sequence[str]) -> str:
    """A word with its stand-ins; options and keys stay."""
    if word.startswith("-"):
        return word
    key, sign, value = word.partition("=")
    if sign:
        return f"{key}={_value(value, names)}"
    pair = STAND_INS.get(f"{before} {word}") if f"{before} {word}" in names else None
    return pair.value if pair is not None and pair.value is not None else _value(word, names)


def _value(text: str, names: Sequence[str]) -> str:
    for name in names:
        value = STAND_INS[name].value
        if value is not None:
            text = _pattern(name).sub(value, text)
    return text


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
