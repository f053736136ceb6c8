"""What a build left out of a source, and why: adding up the reports of its parts, and saying it in a line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any


def add_reports(reports: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Adds up reports of parts, in order, so that the first example of a kind is the first of the source.

    Returns:
        `read` and `empty` documents; `filtered` per expression; `bad` per kind with `count` and `first` example;
        `contaminated` with `contaminated_count` and `contaminated_by` evaluation file; `duplicates` per kind and
        `duplicate_examples`, to be filled by the join. The join adds `over_max_tokens`, documents that were read and no
        longer fitted, where there is such a limit, and `no_loss` with `count` and `first` example, documents that are
        kept without a token in the loss, where there is a mask.
    """
    total: dict[str, Any] = {"read": 0, "empty": 0, "filtered": {}, "bad": {}, "contaminated": []}
    for report in reports:
        for name in ("read", "empty"):
            total[name] += report[name]
        for text, count in report["filtered"].items():
            total["filtered"][text] = total["filtered"].get(text, 0) + count
        for kind, entry in report["bad"].items():
            mine = total["bad"].setdefault(kind, {"count": 0, "first": entry["first"]})
            mine["count"] += entry["count"]
        total["contaminated"] += report["contaminated"]
    files = Counter(entry["evaluation"].rsplit(":", 1)[0] for entry in total["contaminated"])
    total["contaminated_count"] = len(total["contaminated"])
    total["contaminated_by"] = dict(sorted(files.items()))
    return {**total, "duplicates": {}, "duplicate_examples": []}


def bad_count(report: dict[str, Any]) -> int:
    """Returns how many documents could not be read."""
    return sum(entry["count"] for entry in report.get("bad", {}).values())


def summary(report: dict[str, Any]) -> str:
    """Returns one line: how many documents were read and what was left out."""
    out = []
    for text, count in report["filtered"].items():
        out.append(f"{count:,} by the filter {text!r}")
    if report["empty"]:
        out.append(f"{report['empty']:,} empty")
    for kind, entry in report["bad"].items():
        out.append(f"{entry['count']:,} unreadable, {kind} (first: {entry['first']})")
    for kind, count in report["duplicates"].items():
        first = (
            next(entry for entry in report["duplicate_examples"] if entry["kind"] == kind)
            if report["duplicate_examples"]
            else None
        )
        out.append(
            f"{count:,} {kind} duplicates"
            + (f" (first: {first['at']}, of one in {first['source']!r})" if first else "")
        )
    if report["contaminated_count"]:
        first = report["contaminated"][0]
        by = ", ".join(f"{name}: {count:,}" for name, count in report["contaminated_by"].items())
        out.append(
            f"{report['contaminated_count']:,} contaminated ({by}; first: {first['at']} shares {first['words']!r} with "
            f"{first['evaluation']})"
        )
    if report.get("over_max_tokens"):  # not there in builds of earlier formats
        out.append(f"{report['over_max_tokens']:,} and all that follows because max_tokens was reached")
    line = f"{report['read']:,} read" + (f", left out: {'; '.join(out)}" if out else "")
    unused = report.get("no_loss", {"count": 0})
    if unused["count"]:
        line += f"; {unused['count']:,} kept without a token in the loss (first: {unused['first']})"
    return line
