"""`prism-nemo prompts` and `rollouts`: choose the prompts of an RL stage, and read what a policy wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prism_nemo.commands.printing import Json, Tp, print_result
from prism_nemo.errors import InputError

prompts_app = typer.Typer(no_args_is_help=True, help="Choose the prompts of an RL stage.")
rollouts_app = typer.Typer(no_args_is_help=True, help="Read what a policy wrote and how it was scored.")


@prompts_app.command("filter")
def prompts_filter(
    prompts: Annotated[list[Path], typer.Argument(help="JSONL files of prompts.")],
    checkpoint: Annotated[Path, typer.Option(help="Checkpoint of the model that answers.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json or a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="File to write; how prompts were chosen goes beside it.")],
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt.")] = 16,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="[DOMAIN=]RULE in right answers: 1 (exactly), 1: (at least), 1:15; once for each domain."),
    ] = None,
    balance: Annotated[
        int | None, typer.Option(help="Prompts of each domain, filled up with prompts that were never solved.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 8192,
    batch: Annotated[int, typer.Option(min=1, help="Prompts answered between two saves.")] = 64,
    gate: Annotated[str, typer.Option(help="Required form of an answer: think or none.")] = "think",
    reward: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of rewards, such as sandbox=process.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="Form of a prompt, with {question}; several are spread over the prompts.")
    ] = None,
    tp: Tp = 1,
    dp: Annotated[int, typer.Option("--dp", min=1, help="data_parallel_size")] = 1,
    seed: Annotated[int, typer.Option(help="Of sampling and of random choices.")] = 1234,
    as_json: Json = False,
) -> None:
    """Answer each prompt several times and keep those with the right pass rate."""
    from prism_nemo.config import ParallelConfig, RewardConfig, resolve
    from prism_nemo.rl.curate import FilterConfig, check_filter, measure, write_kept
    from prism_nemo.runtime.launch import launch

    rules: dict[str, str] = {}
    for text in keep or ["1:"]:
        domain, _, rule = text.rpartition("=")
        if rules.setdefault(domain or "*", rule) != rule:
            raise InputError(f"--keep {text}: there is another rule for {domain or 'all domains'}; give one of each")
    rewards = resolve(RewardConfig, {"gate": gate}, reward or [], "--reward")
    config = FilterConfig(
        [str(path) for path in prompts], str(checkpoint), str(tokenizer), str(out), samples, rules, balance,
        max_new_tokens, batch, rewards,
        ParallelConfig(tensor_model_parallel_size=tp, data_parallel_size=dp), seed, template or [],
    )  # fmt: skip
    check_filter(config)
    launch(measure, config, processes=config.parallel.world_size)
    record = write_kept(config)
    lines = [
        f"{domain}: {part['kept']} of {part['measured']} prompts kept"
        + (f", {part['never_solved_kept']} of them never solved" if part["never_solved_kept"] else "")
        + "".join(f"; {count} answers without a verdict ({why})" for why, count in part["no_verdict"].items())
        for domain, part in record["domains"].items()
    ]
    print_result(
        record, as_json, "\n".join([*lines, f"{out}: measured with {checkpoint}; how it was chosen: {out}.json"])
    )


@rollouts_app.command("show")
def rollouts_show(
    run: Annotated[Path, typer.Argument(help="Directory of an RL run.")],
    step: Annotated[int | None, typer.Option(help="Which step; the last one recorded if not given.")] = None,
    task: Annotated[str | None, typer.Option(help="Only this task's.")] = None,
    sort: Annotated[str, typer.Option(help="prompt, best, worst, longest or shortest.")] = "prompt",
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 8,
    as_json: Json = False,
) -> None:
    """What was asked at a step, what the policy wrote, and how it was scored."""
    from rich.console import Console

    from prism_nemo.rl.show import select, show, summary
    from prism_nemo.rl.store import read_rollouts, recorded_steps

    steps = recorded_steps(run)
    if not steps:
        raise InputError(f"{run}: no rollouts are recorded there; is it the directory of an RL run?")
    step = steps[-1] if step is None else step
    if as_json:
        lines = read_rollouts(run, step)
        typer.echo(json.dumps({"step": step, "tasks": summary(lines), "rollouts": select(lines, task, sort, limit)}))
        return
    show(run, step, task, sort, limit, Console())
