"""The page of any runs: its parts in the order in which people ask."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prism_nemo.report import changed, costs, learned, scores, tree, trusted
from prism_nemo.report.find import find
from prism_nemo.report.formatting import compact, decimal, percent, whole
from prism_nemo.report.read import mapping, number
from prism_nemo.report.story import Model, Story, tell
from prism_nemo.report.view import Figure, Table


def read_story(directories: Sequence[Path]) -> Story:
    """Reads folders and ties what is in them together.

    Args:
        directories: Run directories, results, or folders that hold such.

    Raises:
        InputError: If one is no folder, or none holds anything that a report can be made of.
    """
    return tell(find(directories))


def parts(story: Story) -> dict[str, Any]:
    """Everything that `runs.html.j2` shows; the gaps are complete once this returns."""
    averages, tasks = scores.score_figures(story)
    training, by_source = learned.training_figures(story)
    return {
        "title": _title(story),
        "lede": _lede(story),
        "lineage": lineage_figure(story),
        "averages": averages,
        "tasks": tasks,
        "retention": scores.retention_figures(story),
        "cost": costs.cost_table(story),
        "timeline": costs.timeline(story),
        "training": training,
        "by_source": by_source,
        "rl": learned.rl_figures(story),
        "weights": changed.weight_figures(story),
        "cka": changed.cka_figures(story),
        "path": changed.path_figures(story),
        "found_verdicts": trusted.verdicts(story),  # `verdicts` is the macro that shows them
        "events": trusted.events(story),
        "repeat": trusted.repeat(story),
        "seeds": len({str(run.config["seed"]) for _, run in story.runs if "seed" in run.config}),
    }


def lineage_figure(story: Story) -> Figure:
    """Draws what was made from what, with the newest step, the tokens and the score of each."""
    lines, rows = [], []
    for model in story.models:
        amount, score = _amount(model), _score(model)
        lines.append((model.what, amount, score))
        above = ", ".join(story.models[parent].name for parent in model.parents) or "–"
        rows.append((model.name, model.what, above, amount, score, str(model.path)))
    svg = tree.draw(
        [model.name for model in story.models],
        lines,
        [model.style for model in story.models],
        [model.parents for model in story.models],
    )
    if story.found.exports:
        known = {model.path for model in story.models}
        others = [path for path in story.found.exports if path not in known]
        rows += [(path.name, "Hugging Face folder", "–", "–", "–", str(path)) for path in others]
    else:
        story.missing("The exported Hugging Face checkpoint", "prism-nemo export CHECKPOINT --out HF_DIR")
    for model in story.models:
        if model.role == "hf" and not model.parents:
            story.missing(
                f"{model.name}: what it was exported from", "prism-nemo eval RUN/checkpoints/step_N --suite SUITE"
            )
    caption = (
        "An arrow leads from a model to what was made from it; a dashed one from a further parent of a merge. A model "
        "without one has no recorded origin. Each model keeps its colour and its mark in every chart below."
    )
    columns = ("model", "by", "from", "trained on", "score", "folder")
    return Figure("Where each model comes from", svg, caption, Table(columns, rows, "Lineage"), wide=True)


def _amount(model: Model) -> str:
    if model.run is None:
        return "given" if model.role == "base" else "–"
    steps = model.run.series("loss")[0].tolist()
    planned = number(model.run.config.get("train_steps"))
    last = steps[-1] if steps else 0.0
    of = f" of {whole(planned)}" if planned is not None and last < planned else ""
    tokens = costs.tokens_of(model.run)
    return f"{last:,.0f}{of} steps" + (f", {compact(tokens)} tokens" if tokens is not None else "")


def _score(model: Model) -> str:
    for _, content in reversed(model.evaluations):
        value = number(mapping(mapping(content.get("averages")).get("domain_weighted")).get("estimate"))
        if value is not None:
            return f"{content.get('suite')}: {percent(value)}"
    if model.run is not None:
        for key in ("reward", "loss"):
            values = model.run.series(key)[1]
            if len(values):
                return f"last {key} {decimal(float(values[-1]))}"
    return "not evaluated"


def _title(story: Story) -> str:
    if len(story.runs) == 1:
        return f"{story.runs[0][0].name}: how it went"
    return "What did each stage do?"


def _lede(story: Story) -> str:
    kinds = {
        "runs": len(story.runs),
        "evaluations": sum(len(model.evaluations) for model in story.models),
        "retention reports": len(story.found.of("retention")),
        "analyses": sum(len(story.found.of(kind)) for kind in ("weights", "cka", "path")),
    }
    said = ", ".join(f"{count} {_one(name) if count == 1 else name}" for name, count in kinds.items() if count)
    return (
        f"Read from {said}. Nothing here was computed anew: every number was recorded by the command that measured it."
    )


def _one(name: str) -> str:
    return "analysis" if name == "analyses" else name[:-1]
