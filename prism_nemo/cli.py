"""The one command. Thin: parse, call the library, print.

Exit codes are a contract: 0 done; 1 the work failed; 2 the input or configuration is wrong and nothing was started;
75 stopped early on request with a checkpoint saved (run the same command again).
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from prism_nemo.errors import InputError, PrismError
from prism_nemo.quiet import quiet

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Retention-aware mid-training and verifiable-reward RL of open language models on Megatron-Core.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build and look at token data.")
app.add_typer(data_app, name="data")
analyze_app = typer.Typer(no_args_is_help=True, help="What a stage changed inside the model.")
app.add_typer(analyze_app, name="analyze")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Tp = Annotated[int, typer.Option("--tp", min=1, help="tensor_model_parallel_size")]
Pp = Annotated[int, typer.Option("--pp", min=1, help="pipeline_model_parallel_size")]


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _print(result: Any, as_json: bool, text: str) -> None:
    typer.echo(json.dumps(result) if as_json else text)


def _layout(tp: int, pp: int) -> Any:
    from prism_nemo.config import ParallelConfig

    return ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/quickstart"),
    family: Annotated[str, typer.Option(help="Model family.")] = "llama",
    as_json: Json = False,
) -> None:
    """The whole pipeline at pocket size on this machine, ending in a report."""
    from prism_nemo.models.family import family_named
    from prism_nemo.quickstart.pipeline import Quickstart
    from prism_nemo.quickstart.settings import PocketSettings

    family_named(family)
    if family != "llama":
        raise InputError(f"--family '{family}': there is no pocket-size setting for it; choose llama")
    summary = Quickstart(out, PocketSettings(), _say).run()
    lines = [f"{'holds' if c['holds'] else 'does NOT hold'}: {c['claim']} ({c['detail']})" for c in summary["expected"]]
    lines.append(f"{summary['seconds']:.0f} s, {summary['peak_rss_gb']:.1f} GB; open {out / 'report.html'}")
    _print(summary, as_json, "\n".join(lines))


@data_app.command("build")
def data_build(
    mixture: Annotated[Path, typer.Argument(help="Mixture YAML.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json or a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Tokenise the sources of a mixture into Megatron's indexed datasets."""
    from prism_nemo.data.build import build_mixture
    from prism_nemo.data.mixture import load_mixture
    from prism_nemo.data.tokenizer import load_tokenizer

    manifest = build_mixture(load_mixture(mixture), load_tokenizer(tokenizer), out, progress=_say)
    tokens = sum(source.tokens for source in manifest.sources)
    typer.echo(f"{out}: {len(manifest.sources)} sources, {tokens:,} tokens")


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(help="Folder written by `data build`.")],
    tokens: Annotated[float, typer.Option(help="Tokens that a run would train on; default one pass of all.")] = 0,
    as_json: Json = False,
) -> None:
    """Realised mixture and epochs per source."""
    from prism_nemo.data.build import describe, load_manifest

    manifest = load_manifest(folder)
    rows = describe(manifest, tokens or sum(s.tokens for s in manifest.sources if s.weight > 0))
    lines = [f"{'source':<24} {'domain':<10} {'share':>7} {'tokens':>15} {'epochs':>8}"]
    for r in rows:
        lines.append(f"{r.name:<24} {r.domain:<10} {r.share:>6.1%} {r.available_tokens:>15,} {r.epochs:>8.2f}")
    _print([asdict(r) for r in rows], as_json, "\n".join(lines))


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    tp: Tp = 1,
    pp: Pp = 1,
) -> None:
    """Hugging Face folder to native checkpoint (loads at any layout)."""
    from prism_nemo.checkpoint.convert import import_hf

    import_hf(hf_dir, out, _layout(tp, pp))
    typer.echo(f"{out}: imported from {hf_dir}; check it with: prism-nemo verify {hf_dir} {out}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write.")],
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder whose tokenizer files are copied.")] = None,
) -> None:
    """Native checkpoint to Hugging Face folder."""
    import torch

    from prism_nemo.checkpoint.convert import export_hf

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if dtype not in dtypes:
        raise InputError(f"--dtype '{dtype}' is unknown; choose one of {', '.join(dtypes)}")
    if tokenizer is not None and not tokenizer.is_dir():
        raise InputError(f"--tokenizer {tokenizer}: no such folder")
    export_hf(checkpoint, out, dtypes[dtype], tokenizer)
    typer.echo(f"{out}: exported from {checkpoint}; check it with: prism-nemo verify {out} {checkpoint}")


@app.command()
def verify(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    tp: Tp = 1,
    pp: Pp = 1,
    as_json: Json = False,
) -> None:
    """Forward both models on the same tokens and compare logits (fp32)."""
    from prism_nemo.checkpoint.convert import verify as run_verify

    result = run_verify(hf_dir, checkpoint, _layout(tp, pp))
    verdict = "equal within tolerance" if result.passed else "DIFFERENT"
    _print(
        {**asdict(result), "passed": result.passed},
        as_json,
        f"largest logit difference {result.max_abs_logit_diff:.2e} (tolerance {result.tolerance:.1e}, logit std "
        f"{result.logit_std:.2f}, same top token {result.argmax_agreement:.1%} of {result.tokens}): {verdict}",
    )
    if not result.passed:
        raise PrismError(f"{checkpoint} does not compute the same function as {hf_dir}")


@app.command()
def midtrain(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.py) or a resolved config.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, by dotted name.")] = None,
) -> None:
    """Run or continue a mid-training stage."""
    from prism_nemo.config import MidtrainConfig
    from prism_nemo.training.midtrain import check
    from prism_nemo.training.midtrain import midtrain as run

    config = _recipe(recipe, "midtrain", MidtrainConfig, overrides or [])
    check(config)
    _stage(run, config, "midtrain")


@app.command()
def rl(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.py) or a resolved config.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, by dotted name.")] = None,
) -> None:
    """Run or continue an RL stage."""
    from prism_nemo.config import RLConfig
    from prism_nemo.rl.train import check, train

    config = _recipe(recipe, "rl", RLConfig, overrides or [])
    check(config)
    _stage(train, config, "rl")


def _recipe(path: Path, name: str, schema: type, overrides: list[str]) -> Any:
    from prism_nemo.recipe import load_recipe

    return load_recipe(path, name, schema, overrides)


def _stage(function: Any, config: Any, name: str) -> None:
    """Run in the processes that torchrun or Slurm started; start them here otherwise."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        result = function(config, name)
    else:
        from prism_nemo.runtime.launch import launch

        result = launch(function, config, name, processes=config.parallel.world_size)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(json.dumps(result))


@app.command("eval")
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    tokenizer: Annotated[Path, typer.Option(help="Tokenizer folder.")],
    suite: Annotated[str, typer.Option(help="Only 'pocket': procedural tasks.")] = "pocket",
    questions: Annotated[int, typer.Option(min=1, help="Questions per task.")] = 512,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    as_json: Json = False,
) -> None:
    """Accuracy on held-out verifiable tasks, with 95 % intervals."""
    from prism_nemo.checkpoint.native import read_architecture
    from prism_nemo.data.tokenizer import load_tokenizer
    from prism_nemo.evaluation.tasks import EvaluationConfig, evaluate_checkpoint
    from prism_nemo.quickstart.settings import TASKS
    from prism_nemo.rl.rewards.task import SPLITS
    from prism_nemo.runtime.launch import launch

    if suite != "pocket":
        raise InputError(f"--suite '{suite}' is unknown; known: pocket")
    if split not in SPLITS:
        raise InputError(f"--split '{split}' is unknown; choose one of {', '.join(SPLITS)}")
    read_architecture(checkpoint)
    load_tokenizer(tokenizer)
    config = EvaluationConfig(str(tokenizer), list(TASKS), split=split, questions=questions)
    result = launch(evaluate_checkpoint, config, str(checkpoint))
    lines = [
        f"{name:<14} {r['accuracy']:>6.1%}  [{r['ci95'][0]:.1%}, {r['ci95'][1]:.1%}]  greedy {r['greedy_accuracy']:.1%}"
        f"  n={r['n']}"
        for name, r in result["tasks"].items()
    ]
    _print(result, as_json, "\n".join(lines))


@analyze_app.command("weights")
def analyze_weights(
    before: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    after: Annotated[Path, typer.Argument(help="Hugging Face folder.")],
    as_json: Json = False,
) -> None:
    """How much the weights changed, in total and per component."""
    from prism_nemo.analysis.weights import compare_weights

    result = compare_weights(before, after).to_dict()
    lines = [
        f"{'total':<12} changed > 1 %: {result['changed_fraction_1pct']:.1%}  relative L2: {result['relative_l2']:.4f}"
    ]
    for name, part in result["by_component"].items():
        lines.append(
            f"{name:<12} changed > 1 %: {part['changed_fraction_1pct']:.1%}  relative L2: {part['relative_l2']:.4f}"
        )
    _print(result, as_json, "\n".join(lines))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder of a quickstart run.")],
) -> None:
    """Write the page that people look at."""
    from prism_nemo.report.page import write_report

    typer.echo(str(write_report(run)))


def main() -> None:
    """Entry point: errors become one message and the exit code that they mean."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    quiet()
    try:
        app(standalone_mode=False)
    except PrismError as error:
        typer.echo(f"prism-nemo: {error}", err=True)
        sys.exit(error.exit_code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        usage = getattr(error, "exit_code", None)
        if usage is not None and hasattr(error, "format_message"):
            typer.echo(f"prism-nemo: {error.format_message()}", err=True)
            sys.exit(usage)
        raise


if __name__ == "__main__":
    main()
