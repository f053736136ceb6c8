"""`prism-nemo analyze`: what a stage changed inside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prism_nemo.commands.printing import Json, Pp, Tp, is_main, print_result, say, show_rich, text_of, watcher

analyze_app = typer.Typer(no_args_is_help=True, help="What a stage changed inside the model.")

_TITLES = {"path": "On the way from one model to the next", "entropy": "Entropy, length and likelihood by stage"}
_PATH = "W = A + alpha (B - A) + beta (C - B), with 95 % intervals."
_ENTROPY = "Entropies, losses and likelihoods in nats per token, lengths in tokens, with 95 % intervals."

Models = Annotated[list[Path], typer.Argument(help="In the order of training: Hugging Face folders or native ones.")]
Data = Annotated[Path | None, typer.Option(help="Folder of built data, for held-out text.")]
Source = Annotated[list[str] | None, typer.Option(help="A held-out source of --data; default all of weight 0.")]
Tasks = Annotated[list[str] | None, typer.Option(help="A task, reasoning_gym:NAME or prompts:FILE; may be repeated.")]
TokenizerFolder = Annotated[Path | None, typer.Option(help="Default: the first model's own.")]
SeqLength = Annotated[int, typer.Option(min=2, help="Most tokens of a text.")]
Out = Annotated[Path | None, typer.Option(help="Folder for the tables (JSON, tidy JSONL and Parquet).")]
Questions = Annotated[int, typer.Option(min=1, help="Of each task.")]
Samples = Annotated[int, typer.Option(min=1, help="Answers to each question.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer.")]
Gate = Annotated[str, typer.Option(help="Required form of an answer: think or none.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]


@analyze_app.command("weights")
def analyze_weights(
    checkpoints: Annotated[
        list[Path], typer.Argument(help="Two or more, in the order of training: Hugging Face folders or native ones.")
    ],
    transition: Annotated[
        list[str] | None,
        typer.Option(help="FROM:TO, a further step between two checkpoints, such as base:base_rl; may be repeated."),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(help="Run directory of the stage between two checkpoints, one for each step in order, or -."),
    ] = None,
    spectrum: Annotated[bool, typer.Option("--spectrum", help="Singular values of the updates too.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for figures and tables (JSON, tidy JSONL, Parquet).")] = None,
    as_json: Json = False,
) -> None:
    """How much the weights changed, in size, direction and place, beside what null models would give."""
    from prism_nemo.analysis.weights_report import WeightsSettings, analyze_weights, transition_of
    from prism_nemo.analysis.weights_view import MIN_WIDTH, weights_view

    moves = [transition_of(text) for text in transition or []]
    settings = WeightsSettings(checkpoints, moves, run or [], spectrum)
    report = analyze_weights(settings, watcher("weights"))
    if out is not None:
        for path in report.write(out):
            say(f"prism-nemo: wrote {path}")
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        show_rich(weights_view(report), MIN_WIDTH)


@analyze_app.command("cka")
def analyze_cka(
    models: Models,
    data: Data = None,
    source: Source = None,
    texts: Annotated[list[Path] | None, typer.Option(help="File of text or JSON lines; may be repeated.")] = None,
    tokenizer: TokenizerFolder = None,
    rows: Annotated[int, typer.Option(min=4, help="Texts of each input.")] = 200,
    seq_length: SeqLength = 512,
    null_draws: Annotated[int, typer.Option(min=0, help="Random updates of the same size, for each pair.")] = 3,
    seed: Seed = 0,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """How alike representations are, layer by layer, beside random updates of the same size."""
    from prism_nemo.analysis.cka_view import cka_figures, cka_lines
    from prism_nemo.analysis.representations import CKASettings, compare_representations

    settings = CKASettings(
        tuple(map(str, models)), text_of(data), tuple(source or ()), tuple(map(str, texts or ())), text_of(tokenizer),
        rows, seq_length, null_draws=null_draws, seed=seed,
    )  # fmt: skip
    found = compare_representations(settings, say)
    _finish("cka", found.to_dict(), cka_lines(found), out, as_json)
    if out is not None:
        from prism_nemo.report.standalone import write_figures

        names = ", ".join(model["name"] for model in found.models)
        write_figures(out / "cka.html", "How alike representations are", names, cka_figures(found))


@analyze_app.command("path")
def analyze_path(
    models: Models,
    out: Annotated[Path, typer.Option(help="Folder of the result; the same command goes on there.")],
    data: Data = None,
    source: Source = None,
    tasks: Tasks = None,
    tokenizer: TokenizerFolder = None,
    first: Annotated[int, typer.Option(min=2, help="Points between the first two models.")] = 7,
    second: Annotated[int, typer.Option(min=2, help="Points between the last two.")] = 5,
    grid: Annotated[int, typer.Option(min=0, help="Points along each side of a square; 0 for none.")] = 0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of held-out text.")] = 256,
    seq_length: SeqLength = 128,
    questions: Questions = 128,
    samples: Samples = 1,
    max_new_tokens: MaxNewTokens = 48,
    gate: Gate = "think",
    seed: Seed = 7,
    tp: Tp = 1,
    pp: Pp = 1,
    as_json: Json = False,
) -> None:
    """Loss and pass rate on the way from one model to the next, and over a square."""
    from prism_nemo.analysis.path import PathSettings, path_lines
    from prism_nemo.analysis.path import analyze_path as run
    from prism_nemo.config import ParallelConfig

    settings = PathSettings(
        tuple(map(str, models)), str(out), first, second, grid, text_of(data), tuple(source or ()), rows, seq_length,
        _answers(tasks, questions, samples, max_new_tokens, gate, seed), text_of(tokenizer),
        parallel=ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp),
    )  # fmt: skip
    result = run(settings)
    _finish("path", result, path_lines(result), out, as_json, ("measure", "name"), _PATH)


@analyze_app.command("entropy")
def analyze_entropy(
    models: Models,
    data: Data = None,
    source: Source = None,
    tasks: Tasks = None,
    tokenizer: TokenizerFolder = None,
    rows: Annotated[int, typer.Option(min=2, help="Rows of held-out text.")] = 256,
    seq_length: SeqLength = 128,
    questions: Questions = 128,
    samples: Samples = 1,
    max_new_tokens: MaxNewTokens = 48,
    gate: Gate = "think",
    seed: Seed = 7,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Entropy of tokens, length of answers, and the likelihood of right and wrong ones, stage by stage."""
    from prism_nemo.analysis.entropy import EntropySettings, entropy_lines
    from prism_nemo.analysis.entropy import analyze_entropy as run

    answers = _answers(tasks, questions, samples, max_new_tokens, gate, seed)
    settings = EntropySettings(
        tuple(map(str, models)), answers, text_of(data), tuple(source or ()), rows, seq_length, text_of(tokenizer)
    )
    result = run(settings, say)
    _finish("entropy", result, entropy_lines(result), out, as_json, ("on", "measure"), _ENTROPY)


def merge(
    models: Models,
    out: Annotated[Path, typer.Option(help="Hugging Face folder to create.")],
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="linear, slerp: share of the first of two models (0.15); else one for each; may be repeated."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="linear, task_arithmetic, ties or slerp.")] = "linear",
    density: Annotated[float, typer.Option(help="ties: share of each update that is kept.")] = 0.2,
    carry_from: Annotated[Path | None, typer.Option(help="Parent whose configuration and tokenizer are taken.")] = None,
    as_json: Json = False,
) -> None:
    """Merge models in weight space, tensor by tensor, into a new Hugging Face folder."""
    from prism_nemo.analysis.merge import MergeSettings, merge_models

    settings = MergeSettings(
        tuple(map(str, models)), str(out), method, tuple(weight or ()), density, text_of(carry_from)
    )
    record = merge_models(settings, watcher("merge (bytes)"))
    shares = ", ".join(f"{share:g} {parent['path']}" for share, parent in _shares(record))
    print_result(record, as_json, "\n".join([f"{out}: {record['method']} of {shares}", *record["notes"]]))


def _shares(record: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
    """Weight of each parent; of an update's weight there is none for the base."""
    weights, parents = record["weights"], record["parents"]
    return list(zip([1.0] * (len(parents) - len(weights)) + list(weights), parents, strict=True))


def _answers(tasks: list[str] | None, questions: int, samples: int, max_new_tokens: int, gate: str, seed: int) -> Any:
    from prism_nemo.analysis.sampled import AnswerSettings

    return AnswerSettings(
        tuple(tasks or ()), questions=questions, samples=samples, max_new_tokens=max_new_tokens, gate=gate, seed=seed
    )


def _finish(
    name: str,
    result: dict[str, Any],
    lines: list[str],
    out: Path | None,
    as_json: bool,
    by: tuple[str, ...] = (),
    caption: str = "",
) -> None:
    """Print a result, and write its tables and, with `by`, its figures."""
    if not is_main():
        return
    if out is not None:
        from prism_nemo.analysis.row_figures import row_figures
        from prism_nemo.analysis.tables import write_tables
        from prism_nemo.report.standalone import write_figures

        for path in write_tables(out, name, result, result["rows"]):
            say(f"prism-nemo: wrote {path}")
        if by:
            names = ", ".join(m["name"] if isinstance(m, dict) else Path(m).name for m in result["models"])
            write_figures(out / f"{name}.html", _TITLES[name], names, row_figures(result["rows"], by, caption))
    print_result(result, as_json, "\n".join(lines))
