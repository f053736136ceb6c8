"""A plan as people read it, within 100 columns."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from prism_nemo.planning.layouts import Candidate
from prism_nemo.planning.plan import PROVENANCE, Plan
from prism_nemo.planning.rehearsal import Rehearsal

MIN_WIDTH = 100
SHOWN = 8
_KERNELS = {"te": "Transformer Engine's layers", "torch": "torch's layers, flash attention, mamba_ssm's scan"}


def plan_view(plan: Plan) -> RenderableType:
    """Everything about a plan."""
    parts: list[RenderableType] = [_head(plan)]
    if plan.own is not None:
        parts += [Text(f"\nThe recipe's layout: {plan.own.describe()}", "bold"), _verdict(plan, plan.own)]
    else:
        note = f"\nThe recipe's own layout, {plan.own_layout}, is not for {plan.gpus} GPUs; layouts for that many:"
        parts.append(Text(note, "dim"))
    parts += [Text(""), _layouts(plan)]
    first = plan.own if plan.own is not None and plan.own.time is not None else next(iter(plan.fitting), None)
    if first is not None:
        parts += [Text(f"\nWhere the time of a step goes: {first.describe()}", "bold"), _time(first)]
    parts += [Text("\nLayouts that cannot be or do not fit", "bold"), _refused(plan)]
    if plan.rehearsal is not None and plan.rehearsed is not None:
        parts += [Text(f"\nRehearsed: {plan.rehearsed.describe()}", "bold"), _rehearsal(plan, plan.rehearsal)]
    parts += [Text("\nHow each figure was obtained", "bold"), _provenance(plan)]
    return Group(*parts)


def _head(plan: Plan) -> RenderableType:
    a, work, fp8 = plan.architecture, plan.work, plan.kernels.fp8_recipe
    precision = "bf16" if fp8 is None else f"bf16, linear layers in FP8 ({fp8})"
    grid = _grid()
    grid.add_row("model", f"{plan.model}: {plan.parameters:,} parameters, {a.family}, {a.num_layers} layers")
    grid.add_row("GPUs", f"{plan.gpus} x {plan.gpu.name} ({plan.gpu.memory_bytes / 1e9:.0f} GB), {precision}")
    batch = f"{work.global_batch_size} rows of {work.seq_length:,} tokens, {work.micro_batch_size} per micro-batch"
    grid.add_row("step", f"{plan.tokens_per_step:,} tokens: {batch}")
    grid.add_row("run", f"{plan.train_steps:,} steps, {plan.tokens / 1e9:,.2f}B tokens")
    total = plan.flops_per_token * plan.tokens
    grid.add_row("FLOPs", f"{plan.flops_per_token / 1e9:,.2f} GFLOP per token, {total:.2e} in all")
    return grid


def _layouts(plan: Plan) -> RenderableType:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("\nlayout", no_wrap=True)
    table.add_column("recom-\npute", no_wrap=True)
    for name in ("GB of\na rank", "model,\noptim.", "activ-\nations", "\nother"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("step\ns", "tokens/s\nper GPU", "\nMFU", "\ndays", "GPU-\nhours"):
        table.add_column(name, justify="right", no_wrap=True)
    fitting, shown = plan.fitting, _unlike(plan.fitting)
    for candidate in shown[:SHOWN]:
        memory, speed = candidate.memory, plan.speed(candidate)
        if memory is None:
            continue
        table.add_row(
            Text(candidate.layout.describe(), "bold cyan"),
            candidate.recompute[:6],
            f"{memory.total / 1e9:.1f}",
            f"{(memory.parameters + memory.fp8_weights + memory.gradients + memory.optimizer) / 1e9:.1f}",
            f"{(memory.activations + memory.logits) / 1e9:.1f}",
            f"{(memory.communication + memory.working + memory.reserved) / 1e9:.1f}",
            f"{speed['step_seconds']:.2f}",
            f"{speed['tokens_per_second_per_gpu']:,.0f}",
            f"{speed['mfu']:.0%}",
            f"{speed['days']:.1f}",
            f"{speed['gpu_hours']:,.0f}",
        )
    if not fitting:
        return Text(f"No layout of {plan.gpus} {plan.gpu.name} fits.", "yellow")
    rest = len(fitting) - len(shown[:SHOWN])
    more = f" (the fastest of {len(fitting)}, each with its best VPP; all of them: --json)" if rest else ""
    return Group(Text(f"Layouts that fit, by predicted speed{more}", "bold"), table)


def _unlike(candidates: list[Candidate]) -> list[Candidate]:
    """Without those that differ from a faster one in the parts of a virtual pipeline alone."""
    best: dict[str, Candidate] = {}
    for candidate in candidates:
        best.setdefault(replace(candidate.layout, virtual_pipeline_model_parallel_size=1).describe(), candidate)
    return list(best.values())


def _verdict(plan: Plan, candidate: Candidate) -> RenderableType:
    if candidate.refusal is not None:
        return Text(f"does not fit: {candidate.refusal}", "yellow")
    speed, memory = plan.speed(candidate), candidate.memory
    total = 0.0 if memory is None else memory.total / 1e9
    return Text(
        f"fits: {total:.1f} of {plan.gpu.memory_bytes / 1e9:.0f} GB; {speed['step_seconds']:.2f} s a step, "
        f"{speed['tokens_per_second']:,.0f} tokens/s, {speed['days']:.1f} days, {speed['gpu_hours']:,.0f} GPU-hours",
        "green",
    )


def _time(candidate: Candidate) -> RenderableType:
    if candidate.time is None:
        return Text("")
    step = candidate.time.step
    parts = sorted(candidate.time.to_dict().items(), key=lambda item: -item[1])
    words = [
        f"{name.replace('_', ' ')} {value / step:.0%}"
        for name, value in parts
        if name != "step" and value / step > 0.005
    ]
    return Text(", ".join(words))


def _refused(plan: Plan) -> RenderableType:
    """One line a reason: impossible ones counted, too large ones with what they need."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, justify="right")
    grid.add_column()
    impossible: Counter[str] = Counter()
    large: dict[str, Candidate] = {}
    fits = {c.layout.describe() for c in plan.fitting}
    for candidate in plan.candidates:
        name = candidate.layout.describe()
        if candidate.refusal is None or name in fits:
            continue
        if candidate.memory is None:
            if candidate.recompute == "none":
                impossible[candidate.refusal.partition(";")[0]] += 1
        elif name not in large or _need(candidate) < _need(large[name]):
            large[name] = candidate
    for name, candidate in sorted(large.items(), key=lambda item: _need(item[1]))[:SHOWN]:
        grid.add_row(name, f"needs {_need(candidate) / 1e9:.1f} GB at least ({_mode(candidate)})")
    if len(large) > SHOWN:
        grid.add_row(f"{len(large) - SHOWN} more", "need more still")
    for why, count in impossible.most_common(SHOWN):
        grid.add_row(f"{count} layout{'s' if count > 1 else ''}", why)
    if len(impossible) > SHOWN:
        grid.add_row("others", "for the like reasons: --json")
    return grid if large or impossible else Text("none", "dim")


def _need(candidate: Candidate) -> int:
    return candidate.memory.total if candidate.memory is not None else 0


def _mode(candidate: Candidate) -> str:
    return "nothing recomputed" if candidate.recompute == "none" else f"recompute {candidate.recompute}"


def _rehearsal(plan: Plan, counted: Rehearsal) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("stage", justify="right")
    for name in (
        "ranks",
        "parameters\nof a rank",
        "params\nGB",
        "grads\nGB",
        "optimizer GB\nof a rank",
        "kept by a micro-\nbatch GB",
        "TFLOP\nfwd + bwd",
    ):
        table.add_column(name, justify="right")
    for stage in counted.stages:
        ranks = [r for r in counted.ranks if r.pipeline == stage.stage]
        low, high = min(r.optimizer_bytes for r in ranks), max(r.optimizer_bytes for r in ranks)
        optimizer = (
            f"{low / 1e9:.3f}" if f"{low / 1e9:.3f}" == f"{high / 1e9:.3f}" else f"{low / 1e9:.3f}-{high / 1e9:.3f}"
        )
        table.add_row(
            str(stage.stage),
            str(len(ranks)),
            f"{ranks[0].parameters:,}",
            f"{ranks[0].parameter_bytes / 1e9:.3f}",
            f"{ranks[0].gradient_bytes / 1e9:.3f}",
            optimizer,
            f"{stage.kept_bytes / 1e9:.3f}",
            f"{stage.forward_flops / 1e12:.1f} + {stage.backward_flops / 1e12:.1f}",
        )
    same = "equal to" if counted.parameters == plan.parameters else "NOT equal to"
    note = (
        f"{len(counted.ranks)} ranks built in {counted.seconds:.1f} s and {counted.peak_bytes / 1e6:.0f} MB; "
        f"parameters of all ranks {counted.parameters:,}, {same} the model's.\n"
        "Counted on torch's layers with a GPU's kernels in their place; FLOPs of whole squares of scores."
    )
    return Group(table, Text(note, "dim"))


def _provenance(plan: Plan) -> RenderableType:
    grid = _grid()
    grid.add_row("kernels", _KERNELS.get(plan.kernels.name, plan.kernels.name))
    for name, how in PROVENANCE.items():
        grid.add_row(name, how)
    grid.add_row("peaks", "; ".join(plan.gpu.sources))
    words = (f"{name} {value:g}" for name, value in plan.assumed.to_dict().items())
    grid.add_row("assumed", ", ".join(words) + " (--assume key=value)")
    return grid


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    return grid
