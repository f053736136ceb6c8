"""What stands in the card's tables and lists, as text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.model_card.lineage import Lineage, Stage
from prism_nemo.checkpoint.model_card.markdown import number
from prism_nemo.checkpoint.model_card.results import THIS, Results
from prism_nemo.checkpoint.model_card.settings import kind, settings

NOT_MEASURED = "not measured"
_DOMAINS = ("math", "code", "science", "general", "long_context")


def stage_views(lineage: Lineage) -> list[dict[str, Any]]:
    """The stages as the template shows them."""
    return [
        {
            "name": stage.name,
            "kind": kind(stage, lineage.from_nothing and place == 0),
            "is_midtraining": stage.kind == "midtrain",
            "shares": [
                {
                    "source": row.source,
                    "domain": row.domain or "not on record",
                    "tokens": number(row.tokens),
                    "share": f"{row.share:.2%}",
                    "planned": "not on record" if row.planned is None else f"{row.planned:.2%}",
                    "epochs": "not on record" if row.epochs is None else f"{row.epochs:.4g}",
                }
                for row in stage.shares
            ],
            "outcome": _outcome(stage),
            "settings": settings(stage),
        }
        for place, stage in enumerate(lineage.stages)
    ]


def _outcome(stage: Stage) -> str:
    # The loss of RL is that of a surrogate objective and says nothing by itself.
    names = {"reward": "reward"} if stage.kind == "rl" else {"loss": "loss", "validation_loss": "loss on held-out text"}
    parts = []
    for key, name in names.items():
        value = stage.last.get(key)
        if isinstance(value, int | float) and math.isfinite(value):
            parts.append(f"{name} {value:.4g}")
    seconds = stage.last.get("seconds")
    if isinstance(seconds, int | float) and math.isfinite(seconds):
        parts.append(f"{seconds / 3600:.3g} hours")
    if stage.starts > 1:
        parts.append(f"started {stage.starts} times")
    return f"At its last line of the log: {', '.join(parts)}." if parts else ""


def evaluation_rows(found: Results) -> list[dict[str, str]]:
    """Scores: this model's first."""
    ordered = sorted(found.scores, key=lambda score: score.model != THIS)
    rows = []
    for score in ordered:
        loss = score.metric == "loss"

        def shown(value: float, loss: bool = loss) -> str:
            return f"{value:.4f}" if loss else f"{100 * value:.1f}"

        measured = score.low is not None and score.high is not None
        rows.append(
            {
                "model": score.model,
                "task": score.task,
                "domain": score.domain,
                "metric": score.metric + ("" if score.higher_is_better else " (lower is better)"),
                "score": shown(score.estimate),
                "interval": f"{shown(score.low)} to {shown(score.high)}" if measured else NOT_MEASURED,  # type: ignore[arg-type]
                "questions": "" if score.questions is None else str(score.questions),
                "samples": "" if score.samples is None else str(score.samples),
                "suite": f"{score.suite}, {score.split}",
            }
        )
    return rows


def retention_rows(found: Results) -> list[dict[str, str]]:
    """Lines of the retention reports."""
    rows = []
    for line in found.retention:
        scale, digits = (100.0, 2) if line.get("unit") == "share" else (1.0, 4)

        def shown(key: str, sign: str = "", line: Any = line, scale: float = scale, digits: int = digits) -> str:
            value = line.get(key)
            return f"{scale * value:{sign}.{digits}f}" if isinstance(value, int | float) else NOT_MEASURED

        rows.append(
            {
                "name": str(line.get("name")) + (f" ({line['kind']})" if line.get("kind") != "task" else ""),
                "base": shown("base"),
                "model": shown("model"),
                "change": shown("change", "+"),
                "interval": f"{shown('low', '+')} to {shown('high', '+')}",
                "verdict": str(line.get("verdict")),
            }
        )
    return rows


def limits(out: Path, lineage: Lineage, config: dict[str, Any]) -> list[str]:
    """What the model is not for, as far as the record tells."""
    found = ["It has the faults and biases of its base model and of its training data."]
    if not (out / "chat_template.jinja").is_file():
        found.append("It is not tuned to follow instructions or to chat, and has no chat template.")
    lengths = [s.config["seq_length"] for s in lineage.stages if isinstance(s.config.get("seq_length"), int)]
    declared = config.get("max_position_embeddings")
    if lengths and isinstance(declared, int) and max(lengths) < declared:
        found.append(
            f"These stages trained on rows of at most {max(lengths):,} tokens; the configuration allows {declared:,}. "
            "Abilities beyond the trained length may have been lost."
        )
    if any(stage.kind == "rl" for stage in lineage.stages):
        found.append(
            "Rewards checked final answers only: a right answer does not prove that the steps before it are right."
        )
    controls = [s.name for s in lineage.stages if s.config.get("control") not in (None, "none")]
    if controls:
        found.append(
            f"The reward of {', '.join(controls)} was a control and not that of the task: it is no model for use."
        )
    return found


def missing(lineage: Lineage, found: Results) -> list[str]:
    """What a reader might expect and nobody measured."""
    mine = [score for score in found.scores if score.model == THIS]
    gaps = []
    if not mine:
        gaps.append("Abilities: no evaluation of this model is on record.")
    elif all(score.domain for score in mine):
        have = {score.domain for score in mine}
        without = [domain.replace("_", " ") for domain in _DOMAINS if domain not in have]
        gaps += [f"Abilities in: {', '.join(without)}."] if without else []
    gaps += [
        f"The uncertainty of {score.task} ({score.metric}): it has no interval."
        for score in mine
        if score.low is None or score.high is None
    ]
    if not found.retention:
        gaps.append("Retention: which questions the base model could answer and this one cannot.")
    gaps += ["Other seeds: every stage was run once on this record.", "Safety, toxicity, bias and languages."]
    return gaps + [f"The record has a gap: {gap}." for gap in lineage.gaps]
