"""The one command. Thin: parse, call the library, print.

Exit codes are a contract: 0 done; 1 the work failed; 2 the input or configuration is wrong and nothing was started;
75 stopped early on request with a checkpoint saved (run the same command again).
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from prism_nemo.commands.analyze import analyze_app, merge
from prism_nemo.commands.evaluate import evaluate, regrade, retention, select
from prism_nemo.commands.printing import Json, Pp, Tp, is_main, print_result, say, show_rich
from prism_nemo.commands.status import status
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
prompts_app = typer.Typer(no_args_is_help=True, help="Choose the prompts of an RL stage.")
app.add_typer(prompts_app, name="prompts")
rollouts_app = typer.Typer(no_args_is_help=True, help="Read what a policy wrote and how it was scored.")
app.add_typer(rollouts_app, name="rollouts")
app.add_typer(analyze_app, name="analyze")


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
    summary = Quickstart(out, PocketSettings(), say).run()
    lines = [f"{'holds' if c['holds'] else 'does NOT hold'}: {c['claim']} ({c['detail']})" for c in summary["expected"]]
    lines.append(f"{summary['seconds']:.0f} s, {summary['peak_rss_gb']:.1f} GB; open {out / 'report.html'}")
    print_result(summary, as_json, "\n".join(lines))


@data_app.command("build")
def data_build(
    mixture: Annotated[Path, typer.Argument(help="Mixture YAML.")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json or a Hugging Face folder.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 takes as many as there are cores.")] = 0,
    shard: Annotated[
        str | None, typer.Option(help="i/n, i from 0: one task of a Slurm array; run once without it to join.")
    ] = None,
    keep_parts: Annotated[
        bool, typer.Option("--keep-parts", help="Keep what a later build needs to redo only changed stretches.")
    ] = False,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder: refuse a tokenizer with more tokens than the model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read, filter, deduplicate, decontaminate and tokenise a mixture into Megatron's indexed datasets."""
    from prism_nemo.data.build import build_mixture, build_shard
    from prism_nemo.data.mixture_file import load_mixture
    from prism_nemo.data.progress import show_progress
    from prism_nemo.data.tokenizer import check_vocabulary, load_tokenizer

    part = _shard(shard)
    plan, encoder = load_mixture(mixture), load_tokenizer(tokenizer)
    if model is not None:
        check_vocabulary(encoder, model)
    workers = workers or len(os.sched_getaffinity(0))
    with show_progress(say) as (tell, watch):
        if part is not None:
            units = build_shard(plan, encoder, out, part, progress=tell, workers=workers, watch=watch)
            print_result({"shard": shard, "units": units}, as_json, f"{out}: {units} units")
            return
        manifest = build_mixture(plan, encoder, out, progress=tell, workers=workers, keep_parts=keep_parts, watch=watch)
    tokens = sum(source.tokens for source in manifest.sources)
    text = f"{out}: {len(manifest.sources)} sources, {tokens:,} tokens; look at it with: prism-nemo data show {out}"
    print_result({**json.loads(manifest.to_json()), "rebuilt": manifest.rebuilt}, as_json, text)


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
    if match is None:
        raise InputError(f"--shard '{text}': expected i/n, such as 0/8")
    return int(match[1]), int(match[2])


@data_app.command("show")
def data_show(
    folder: Annotated[Path, typer.Argument(help="Folder written by `data build`.")],
    tokens: Annotated[float, typer.Option(help="Tokens that a run would train on; default one pass of all.")] = 0,
    seq_length: Annotated[int, typer.Option(help="Tokens per sample.")] = 8192,
    packing: Annotated[str, typer.Option(help="best_fit or concatenate.")] = "best_fit",
    as_json: Json = False,
) -> None:
    """Documents, tokens, planned and realised shares and epochs; refuses a run that repeats a source too often."""
    from prism_nemo.data.build import load_manifest
    from prism_nemo.data.show import MIN_WIDTH, show, tree

    view = show(load_manifest(folder), tokens, seq_length, packing)
    if as_json:
        typer.echo(json.dumps(view))
    else:
        show_rich(tree(view), MIN_WIDTH)
    if view["refused"] is not None:
        raise InputError(f"{folder}: the run would repeat sources too often: {view['refused']}")


@app.command("import")
def import_(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder, or a model of the hub such as org/name.")],
    out: Annotated[Path, typer.Option(help="Checkpoint to write.")],
    tp: Tp = 1,
    pp: Pp = 1,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse weights that are NaN or infinite.")] = False,
    dt_floor: Annotated[
        float | None, typer.Option(help="nemotron_h only: smallest step size of the Mamba mixers; default none.")
    ] = None,
) -> None:
    """Hugging Face folder to native checkpoint (loads at any layout), types kept."""
    from prism_nemo.checkpoint.convert import import_hf, refuse_existing
    from prism_nemo.checkpoint.hub import local_folder, source_name
    from prism_nemo.checkpoint.native import read_architecture
    from prism_nemo.models.catalog_view import catalog_notes

    refuse_existing(out)
    folder = local_folder(hf_dir)
    report = import_hf(folder, out, _layout(tp, pp), strict, dt_floor, source_name(hf_dir, folder))
    if not is_main():
        return
    for name in report.not_finite:
        say(f"prism-nemo: warning: tensor '{name}' holds NaN or infinity")
    if report.skipped:
        say(f"prism-nemo: {len(report.skipped)} buffers that are no weights were left out: {report.skipped[0]}, ...")
    for note in catalog_notes(read_architecture(out)):
        say(f"prism-nemo: {note}")
    typer.echo(f"{out}: imported from {hf_dir}; check it with: prism-nemo verify {hf_dir} {out}")


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    out: Annotated[Path, typer.Option(help="Hugging Face folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default as stored.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder whose tokenizer files are copied; default those that came with the import."),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Size of a file, such as 5GB or 500MB.")] = "5GB",
    push_to: Annotated[str | None, typer.Option(help="Upload to the hub as org/name (made private if new).")] = None,
) -> None:
    """Native checkpoint to Hugging Face folder."""
    import torch

    from prism_nemo.checkpoint.convert import export_hf
    from prism_nemo.checkpoint.hub import prepare_upload, upload
    from prism_nemo.checkpoint.native import read_architecture

    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype is not None and dtype not in dtypes:
        raise InputError(f"--dtype '{dtype}' is unknown; choose one of {', '.join(dtypes)}")
    if tokenizer is not None and not tokenizer.is_dir():
        raise InputError(f"--tokenizer {tokenizer}: no such folder")
    limit = _size(max_shard_size)
    if push_to is not None and is_main():
        read_architecture(checkpoint)
        prepare_upload(push_to)
    export_hf(checkpoint, out, dtypes[dtype] if dtype else None, tokenizer, limit)
    if not is_main():
        return
    if push_to is not None:
        upload(out, push_to)
    typer.echo(f"{out}: exported from {checkpoint}; check it with: prism-nemo verify {out} {checkpoint}")


def _size(text: str) -> int:
    """Bytes of a size such as ``5GB`` (powers of ten, as the hub counts)."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise InputError(f"--max-shard-size '{text}': expected a size such as 5GB or 500MB")
    return size


@app.command()
def verify(
    hf_dir: Annotated[Path, typer.Argument(help="Hugging Face folder, or a model of the hub such as org/name.")],
    checkpoint: Annotated[Path, typer.Argument(help="Native checkpoint.")],
    tp: Tp = 1,
    pp: Pp = 1,
    card: Annotated[Path | None, typer.Option(help="Verification card (YAML) to write or to add to.")] = None,
    as_json: Json = False,
) -> None:
    """Compare every weight bit for bit, then forward both models on the same tokens (fp32)."""
    from prism_nemo.checkpoint.card import read_card, write_card
    from prism_nemo.checkpoint.hub import local_folder
    from prism_nemo.checkpoint.native import read_architecture
    from prism_nemo.checkpoint.verification import verify as run_verify

    if card is not None:
        read_card(card)
    result = run_verify(local_folder(hf_dir), checkpoint, _layout(tp, pp))
    if is_main():
        if card is not None:
            # Names, not paths: a card is read on other machines.
            command = f"prism-nemo verify {hf_dir.name} {checkpoint.name} --tp {tp} --pp {pp} --card {card.name}"
            family = read_architecture(checkpoint).family
            write_card(card, card.stem, family, result, _layout(tp, pp), command)
        weights = f"{len(result.different_tensors)} of {result.tensors} tensors differ"
        if result.different_tensors:
            weights += f" ({', '.join(result.different_tensors[:3])})"
        if result.cast:
            weights += f" after {', '.join(result.cast)}"
        verdict = "equal within tolerance" if result.passed else "DIFFERENT"
        lines = [
            f"{weights}; logits differ by {result.rms_logit_diff:.1e} rms (tolerance {result.rms_tolerance:.1e}) and "
            f"{result.max_abs_logit_diff:.1e} at most (tolerance {result.tolerance:.1e}; logit std "
            f"{result.logit_std:.2f}, same top token {result.argmax_agreement:.1%} of {result.tokens}): "
            f"{verdict}",
            *(f"note: {note}" for note in result.notes),
        ]
        print_result(result.to_dict(), as_json, "\n".join(lines))
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


@app.command()
def models(
    name: Annotated[str | None, typer.Argument(help="Short name or Hub id; all if none is given.")] = None,
    as_json: Json = False,
) -> None:
    """The models that this project is made for: sizes, layouts that fit, and what is not sure about them."""
    from prism_nemo.models.catalog import CATALOG, find
    from prism_nemo.models.catalog_view import MIN_WIDTH, detail, overview, to_dict

    model = find(name) if name is not None else None
    if as_json:
        typer.echo(json.dumps([to_dict(m) for m in CATALOG.values()] if model is None else to_dict(model)))
    else:
        show_rich(overview(CATALOG.values()) if model is None else detail(model), MIN_WIDTH)


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe (.py) or a resolved config.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, by dotted name.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Name of the catalog or Hugging Face folder, in place of a checkpoint.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Default as many as the recipe's layout has.")] = None,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    assume: Annotated[list[str] | None, typer.Option(help="key=value of an assumption; may be repeated.")] = None,
    rehearsal: Annotated[
        bool, typer.Option("--rehearse", help="Build every rank at full size without memory, and count.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Memory, time and layouts of a run before any GPU hour is spent; refuses what does not fit."""
    from prism_nemo.planning.plan import make_plan, to_dict
    from prism_nemo.planning.show import MIN_WIDTH, plan_view

    found = make_plan(recipe, overrides or [], model, gpus, gpu, assume, rehearsal)
    if as_json:
        typer.echo(json.dumps(to_dict(found)))
    else:
        show_rich(plan_view(found), MIN_WIDTH)
    if found.refusal is not None:
        raise InputError(found.refusal)


app.command("eval")(evaluate)
app.command()(regrade)
app.command()(select)
app.command()(retention)
app.command()(merge)
app.command()(status)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine offers, which kernel each part will use, and what is missing."""
    from prism_nemo.runtime.doctor import diagnose
    from prism_nemo.runtime.doctor_view import MIN_WIDTH, doctor_view

    found = diagnose()
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        show_rich(doctor_view(found), MIN_WIDTH)


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
        if isinstance(error, RuntimeError) and "transformer-engine" in str(error) and "meta package" in str(error):
            # Raised by Megatron-Core's `import transformer_engine`, which expects ImportError at most.
            typer.echo(f"prism-nemo: {error}; see: prism-nemo doctor", err=True)
            sys.exit(2)
        raise


if __name__ == "__main__":
    main()
