"""`analyze path`: loss and pass rate of the models that lie between base, mid-trained and RL model.

The study's landscape (arXiv 2603.17074, section 10): ``W = W_base + alpha (W_MT - W_base) + beta (W_RL - W_MT)``. One
model is built; at each point its weights are filled in place from copies of the two or three models, in fp32, so that
no checkpoint is written. What a point gave is appended to a file at once, and the same command goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prism_nemo.analysis.loading import same_architecture
from prism_nemo.analysis.path_points import Point, barrier, fractions_of, path_points, segments_of
from prism_nemo.analysis.sampled import AnswerSettings, check_answers, pass_rates
from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.checkpoint.convert import run
from prism_nemo.checkpoint.importing import on_main
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.fingerprint import fingerprint
from prism_nemo.evaluation.engines.megatron import MegatronModel
from prism_nemo.evaluation.engines.open import architecture_of, fill, tokenizer_of
from prism_nemo.evaluation.held_out_loss import check_held_out, held_out_sources, measure_held_out, task_name
from prism_nemo.evaluation.statistics.differences import token_mean
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.run import write_json
from prism_nemo.runtime import start, stop
from prism_nemo.training.progress import Progress

POINTS, RESULT = "points.jsonl", "path.json"


@dataclass(frozen=True)
class PathSettings:
    """One path.

    Attributes:
        models: Two or three checkpoints (native or Hugging Face) of one architecture: A, B (and C).
        out: Folder of the result; the same settings go on with one that was interrupted.
        first: Fractions between A and B, or how many evenly spaced points (the study: 7).
        second: The same between B and C (the study: 5).
        grid: Points along each side of the square of alpha and beta (the study: 5); 0 for none. Three models only.
        data: Folder of built data, for the loss on held-out text.
        sources: Of `data`; empty for all of weight 0.
        rows: Rows of each source.
        seq_length: Tokens of a row.
        answers: Tasks whose pass rate is measured, and how; no tasks for none.
        tokenizer: The first model's own if not given.
        confidence: Of all intervals.
        parallel: Layout of the model.
    """

    models: tuple[str, ...]
    out: str
    first: tuple[float, ...] | int = 7
    second: tuple[float, ...] | int = 5
    grid: int = 0
    data: str | None = None
    sources: tuple[str, ...] = ()
    rows: int = 256
    seq_length: int = 128
    answers: AnswerSettings = field(default_factory=AnswerSettings)
    tokenizer: str | None = None
    confidence: float = 0.95
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def analyze_path(settings: PathSettings) -> dict[str, Any]:
    """Measure every point of a path; writes ``points.jsonl`` as it goes and ``path.json`` at the end.

    Every rank holds copies of its part of the models in the machine's parameter type (bf16 on GPUs), in host memory.

    Returns:
        ``models``, ``settings``, ``rows`` (tidy: ``alpha``, ``beta``, ``measure`` (loss, pass_rate), ``name``,
        ``value``, ``low``, ``high``, ``questions``) and ``barriers`` (``segment``, ``name`` and the keys of `barrier`).

    Raises:
        InputError: For settings or models that cannot be used, or an `out` of other settings; before any work.
        PrismError: If the losses are not finite.
    """
    paths = [Path(model) for model in settings.models]
    points = path_points(
        len(paths), fractions_of(settings.first, "first"), fractions_of(settings.second, "second"), settings.grid
    )
    architecture = same_architecture(paths)
    tokenizer = tokenizer_of(paths[0], settings.tokenizer)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, the models {architecture.vocab_size}")
    if settings.data is None and not settings.answers.tasks:
        raise InputError("nothing to measure: give data (for the loss) or tasks (for the pass rate)")
    sources: list[str] = []
    if settings.data is not None:
        sources = list(settings.sources) or held_out_sources(settings.data)
        check_held_out(
            settings.data, sources, settings.rows, settings.seq_length, architecture.max_position_embeddings, tokenizer
        )
    check_answers(settings.answers)
    layout = settings.parallel
    architecture.check_layout(layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
    settings = dataclasses.replace(settings, sources=tuple(sources), tokenizer=str(tokenizer.path))
    result: dict[str, Any] = run(_work, settings, points, settings.parallel)
    return result


class PointLog:
    """Points that were measured, on disk as they come.

    Args:
        path: Of the file.
        key: What decides the numbers; a file of another key is refused.

    Attributes:
        found: By point.

    Raises:
        InputError: If the file is of other settings.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        self.found: dict[Point, dict[str, Any]] = {}
        head = json.loads(json.dumps({"key": dict(key)}))
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if not lines or not lines[0]:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(head) + "\n")
            return
        before = _parsed(lines[0])
        if before != head:
            old = before.get("key", {}) if isinstance(before, dict) else {}
            different = sorted(k for k in {*old, *head["key"]} if old.get(k) != head["key"].get(k))
            raise InputError(
                f"{path}: holds points of other settings ({', '.join(different) or 'unreadable'}); choose another --out"
            )
        kept = [lines[0]]
        for line in lines[1:]:
            row = _parsed(line)
            if isinstance(row, dict) and {"alpha", "beta", "measured"} <= row.keys():
                self.found[Point(row["alpha"], row["beta"])] = row["measured"]
                kept.append(line)
        # A kill may leave half a line, and what is appended must not go on it.
        write_text(path, "\n".join(kept) + "\n")

    def add(self, point: Point, measured: dict[str, Any]) -> None:
        """Append a point and wait until it is on disk.

        Raises:
            PrismError: If it cannot be written.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"alpha": point.alpha, "beta": point.beta, "measured": measured}) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PrismError(f"{self.path}: cannot be written ({error.strerror}); make room and run it again") from None
        self.found[point] = measured


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


class Between:
    """A model whose weights are put anywhere between those of some checkpoints.

    Args:
        model: This rank's part; its own weights are lost.
        paths: Of the checkpoints.
    """

    def __init__(self, model: LanguageModel, paths: Sequence[Path]) -> None:
        self.model = model
        self._ends: list[dict[str, torch.Tensor]] = []
        for path in paths:
            fill(model, path, architecture_of(path))
            self._ends.append({name: p.detach().cpu().clone() for name, p in model.named_parameters()})

    @torch.no_grad()
    def move(self, shares: Sequence[float]) -> None:
        """Give the model ``sum_i shares_i W_i``, in fp32, rounded once; models of share 0 are left out.

        Args:
            shares: Of the checkpoints in order; those beyond their number must be 0.
        """
        used = [(float(share), end) for share, end in zip(shares, self._ends, strict=False) if share != 0]
        for name, parameter in self.model.named_parameters():
            total = used[0][1][name].to(parameter.device, torch.float32) * used[0][0]
            for share, end in used[1:]:
                total.add_(end[name].to(parameter.device, torch.float32), alpha=share)
            parameter.copy_(total)


def _work(settings: PathSettings, points: list[Point], parallel: ParallelConfig) -> dict[str, Any]:
    """The measurements, on every rank of the layout."""
    runtime = start(parallel, seed=0)
    try:
        paths, out = [Path(model) for model in settings.models], Path(settings.out)
        hashes = on_main(lambda: [fingerprint(path) for path in paths])
        left_out = ("out", "parallel", "first", "second", "grid", "models", "tokenizer")
        key = {k: v for k, v in dataclasses.asdict(settings).items() if k not in left_out}
        text = tokenizer_of(paths[0], settings.tokenizer).sha256
        # Every rank needs the same list of what is left; only the main one writes.
        log = on_main(lambda: PointLog(out / POINTS, {**key, "hashes": hashes, "tokenizer": text}))
        model = build_model(architecture_of(paths[0]), runtime).requires_grad_(False)
        model.eval()
        between = Between(model, paths)
        asked = MegatronModel(model, tokenizer_of(paths[0], settings.tokenizer))
        missing = [point for point in points if point not in log.found]
        progress = Progress("path", len(points), len(points) - len(missing), runtime.is_main)
        for number, point in enumerate(missing, start=len(points) - len(missing) + 1):
            between.move(point.shares)
            measured = _measure(settings, asked)
            if runtime.is_main:
                log.add(point, measured)
            progress.update(number, f"alpha {point.alpha:.2f} beta {point.beta:.2f}  {_told(measured)}")
        if not runtime.is_main:
            return {}
        result = _result(settings, points, log.found)
        write_json(out / RESULT, result)
        return result
    finally:
        stop()


def _measure(settings: PathSettings, asked: MegatronModel) -> dict[str, Any]:
    """Of the model as it is: for each source and task the value, its interval, and what it was made of."""
    found: dict[str, Any] = {"loss": {}, "pass_rate": {}}
    if settings.data is not None:
        losses = measure_held_out(asked, settings.data, settings.sources, settings.rows, settings.seq_length)
        for source in settings.sources:
            rows = [row.metrics for row in losses[task_name(source)].rows]
            by_row, tokens = [row["loss"] for row in rows], [row["tokens"] for row in rows]
            mean = token_mean(by_row, tokens, settings.confidence)
            found["loss"][source] = {
                "value": mean.estimate,
                "low": mean.low,
                "high": mean.high,
                "rows": by_row,
                "tokens": tokens,
            }
    found["pass_rate"] = pass_rates(asked, asked.tokenizer, settings.answers, settings.confidence)
    return found


def _told(measured: dict[str, Any]) -> str:
    values = [f"{name} {of['value']:.3f}" for kind in ("loss", "pass_rate") for name, of in measured[kind].items()]
    return "  ".join(values)


def _result(settings: PathSettings, points: Sequence[Point], found: Mapping[Point, dict[str, Any]]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for point in points:
        for measure in ("loss", "pass_rate"):
            for name, of in found[point][measure].items():
                ends = {key: of[key] for key in ("value", "low", "high")}
                place = {"alpha": point.alpha, "beta": point.beta, "measure": measure, "name": name}
                rows.append({**place, **ends, "questions": len(of["rows"] if measure == "loss" else of["questions"])})
    barriers = []
    for source in settings.sources:
        of_rows = {point: found[point]["loss"][source]["rows"] for point in points}
        tokens = found[points[0]]["loss"][source]["tokens"]
        for segment, stretch in segments_of(len(settings.models), points).items():
            height = barrier(stretch, of_rows, tokens, settings.confidence)
            barriers.append({"segment": segment, "name": source, **height})
    return {
        "models": list(settings.models),
        "settings": dataclasses.asdict(settings),
        "rows": rows,
        "barriers": barriers,
    }


def path_lines(result: dict[str, Any]) -> list[str]:
    """A line for each value of a path, and one for each barrier."""
    lines = [
        f"alpha {row['alpha']:.3f} beta {row['beta']:.3f}  {row['name']:<16} {row['measure']:<9} "
        f"{row['value']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        for row in result["rows"]
    ]
    for row in result["barriers"]:
        height = "none"
        if row["at"] is not None:
            height = f"{row['height']:.4f} nats [{row['low']:.4f}, {row['high']:.4f}] at {row['at']:.2f}"
        lines.append(f"barrier {row['segment']} on {row['name']}: {height}")
    return lines
