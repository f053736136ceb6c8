"""What only a quickstart records: its mixtures, the loss on general text, its parts in time, the expected effects."""

from __future__ import annotations

import math
from dataclasses import replace

from prism_nemo.report import charts
from prism_nemo.report.formatting import (
    NOT_MEASURED,
    compact,
    decimal,
    duration,
    gigabytes,
    percent,
    signed,
    significant,
    whole,
)
from prism_nemo.report.read import mapping, number, objects, sequence, share, words
from prism_nemo.report.story import Story
from prism_nemo.report.summary import COMMAND, Summary
from prism_nemo.report.svg import Style
from prism_nemo.report.view import Figure, Table, Verdict

_MIXTURE_STYLES = {"base": Style("s-base"), "midtraining": Style("s-midtrained")}


def mixture_figures(story: Story, summary: Summary) -> list[Figure]:
    """Draws the weights of each mixture, grouped by domain."""
    figures = []
    mixtures = {name: objects(sources) for name, sources in mapping(summary.content.get("mixtures")).items()}
    mixtures = {name: entries for name, entries in mixtures.items() if entries}
    if not mixtures:
        story.missing("The mixtures of the training data", COMMAND)
    for name, entries in mixtures.items():
        entries.sort(key=lambda entry: words(entry.get("domain")))
        style = _MIXTURE_STYLES.get(name, Style("s-other"))
        bars, rows = [], []
        for entry in entries:
            weight, source, domain = share(entry.get("weight")), words(entry.get("source")), words(entry.get("domain"))
            tokens, epochs = number(entry.get("tokens")), number(entry.get("epochs"))
            if weight is None:
                story.missing(f"Mixture {name}: weight of {source}", COMMAND)
            note = f"{compact(tokens)} tokens, {significant(epochs)} epochs"
            bars.append(charts.Bar(source, style, weight, percent(weight), domain, note=note))
            rows.append((source, domain, percent(weight), whole(tokens), significant(epochs)))
        title = f"{_prefix(story, summary)}Mixture: {name}"
        svg = charts.horizontal_bars(
            bars,
            title=title,
            tick_format=lambda value: percent(value, 0),
            labels=min(190.0, max(110.0, *(charts.CHARACTER * len(bar.label) for bar in bars))),
        )
        table = Table(("source", "domain", "weight", "tokens", "epochs"), rows, title)
        figures.append(Figure(title, svg, "Weight of each source by tokens, grouped by domain.", table))
    return figures


def text_loss_figures(story: Story, summary: Summary) -> list[Figure]:
    """Draws the loss on general text of each stage, and its change by domain where that was measured."""
    estimates, rows = [], []
    base = summary.models["base"].text_loss if "base" in summary.models else None
    mine = {id(model) for model in summary.models.values()}
    for model in (one for one in story.models if id(one) in mine):
        loss = model.text_loss
        if loss is None:
            story.missing(f"{model.name}: retention loss", COMMAND)
        rows.append((model.name, decimal(loss), *_from_base(loss, base)))
        estimates.append(charts.Estimate(model.name, model.style, loss))
    title = f"{_prefix(story, summary)}Loss on general text"
    svg = charts.interval_rows(estimates, title=title, value_format=decimal, reference=base, width=440)
    table = Table(("model", "nats per token", "from base", "perplexity"), rows, title)
    caption = "Nats per token; lower is better. The dashed line is the base. The axis is cut. No interval was measured."
    return [Figure(title, svg, caption, table), *_by_domain(story, summary)]


def cost_facts(story: Story, summary: Summary) -> list[tuple[str, str]]:
    """Returns the totals: time, tokens trained on, memory, machine."""
    content, before = summary.content, _prefix(story, summary)
    tokens = [found for part in objects(content.get("timeline")) if (found := number(part.get("tokens"))) is not None]
    seconds, memory = number(content.get("seconds")), number(content.get("peak_rss_gb"))
    for value, what in ((seconds, "Total time"), (memory, "Peak memory")):
        if value is None:
            story.missing(what, COMMAND)
    return [
        (f"{before}wall clock", duration(seconds)),
        (f"{before}tokens over all parts", compact(sum(tokens)) if tokens else NOT_MEASURED),
        (f"{before}peak memory", gigabytes(memory)),
        (f"{before}machine", words(content.get("machine")) or NOT_MEASURED),
    ]


def parts_figure(story: Story, summary: Summary) -> list[Figure]:
    """Draws when each part ran and for how long."""
    bars, rows = [], []
    parts = objects(summary.content.get("timeline"))
    if not parts:
        story.missing("The time line of the parts", COMMAND)
        return []
    for part in parts:
        key, note, layout = (words(part.get(name)) for name in ("stage", "note", "layout"))
        start, seconds, tokens = (number(part.get(name)) for name in ("start", "seconds", "tokens"))
        speed = tokens / seconds if tokens is not None and seconds else None
        told = [layout, f"{compact(tokens)} tokens" if tokens is not None else ""]
        told += [f"{compact(speed)} tokens/s" if speed is not None else "", note]
        style = summary.models[key].style if key in summary.models else Style("s-other")
        label = summary.label(key)
        # Without its start a bar would have to be put somewhere, and any place would claim something.
        length = seconds if start is not None else None
        shown = ", ".join(one for one in told if one)
        bars.append(charts.Bar(label, style, length, duration(seconds), start=start or 0.0, note=shown))
        counts = [whole(value) if value is not None else "–" for value in (tokens, speed)]
        rows.append((label, duration(start), duration(seconds), layout or "–", *counts, note or "–"))
    title = f"{_prefix(story, summary)}Parts of the quickstart"
    total = max(
        [
            number(summary.content.get("seconds")) or 0.0,
            *(bar.start + bar.value for bar in bars if bar.value is not None),
        ]
    )
    # An axis of 10,000 seconds has ticks that nobody can place.
    size, unit = (3600, "h") if total > 3 * 3600 else (60, "min") if total > 180 else (1, "s")
    scaled = [
        replace(bar, start=bar.start / size, value=None if bar.value is None else bar.value / size) for bar in bars
    ]
    svg = charts.horizontal_bars(
        scaled,
        title=title,
        tick_format=lambda value: f"{value:g} {unit}",
        x_range=(0.0, total / size) if total > 0 else None,
        labels=200,
        width=1000,
    )
    columns = ("part", "start", "took", "layout", "tokens", "tokens/s", "note")
    caption = "Start and length of each part. Tokens per second count the whole time of the part, start-up included."
    return [Figure(title, svg, caption, Table(columns, rows, title), wide=True)]


def expected_effects(story: Story, summary: Summary) -> list[Verdict]:
    """Returns the effects that the run was expected to show, with what it says about each."""
    found = []
    for entry in objects(summary.content.get("expected")):
        holds = entry.get("holds")
        state = "unknown" if not isinstance(holds, bool) else "yes" if holds else "no"
        label = {"yes": "holds", "no": "does not hold", "unknown": NOT_MEASURED}[state]
        claim = f"{_prefix(story, summary)}{words(entry.get('claim'))}"
        found.append(Verdict(state, label, claim, words(entry.get("detail"))))
    if not found:
        story.missing("Expected effects", COMMAND)
    return found


def repeat_table(story: Story, summary: Summary) -> list[Table]:
    """Returns what it takes to repeat the run: command, seed, model, and the versions of the software."""
    content = summary.content
    versions = mapping(content.get("versions"))
    if not versions:
        story.missing("Versions of the software", COMMAND)
    rows = [(name, words(content.get(name)) or NOT_MEASURED) for name in ("command", "seed")]
    rows += [
        (f"model: {name.replace('_', ' ')}", _plain(value)) for name, value in mapping(content.get("model")).items()
    ]
    if not any(mapping(run.lineage.get("versions")) for _, run in story.runs):  # or the table of versions has them
        rows += [(name, _plain(value)) for name, value in versions.items()]
    return [Table(("of the quickstart", "value"), rows, f"{_prefix(story, summary)}To repeat the quickstart")]


def _by_domain(story: Story, summary: Summary) -> list[Figure]:
    losses = {key: mapping(summary.stages.get(key, {}).get("domain_losses")) for key in summary.models}
    names = list(dict.fromkeys(name for found in losses.values() for name in found))
    rows, strips = [], []
    for key, found in losses.items():
        if found:
            values, bases = ([number(one.get(name)) for name in names] for one in (found, losses.get("base", {})))
            rows.append((summary.label(key), *map(decimal, values)))
            if key != "base":
                pairs = zip(values, bases, strict=True)
                changes = [a - b if a is not None and b is not None else None for a, b in pairs]
                strips.append((summary.label(key), changes))
    if not rows:
        return []
    title = f"{_prefix(story, summary)}Change of the loss by domain"
    svg = charts.heat_strip(
        strips, names, title=title, value_format=signed, centre=0.0, least_reach=0.1, width=440
    )  # fmt: skip
    caption = "Against the base, nats per token: blue is a lower loss (learned), orange a higher one (lost)."
    return [Figure(title, svg, caption, Table(("model", *names), rows, title))]


def _from_base(loss: float | None, base: float | None) -> tuple[str, str]:
    if loss is None or base is None:
        return NOT_MEASURED, NOT_MEASURED
    growth = math.expm1(min(50.0, loss - base))
    return signed(loss - base), f"{100 * growth:+.1f}%".replace("-", "−")


def _prefix(story: Story, summary: Summary) -> str:
    return f"{summary.folder.resolve().name}: " if len(story.summaries) > 1 else ""


def _plain(value: object) -> str:
    if isinstance(value, bool) or number(value) is None:
        return ", ".join(words(part) for part in sequence(value)) if isinstance(value, list) else words(value)
    exact = number(value)
    return whole(exact) if isinstance(value, int) and abs(value) >= 10_000 else significant(exact)
