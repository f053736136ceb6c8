"""`prism-nemo eval`, `regrade`, `select` and `retention`: how good a model is, and what it kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from prism_nemo.commands.printing import Json, Pp, Tp, is_main, say, show_rich, text_of
from prism_nemo.errors import InputError

Suite = Annotated[str, typer.Option(help="reasoning, retention, longcontext, pocket, or a .jsonl file of questions.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder of question files; of built data for the pocket suite's held-out text.")
]
Questions = Annotated[int | None, typer.Option(min=1, help="At most so many of each task.")]
Task = Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")]
Engine = Annotated[str, typer.Option(help="megatron, transformers or vllm.")]
TokenizerFolder = Annotated[Path | None, typer.Option(help="Default: the one that came with the model.")]
MaxNewTokens = Annotated[int | None, typer.Option(min=1, help="Longest answer.")]
Samples = Annotated[int | None, typer.Option(min=1, help="Answers to each question; default the suite's.")]
Seed = Annotated[int, typer.Option(help="Of sampling and of generated questions.")]
TaskFolder = Annotated[Path | None, typer.Option(help="retention: folder of lm-eval task files.")]
HeldOut = Annotated[list[str] | None, typer.Option(help="pocket: a held-out source of --data; may be repeated.")]
HeldOutRows = Annotated[int, typer.Option(min=1, help="pocket: rows of each held-out source.")]
SeqLength = Annotated[int, typer.Option(min=1, help="pocket: tokens of such a row.")]


def evaluate(
    model: Annotated[Path, typer.Argument(help="Native checkpoint or Hugging Face folder.")],
    suite: Suite = "pocket",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the result; default evaluations/MODEL-SUITE-SPLIT. Resumes there.")
    ] = None,
    split: Annotated[str, typer.Option(help="test, or validation to choose checkpoints and formats on.")] = "test",
    task: Task = None,
    data: Data = None,
    questions: Questions = None,
    prompt_format: Annotated[
        list[str] | None, typer.Option("--format", help="Prompt format; of several the best is chosen on validation.")
    ] = None,
    elicit: Annotated[bool, typer.Option("--elicit", help="Try all formats of each task.")] = False,
    choose_on_test: Annotated[
        bool, typer.Option("--choose-on-test", help="Allow that choice on test questions; the result is marked.")
    ] = False,
    samples: Samples = None,
    temperature: Annotated[float | None, typer.Option(help="0 for greedy; default the suite's.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Mass of the nucleus; default the suite's.")] = None,
    max_new_tokens: MaxNewTokens = None,
    length: Annotated[list[int] | None, typer.Option(help="longcontext: tokens of a text; may be repeated.")] = None,
    held_out: HeldOut = None,
    held_out_rows: HeldOutRows = 256,
    seq_length: SeqLength = 128,
    text: Annotated[Path | None, typer.Option(help="longcontext: file whose sentences fill the texts.")] = None,
    task_folder: TaskFolder = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of rewards, such as sandbox=process.")
    ] = None,
    bos: Annotated[
        bool | None, typer.Option("--bos/--no-bos", help="First special token; default as the tokenizer does it.")
    ] = None,
    engine: Engine = "megatron",
    tokenizer: TokenizerFolder = None,
    batch: Annotated[int, typer.Option(min=1, help="Answers between two saves.")] = 256,
    cache: Annotated[Path | None, typer.Option(help="Folder of answers that several evaluations share.")] = None,
    seed: Seed = 0,
    tp: Tp = 1,
    pp: Pp = 1,
    dp: Annotated[int, typer.Option("--dp", min=1, help="data_parallel_size")] = 1,
    as_json: Json = False,
) -> None:
    """Scores with 95 % intervals; every answer and verdict is kept. The same command goes on where it stopped."""
    from prism_nemo.config import ParallelConfig
    from prism_nemo.evaluation.run import evaluate as run
    from prism_nemo.evaluation.settings import EvaluateConfig

    settings = EvaluateConfig(
        str(model), str(out or _default_out(model, suite, split)), suite, split, tuple(task or ()),
        text_of(data), questions, tuple(prompt_format or ()), elicit, choose_on_test, samples, temperature, top_p,
        max_new_tokens, seed, engine, text_of(tokenizer), bos=bos, batch=batch, text=text_of(text),
        cache=text_of(cache),
        held_out=tuple(held_out or ()), held_out_rows=held_out_rows, seq_length=seq_length,
        lengths=tuple(length or ()), task_folder=text_of(task_folder), rewards=_rewards(reward),
        parallel=ParallelConfig(
            tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, data_parallel_size=dp
        ),
    )  # fmt: skip
    _tell(run(settings), Path(settings.out), as_json)


def regrade(
    evaluation: Annotated[Path, typer.Argument(help="Folder of a finished evaluation.")],
    reward: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="A key of rewards, such as sandbox=process.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Judge the stored answers again, without the model."""
    from prism_nemo.evaluation.answering.regrade import regrade as run

    _tell(run(evaluation, _rewards(reward) if reward else None), evaluation, as_json)


def select(
    evaluations: Annotated[list[Path], typer.Argument(help="Evaluation folders of several checkpoints.")],
    by: Annotated[str, typer.Option(help="plain_mean, domain_weighted, or a task.")] = "plain_mean",
    on_test: Annotated[
        bool, typer.Option("--on-test", help="Allow it on test questions; the result is marked.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for selection.json.")] = Path("."),
    as_json: Json = False,
) -> None:
    """Choose the best of several checkpoints on validation questions, and say how sure the choice is."""
    from prism_nemo.evaluation.comparing.selection import choose_checkpoint, record_choice

    choice = choose_checkpoint(evaluations, by, on_test)
    record_choice(choice, out)
    lines = [
        f"{candidate.name}: {candidate.estimate:.4f}, the best in {candidate.probability:.0%} of resamples"
        for candidate in choice.candidates
    ]
    lines.append(
        f"chosen: {choice.chosen.name}; as the best of {len(choice.candidates)} it is expected to look "
        f"{abs(choice.optimism):.4f} too good"
    )
    typer.echo(json.dumps(choice.to_dict()) if as_json else "\n".join([*lines, *(f"note: {m}" for m in choice.marks)]))


def retention(
    base: Annotated[Path, typer.Argument(help="The base model, or an evaluation of it.")],
    models: Annotated[list[Path], typer.Argument(help="Models that came of it, or their evaluations.")],
    suite: Suite = "retention",
    out: Annotated[Path, typer.Option(help="Folder of the report, and of evaluations that are made.")] = Path(
        "retention"
    ),
    margin: Annotated[float, typer.Option(help="A change of accuracy up to this does not matter.")] = 0.01,
    loss_margin: Annotated[float, typer.Option(help="The same for nats per token.")] = 0.01,
    may_differ: Annotated[
        list[str] | None, typer.Option(help="What may differ between the evaluations, such as prompts; marked.")
    ] = None,
    task: Task = None,
    data: Data = None,
    questions: Questions = None,
    samples: Samples = None,
    max_new_tokens: MaxNewTokens = None,
    held_out: HeldOut = None,
    held_out_rows: HeldOutRows = 256,
    seq_length: SeqLength = 128,
    task_folder: TaskFolder = None,
    engine: Engine = "megatron",
    tokenizer: TokenizerFolder = None,
    seed: Seed = 0,
    tp: Tp = 1,
    pp: Pp = 1,
    as_json: Json = False,
) -> None:
    """What was kept and what was lost, task by task, with intervals, a verdict for each, and forgotten questions."""
    from prism_nemo.evaluation.comparing.retention import retention as run
    from prism_nemo.evaluation.comparing.retention_view import MIN_WIDTH, retention_view, write_retention

    given = {
        "tasks": tuple(task or ()), "data": text_of(data), "questions": questions, "samples": samples,
        "max_new_tokens": max_new_tokens, "held_out": tuple(held_out or ()), "held_out_rows": held_out_rows,
        "seq_length": seq_length, "task_folder": text_of(task_folder),
        "engine": engine, "tokenizer": text_of(tokenizer), "seed": seed,
    }  # fmt: skip
    make = _evaluator(suite, out, given, tp, pp)
    report = run([base, *models], make, margin=margin, loss_margin=loss_margin, may_differ=may_differ or [])
    if not is_main():
        return
    write_retention(report, out)
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show_rich(retention_view(report), MIN_WIDTH)
        say(f"prism-nemo: {out / 'retention.md'} has the forgotten questions")


def _evaluator(suite: str, out: Path, given: dict[str, Any], tp: int, pp: int) -> Callable[[Path], Path]:
    """From a model to the folder of its evaluation."""
    from prism_nemo.config import ParallelConfig
    from prism_nemo.evaluation.run import evaluate as run
    from prism_nemo.evaluation.settings import EvaluateConfig

    used: dict[Path, Path] = {}

    def make(model: Path) -> Path:
        folder = out / "evaluations" / _name(model)
        if used.setdefault(folder, model) != model:
            raise InputError(f"{model}: another model has the same name; evaluate them with `prism-nemo eval` first")
        layout = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
        run(dataclasses.replace(EvaluateConfig(str(model), str(folder), suite, parallel=layout), **given))
        return folder

    return make


def _tell(evaluation: Any, out: Path, as_json: bool) -> None:
    from prism_nemo.evaluation.evaluation_view import MIN_WIDTH, evaluation_view

    if not is_main():
        return
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(evaluation)))
    else:
        show_rich(evaluation_view(evaluation), MIN_WIDTH)
        say(f"prism-nemo: every answer and verdict is in {out}")


def _rewards(overrides: list[str] | None) -> Any:
    from prism_nemo.config import RewardConfig, resolve

    return resolve(RewardConfig, {"gate": "none"}, overrides or [], "--reward")


def _name(model: Path) -> str:
    """For a folder."""
    from prism_nemo.run import checkpoint_name

    return checkpoint_name(model).replace("/", "-")


def _default_out(model: Path, suite: str, split: str) -> Path:
    return Path("evaluations") / f"{_name(model)}-{Path(suite).name.partition('.')[0]}-{split}"
