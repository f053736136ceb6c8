"""Writing the card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.checkpoint.model_card.content import evaluation_rows, limits, missing, retention_rows, stage_views
from prism_nemo.checkpoint.model_card.licence import Base, describe_base
from prism_nemo.checkpoint.model_card.lineage import Lineage, trace
from prism_nemo.checkpoint.model_card.markdown import environment, plain
from prism_nemo.checkpoint.model_card.results import THIS, Owners, Results, read_results
from prism_nemo.errors import InputError

CARD = "README.md"
MARKER = "<!-- Written by prism-nemo from the run directories; written anew by the same command. -->"


def refuse_existing_card(out: Path, overwrite: bool = False) -> None:
    """Refuse to lose a card that a person wrote, before anything starts.

    A card that prism-nemo wrote is told by a comment below its metadata, and may be written anew; whoever edits one and
    wants to keep it removes that comment.

    Args:
        out: Folder of the export.
        overwrite: Whether any card may go.

    Raises:
        InputError: If there is a card of somebody else's.
    """
    card = out / CARD
    if card.is_file() and not overwrite and MARKER not in card.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{card}: was not written by prism-nemo; give --overwrite-card to replace it, or move it away")


def write_model_card(
    out: Path, checkpoint: Path, results: Sequence[Path] = (), overwrite: bool = False, search: bool = True
) -> Path:
    """Write ``README.md`` into an exported folder.

    Args:
        out: Folder of the export, which exists.
        checkpoint: Native checkpoint that was exported.
        results: Folders with ``evaluation.json``, ``retention.json`` or a quickstart's ``summary.json``.
        overwrite: Replace a card that somebody else wrote.
        search: Look for more results beside the run directory; those of other models are left out.

    Returns:
        The card.

    Raises:
        InputError: For a folder, checkpoint or result that cannot be used; nothing was written.
    """
    if not (out / "config.json").is_file():
        raise InputError(f"{out}: is no exported Hugging Face folder (config.json is missing)")
    refuse_existing_card(out, overwrite)
    lineage = trace(checkpoint)
    base = describe_base(lineage)
    owners = Owners(lineage, checkpoint, out, base.folder if base else None)
    near = lineage.stages[-1].directory.parent if search and lineage.stages else None
    found = read_results(results, near, owners, lineage)
    write_text(out / CARD, render(out, lineage, base, found))
    return out / CARD


def render(out: Path, lineage: Lineage, base: Base | None, found: Results) -> str:
    """The card as text.

    Args:
        out: Folder of the export.
        lineage: Of the checkpoint.
        base: The base model, if it is known.
        found: Results.
    """
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    stages = stage_views(lineage)
    retention = retention_rows(found)
    versions = lineage.stages[-1].versions if lineage.stages else {}
    names = ("prism-nemo", "megatron-core", "torch", "transformers")
    return environment().get_template("card.md.j2").render(
        metadata=Markup(metadata(out, lineage, base, found, config)),
        marker=Markup(MARKER),
        comma=Markup(", "),
        name=out.name,
        load_name=Markup(json.dumps(plain(out.name))),
        architecture=(config.get("architectures") or ["a causal language model"])[0],
        parameters=_parameters(out),
        base=base,
        from_nothing=lineage.from_nothing,
        stages=stages,
        loading=_loading(out, lineage, config),
        scores=evaluation_rows(found),
        marks=list(dict.fromkeys(found.marks)),
        retention=retention,
        against=", ".join(dict.fromkeys(str(line.get("against")) for line in found.retention)),
        held_out=any(score.model == THIS and score.metric == "loss" for score in found.scores),
        limits=limits(out, lineage, config),
        missing=missing(lineage, found),
        versions=[(name, versions[name]) for name in names if name in versions],
    )  # fmt: skip


def metadata(out: Path, lineage: Lineage, base: Base | None, found: Results, config: dict[str, Any]) -> str:
    """The card's YAML between its two lines of dashes, as the hub reads it.

    What is not known has no key: the hub shows a licence, a language or a base model as a fact.
    """
    from huggingface_hub import EvalResult, ModelCardData

    kinds = {stage.kind for stage in lineage.stages}
    tags = ["prism-nemo", str(config.get("model_type", ""))]
    tags += ["mid-training"] if "midtrain" in kinds and not (lineage.from_nothing and len(lineage.stages) == 1) else []
    tags += ["reinforcement-learning", "grpo"] if "rl" in kinds else []
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=plain(score.task),
            dataset_name=plain(score.task),
            dataset_split=score.split,
            metric_type=plain(score.metric),
            metric_value=score.estimate,
            metric_name=_metric_name(score.metric, score.low, score.high),
            metric_args={"low": score.low, "high": score.high, "questions": score.questions, "samples": score.samples},
        )
        for score in found.scores
        if score.model == THIS
    ]
    known: dict[str, Any] = {}
    if base is not None:
        known = {
            "base_model": base.hub_id,
            "license": base.licence,
            "license_name": base.licence_name,
            "license_link": base.licence_link,
            "language": list(base.languages) or None,
        }
    data = ModelCardData(
        model_name=plain(out.name),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[tag for tag in tags if tag],
        eval_results=results or None,
        **{key: value for key, value in known.items() if value},
    )
    return f"---\n{data.to_yaml()}\n---"


def _metric_name(metric: str, low: float | None, high: float | None) -> str:
    interval = "no interval" if low is None or high is None else f"95 % interval {low:.4g} to {high:.4g}"
    return f"{plain(metric)} ({interval})"


def _parameters(out: Path) -> str:
    """Number of weights in the folder's files, read from their headers."""
    from safetensors import safe_open

    count = 0
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                size = 1
                for length in file.get_slice(name).get_shape():
                    size *= length
                count += size
    return f"{count:,}"


def _loading(out: Path, lineage: Lineage, config: dict[str, Any]) -> list[str]:
    notes = []
    if not any((out / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        notes.append("No tokenizer came with the checkpoint: take that of the base model.")
    if (out / "chat_template.jinja").is_file():
        notes.append("The chat template is that of the tokenizer that it came with; training did not use it.")
    if lineage.stages and lineage.stages[-1].kind == "rl":
        rewards = lineage.stages[-1].config.get("rewards")
        if isinstance(rewards, dict) and rewards.get("gate") == "think":
            notes.append(
                "Reinforcement learning asked for worked answers inside think tags; prompts end by opening one."
            )
    if config.get("model_type") == "nemotron_h":
        notes.append("transformers clamps the step size of the Mamba mixers from below; training did not.")
    return notes
