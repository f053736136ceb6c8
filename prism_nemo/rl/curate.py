"""Prompt curation: measure how often a model solves each prompt, and keep those that it can learn from.

The study filtered with its mid-trained model and then trained every model, the base ones included, on what was left
(arXiv 2603.17074, section 9.1), which confounds its comparison: a base model meets prompts that are barely solvable for
another. So what is written here names the model that it was measured with, and measuring per model is one command each.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state

from prism_nemo.checkpoint.atomic import HASHES, MANIFEST, read_manifest, write_text
from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.config import ParallelConfig, RewardConfig, RolloutConfig
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.errors import InputError
from prism_nemo.generation.engine import Engine
from prism_nemo.models.build import build_model
from prism_nemo.rl.keeping import choose, counts, parse_rule
from prism_nemo.rl.pass_rates import PassRates, pass_rate, read_measured, solved
from prism_nemo.rl.prompt_file import PromptFile, check_prompt_lengths
from prism_nemo.rl.rewards.judge import Judge, how_judged
from prism_nemo.rl.rollout import roll_out
from prism_nemo.run import write_json
from prism_nemo.runtime import Runtime, gather, start, stop
from prism_nemo.training.progress import Progress

STAGE = "prompts"


@dataclass
class FilterConfig:
    """What to measure, and what to keep.

    Attributes:
        prompts: JSONL files of prompts.
        checkpoint: Of the model that answers.
        tokenizer: The model's.
        out: File of the prompts that are kept; ``OUT.json`` beside it says how they were chosen, ``OUT.measured.jsonl``
            holds every prompt's pass rate.
        samples: Answers to each prompt.
        keep: Rule by domain (``*`` for the rest): ``1`` exactly one right answer, ``1:`` at least one, ``1:15`` from 1
            to 15 (the study: math ``1``, code and science ``1:``).
        balance: Prompts of each domain: more are thinned out at random, fewer are filled up with prompts that were
            never solved (the study's balanced set); None keeps what the rules keep.
        max_new_tokens: Longest answer.
        batch: Prompts that are answered between two saves.
        rewards: How answers are judged.
        parallel: Layout of the model.
        seed: Of sampling and of random choices.
        templates: Forms of the prompts; those that will be trained with.
    """

    prompts: list[str]
    checkpoint: str
    tokenizer: str
    out: str
    samples: int = 16
    keep: dict[str, str] = field(default_factory=lambda: {"*": "1:"})
    balance: int | None = None
    max_new_tokens: int = 8192
    batch: int = 64
    rewards: RewardConfig = field(default_factory=RewardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    seed: int = 1234
    templates: list[str] = field(default_factory=list)


def check_filter(config: FilterConfig) -> list[PromptFile]:
    """Everything that can be refused before a model is loaded.

    Raises:
        InputError: Naming the option or file.
    """
    if config.samples < 1 or config.batch < 1 or config.max_new_tokens < 1:
        raise InputError("--samples, --batch and --max-new-tokens must be at least 1")
    if config.balance is not None and config.balance < 1:
        raise InputError(f"--balance {config.balance}: must be at least 1")
    if config.out.endswith((".gz", ".zst")):
        raise InputError(f"--out {config.out}: is written as plain text; leave out the last ending")
    for rule in config.keep.values():
        parse_rule(rule, config.samples)
    seen: set[Path] = set()
    for name in config.prompts:
        path = Path(name).resolve()
        if path in seen:
            raise InputError(f"{name}: is named twice; its prompts would be kept twice")
        seen.add(path)
    files = [PromptFile(Path(name), config.templates) for name in config.prompts]
    _check_ids(files)
    known = sum((file.domains for file in files), Counter[str]())
    for domain in config.keep:
        if domain != "*" and domain not in known:
            raise InputError(f"--keep {domain}=...: no prompt has this domain; there are {', '.join(sorted(known))}")
    for domain, count in sorted(known.items()):
        if config.balance is not None and count < config.balance and ("*" in config.keep or domain in config.keep):
            raise InputError(f"--balance {config.balance}: domain {domain} has {count} prompts; use at most {count}")
    architecture = read_architecture(Path(config.checkpoint))
    if config.max_new_tokens >= architecture.max_position_embeddings:
        raise InputError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt within the model's "
            f"{architecture.max_position_embeddings} positions"
        )
    room = architecture.max_position_embeddings - config.max_new_tokens
    check_prompt_lengths(files, load_tokenizer(config.tokenizer), room, "--max-new-tokens")
    if Path(config.out).exists():
        raise InputError(f"--out {config.out}: already exists; remove it or choose another name")
    Judge(config.rewards, {file.name: file for file in files}, config.max_new_tokens).close()
    return files


def _check_ids(files: Sequence[PromptFile]) -> None:
    """Refuse ids that two files share: what is kept goes into one file, which could not be read."""
    if len(files) < 2:
        return
    seen: dict[str, tuple[int, int]] = {}
    for f, file in enumerate(files):
        for i in range(len(file)):
            name = file.row(i).get("id")
            first, row = seen.setdefault(str(name), (f, i)) if name is not None else (f, i)
            if first != f:
                raise InputError(
                    f"{file.where(i)}: 'id' {name!r} is that of {files[first].where(row)} too, and what is kept goes "
                    "into one file; filter them one by one, or change the ids"
                )


def _identity(config: FilterConfig) -> dict[str, Any]:
    """What decides a pass rate: a measurement goes on only where all of it is the same."""
    return {
        "checkpoint": config.checkpoint,
        "manifest_sha256": sha256(Path(config.checkpoint) / MANIFEST),
        "weights": _weights(Path(config.checkpoint)),
        "tokenizer": load_tokenizer(config.tokenizer).sha256,
        "prompts": {name: sha256(Path(name)) for name in config.prompts},
        "templates": config.templates,
        "samples": config.samples,
        "max_new_tokens": config.max_new_tokens,
        "temperature": 1.0,
        "seed": config.seed,
        "gate": config.rewards.gate,
        **how_judged(config.rewards),
    }


def _weights(checkpoint: Path) -> str:
    """Hash of a checkpoint's files.

    A manifest without hashes has their sizes only, which are those of every model of this shape: filtering a second
    model that was imported to the same place would go on with the pass rates of the first.
    """
    manifest = read_manifest(checkpoint)
    hashes = manifest.get(HASHES) or {name: sha256(checkpoint / name) for name in manifest["files"]}
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def measure(config: FilterConfig) -> int:
    """Answer every prompt; every rank calls this. A measurement that was cut short goes on where it was.

    Returns:
        The number of prompts measured.

    Raises:
        InputError: If what was measured before was something else.
    """
    files = check_filter(config)
    runtime = start(config.parallel, config.seed)
    log = PassRates(Path(f"{config.out}.measured.jsonl"), _identity(config)) if runtime.is_main else None
    # One rank reads, so that all go on from the same prompt.
    found_done = [0 if log is None else log.count]
    if runtime.world_size > 1:
        dist.broadcast_object_list(found_done, src=0)
    done = found_done[0]
    rows = [(f, i) for f, file in enumerate(files) for i in range(len(file))]
    if done < len(rows):
        _answer(config, runtime, files, rows, done, log)
    stop()
    return len(rows)


def _answer(
    config: FilterConfig,
    runtime: Runtime,
    files: Sequence[PromptFile],
    rows: Sequence[tuple[int, int]],
    done: int,
    log: PassRates | None,
) -> None:
    """Answer and log the prompts from number `done` on; `rows` has the file and the row of each."""
    model = build_model(read_architecture(Path(config.checkpoint)), runtime)
    load(Path(config.checkpoint), model)
    model.eval()
    engine, tokenizer = Engine(model), load_tokenizer(config.tokenizer)
    rollout = RolloutConfig(group_size=config.samples, max_new_tokens=config.max_new_tokens)
    progress = Progress(STAGE, len(rows), done, runtime.is_main)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    with Judge(config.rewards, {file.name: file for file in files}, config.max_new_tokens, tokenizer.end) as judge:
        while done < len(rows):
            part = rows[done : done + config.batch]
            mine = [(done + n, files[f].problem(i)) for n, (f, i) in enumerate(part)][rank::size]
            found = roll_out(engine, mine, judge, tokenizer, rollout, config.seed) if mine else []
            lines: list[dict[str, Any]] = []
            for first in range(0, len(found), config.samples):
                group = found[first : first + config.samples]
                f, i = rows[group[0].number]
                lines.append({"number": group[0].number, "file": config.prompts[f], "row": i, **pass_rate(group)})
            lines = sorted((line for share in gather(lines) for line in share), key=lambda line: line["number"])
            if log is not None:
                log.append(lines)
            done += len(part)
            progress.update(done, f"solved at least once {solved(lines):.0%}")


def write_kept(config: FilterConfig) -> dict[str, Any]:
    """Write the kept prompts and how they were chosen, once all are measured.

    Returns:
        The record in ``OUT.json``.
    """
    identity, measured = read_measured(Path(f"{config.out}.measured.jsonl"))
    kept = choose(measured, config.keep, config.samples, config.balance, config.seed)
    files = {name: PromptFile(Path(name)) for name in config.prompts}
    rows = []
    for line in kept:
        rate = {"right": line["right"], "samples": config.samples, "checkpoint": config.checkpoint}
        rows.append(json.dumps({**files[line["file"]].row(line["row"]), "pass_rate": rate}, ensure_ascii=False))
    text = "\n".join(rows) + "\n"
    record = {
        "measured_with": {**identity, HASHES: read_manifest(Path(config.checkpoint)).get(HASHES, {})},
        "keep": config.keep,
        "balance": config.balance,
        "domains": {
            domain: counts([line for line in measured if line["domain"] == domain], kept)
            for domain in sorted({line["domain"] for line in measured})
        },
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    # The record first: where OUT is there, the command is done and refuses to be run again.
    write_json(Path(f"{config.out}.json"), record)
    write_text(Path(config.out), text)
    return record
