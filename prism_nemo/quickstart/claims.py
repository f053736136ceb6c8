"""What the quickstart is expected to show, checked against what this run measured."""

from __future__ import annotations

from typing import Any


def _compare(stages: dict[str, Any], before: str, after: str) -> dict[str, str]:
    """Per task: 'higher' or 'lower' where the 95 % intervals are apart, else 'no clear difference'."""
    result = {}
    for task, b in stages[after]["tasks"].items():
        a = stages[before]["tasks"][task]
        if b["ci95"][0] > a["ci95"][1]:
            result[task] = "higher"
        elif b["ci95"][1] < a["ci95"][0]:
            result[task] = "lower"
        else:
            result[task] = "no clear difference"
    return result


def _detail(stages: dict[str, Any], before: str, after: str) -> str:
    parts = []
    for task, b in stages[after]["tasks"].items():
        a = stages[before]["tasks"][task]
        parts.append(f"{task} {100 * a['accuracy']:.1f} % to {100 * b['accuracy']:.1f} %")
    return ", ".join(parts)


def expected_claims(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """The three expected effects, on sampled accuracy, each with whether it holds in this run."""
    mid = _compare(stages, "base", "midtrained")
    start = _compare(stages, "base_rl", "prism_rl")
    rl = _compare(stages, "midtrained", "prism_rl")
    return [
        {
            "claim": "Mid-training beats the base on every task family, with intervals apart",
            "holds": all(v == "higher" for v in mid.values()),
            "detail": _detail(stages, "base", "midtrained"),
        },
        {
            "claim": "RL from the mid-trained model beats RL from the base on every family, with intervals apart",
            "holds": all(v == "higher" for v in start.values()),
            "detail": _detail(stages, "base_rl", "prism_rl"),
        },
        {
            "claim": "RL lifts sampled accuracy on at least one family with intervals apart, and loses on none",
            "holds": "higher" in rl.values() and "lower" not in rl.values(),
            "detail": _detail(stages, "midtrained", "prism_rl"),
        },
    ]
