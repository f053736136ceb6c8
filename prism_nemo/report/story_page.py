"""The parts of the page, in the order in which people ask."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.report import (
    changed,
    costs,
    headline,
    learned,
    periodic,
    quickstart_parts,
    samples,
    scores,
    tree,
    trusted,
)
from prism_nemo.report.find import find
from prism_nemo.report.formatting import compact, decimal, percent, whole
from prism_nemo.report.model import Model
from prism_nemo.report.read import mapping, number, objects
from prism_nemo.report.story import Story, tell
from prism_nemo.report.summary import Summary
from prism_nemo.report.svg import nothing
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
    """Everything that `page.html.j2` shows; the gaps are complete once this returns."""

    def recorded(part: Callable[[Story, Summary], Iterable[Any]]) -> list[Any]:
        return [item for summary in story.summaries for item in part(story, summary)]

    averages, tasks = scores.score_figures(story)
    training, by_source = learned.training_figures(story)
    alone = _alone(story)
    return {
        "title": _title(story),
        "lede": _lede(story) if alone is None else headline.opening(alone),
        "headlines": [] if alone is None else headline.headlines(alone),
        "lineage": lineage_figure(story),
        "mixtures": recorded(quickstart_parts.mixture_figures),
        "averages": averages,
        "tasks": tasks,
        "samples": samples.collect(story),
        "retention": recorded(quickstart_parts.text_loss_figures) + scores.retention_figures(story),
        "tiles": recorded(quickstart_parts.cost_facts),
        "cost": costs.cost_table(story),
        "jobs": costs.job_table(story),
        "timelines": recorded(quickstart_parts.parts_figure) + _timeline(story),
        "training": training,
        "by_source": by_source,
        "rl": learned.rl_figures(story),
        "periodic": periodic.figures(story),
        "weights": changed.weight_figures(story),
        "cka": changed.cka_figures(story),
        "path": changed.path_figures(story),
        "effects": recorded(quickstart_parts.expected_effects),
        "found_verdicts": trusted.verdicts(story),  # `verdicts` is the macro that shows them
        "events": trusted.events(story),
        "repeat": trusted.repeat(story) + recorded(quickstart_parts.repeat_table),
        "seeds": _seeds(story),
    }


def lineage_figure(story: Story) -> Figure:
    """Draws what was made from what, with the newest step, the tokens and the score of each."""
    lines, rows = [], []
    for model in story.models:
        amount, score = _amount(model), _score(model)
        lines.append((model.what, *(model.lines or (amount, score))))
        above = ", ".join(story.models[parent].name for parent in model.parents) or "–"
        rows.append((model.name, model.what, above, amount, score, str(model.path)))
    title = "Where each model comes from"
    models = story.models
    of_models = [[getattr(model, name) for model in models] for name in ("name", "style", "parents")]
    svg = tree.draw(of_models[0], lines, *of_models[1:]) if models else nothing(1000, title)
    if story.found.exports:
        known = {model.path for model in story.models}
        others = [path for path in story.found.exports if path not in known]
        rows += [(path.name, "Hugging Face folder", "–", "–", "–", str(path)) for path in others]
    elif not story.summaries:
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
    if story.summaries:
        caption += " Beside the mean accuracy over the task families stands the loss on general text."
    columns = ("model", "by", "from", "trained on", "score", "folder")
    return Figure(title, svg, caption, Table(columns, rows, "Lineage"), wide=True)


def grouped(gaps: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """What was not measured, by the command that measures it: one line for many stages reads better than one each."""
    found: dict[str, list[str]] = {}
    for what, command in gaps:
        found.setdefault(command, []).append(what)
    return [("; ".join(whats), command) for command, whats in found.items()]


def _seeds(story: Story) -> int:
    """Most seeds that one kind of run was done with from the same parents: stages of one chain are no repetitions."""
    found: dict[tuple[object, ...], set[str]] = {}
    for model, run in story.runs:
        if "seed" in run.config:
            found.setdefault((model.role, *model.parents), set()).add(str(run.config["seed"]))
    return max(map(len, found.values()), default=0)


def _timeline(story: Story) -> list[Figure]:
    """The starts of the stages in time, unless a quickstart's parts say the same: all its stages, each started once."""
    timeline = costs.timeline(story)
    of_parts = {
        id(model)
        for summary in story.summaries
        if objects(summary.content.get("timeline"))
        for model in summary.models.values()
    }
    if all(id(model) in of_parts and len(costs.slices(run)) < 2 for model, run in story.runs):
        return []
    return [timeline] if timeline is not None else []


def _alone(story: Story) -> Summary | None:
    """The quickstart that all runs belong to, if there is one."""
    if len(story.summaries) != 1:
        return None
    mine = {id(model) for model in story.summaries[0].models.values()}
    return story.summaries[0] if all(id(model) in mine for model, _ in story.runs) else None


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
        averages = mapping(content.get("averages"))
        for key in ("domain_weighted", "plain_mean"):
            value = number(mapping(averages.get(key)).get("estimate"))
            if value is not None and model.text_loss is not None:
                return f"{percent(value)} right, loss {decimal(model.text_loss)}"
            if value is not None:
                return f"{content.get('suite')}: {percent(value)}"
    if model.run is not None:
        for key in ("reward", "loss"):
            values = model.run.series(key)[1]
            if len(values):
                return f"last {key} {decimal(float(values[-1]))}"
    return "not evaluated"


def _title(story: Story) -> str:
    if _alone(story) is not None:
        return "What did mid-training do, and what did RL add?"
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
