"""`analyze cka`: how alike models represent the same texts, beside what a random update of the same size leaves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from prism_nemo.analysis.activations import States, collect_states, pick_tokens, texts_of
from prism_nemo.analysis.alignment import mutual_neighbours, procrustes_of_grams
from prism_nemo.analysis.gram import MEASURES, cka, cross_cka, drawn_cka, gram_of, half_sample_interval, half_samples
from prism_nemo.analysis.loading import names_of
from prism_nemo.analysis.massive import RAW, TREATMENTS, treat
from prism_nemo.analysis.perturb import move_randomly
from prism_nemo.analysis.token_rows import TokenRows, check_rows, file_inputs, held_out_inputs
from prism_nemo.analysis.weights import compare_checkpoints
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.open import architecture_of, read_model, tokenizer_of
from prism_nemo.models.family import Architecture
from prism_nemo.runtime import DTYPES, start, stop
from prism_nemo.runtime.launch import launch

POOLINGS = ("mean", "token")
_LEAST_TEXTS = 8  # halves of them still have a debiased value
Say = Callable[[str], None]


@dataclass(frozen=True)
class CKASettings:
    """One comparison.

    Attributes:
        models: Two or more checkpoints (native or Hugging Face); every pair of them is compared.
        data: Folder of built data to take held-out text from.
        sources: Of `data`; empty for all of weight 0.
        texts: Files of text instead or as well; see `prism_nemo.analysis.token_rows.file_inputs`.
        tokenizer: For `texts`; the first model's own if not given.
        rows: Texts of each input (the study: 200).
        seq_length: Most tokens of a text.
        tokens_per_text: Tokens of each text for the per-token values; 0 for none.
        treatments: Of the rows: raw, without_massive, standardised; see `prism_nemo.analysis.massive.treat`.
        massive_ratio: A dimension is massive that reaches so many times the median of its state.
        neighbours: k of the mutual neighbours.
        draws: Half samples for the intervals (the study: 20).
        confidence: Of the intervals.
        null_draws: Random updates for each pair; 0 for no null model.
        batch_tokens: Most tokens of a forward pass; only texts of equal length share one.
        dtype: fp32 or bf16; the machine's own if not given.
        seed: Of the tokens, the draws and the random updates.
    """

    models: tuple[str, ...]
    data: str | None = None
    sources: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    tokenizer: str | None = None
    rows: int = 200
    seq_length: int = 512
    tokens_per_text: int = 2
    treatments: tuple[str, ...] = TREATMENTS
    massive_ratio: float = 1000.0
    neighbours: int = 10
    draws: int = 200
    confidence: float = 0.95
    null_draws: int = 3
    batch_tokens: int = 4096
    dtype: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class CKAComparison:
    """What was found.

    Attributes:
        models: Short name and path of each.
        settings: Of the comparison.
        rows: Tidy: ``pair``, ``input``, ``pooling`` (mean, token), ``treatment``, ``layer`` (0 is the embedding),
            ``measure``, ``value``, ``low`` and ``high`` (None for measures without an interval), ``null`` (mean over
            the random updates), ``null_low`` and ``null_high`` (their extremes); None where there is no null model.
        massive: ``model``, ``input``, ``layer`` and the keys of `DimensionSizes.largest`, a row for each dimension.
        maps: ``pair``, ``input``, ``measure`` and ``values``: layer i of the first model (row) with layer j of the
            second (column), of raw pooled states.
        moved: For each pair the distance of the random updates, relative to the norm of all weights.
    """

    models: list[dict[str, str]]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    massive: list[dict[str, Any]] = field(default_factory=list)
    maps: list[dict[str, Any]] = field(default_factory=list)
    moved: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare_representations(settings: CKASettings, say: Say = lambda line: None) -> CKAComparison:
    """Compare the representations of models on the same texts.

    The random updates have, tensor by tensor, the relative norm by which the second model of a pair differs from the
    first; all values of (first, moved first) are computed as those of the pair. Models of different depth are refused;
    of pairs that differ otherwise (width, family) there are no null values.

    Args:
        settings: What to compare.
        say: Told what is being done.

    Raises:
        InputError: For settings, models or texts that cannot be used; before any forward pass.
        PrismError: If states are not finite or have no spread.
    """
    paths = [Path(model) for model in settings.models]
    names, architectures = _check(settings, paths)
    inputs = _inputs(settings, paths[0])
    for path, architecture in zip(paths, architectures, strict=True):
        check_rows(inputs, architecture.vocab_size, architecture.max_position_embeddings, str(path), _LEAST_TEXTS)
    least = min(len(item.rows) for item in inputs)
    if settings.neighbours >= least:
        raise InputError(f"neighbours: {settings.neighbours} of {least} texts; use less than {least}")
    moves: dict[tuple[int, int], dict[str, float]] = {}
    for a, b in itertools.combinations(range(len(paths)), 2):
        if settings.null_draws and not architectures[a].differences(architectures[b]):
            say(f"distance of {names[b]} from {names[a]}, tensor by tensor")
            tensors = compare_checkpoints([paths[a], paths[b]], [(0, 1)])[0][0].tensors
            moves[a, b] = {name: change.relative_l2 or 0.0 for name, change in tensors.items()}
    found: CKAComparison = launch(_work, settings, names, inputs, moves)
    return replace(found, settings=asdict(settings))


def _check(settings: CKASettings, paths: list[Path]) -> tuple[list[str], list[Architecture]]:
    if len(paths) < 2:
        raise InputError("models: at least two checkpoints are compared")
    unknown = sorted(set(settings.treatments) - set(TREATMENTS))
    if unknown or not settings.treatments:
        raise InputError(f"treatments: '{(unknown or [''])[0]}' is unknown; known: {', '.join(TREATMENTS)}")
    for name in ("rows", "seq_length", "neighbours", "batch_tokens"):
        if getattr(settings, name) < 1:
            raise InputError(f"{name}: {getattr(settings, name)} must be at least 1")
    if settings.tokens_per_text < 0 or settings.null_draws < 0:
        raise InputError("tokens_per_text and null_draws: must be 0 or more")
    if settings.draws < 20 or not 0 < settings.confidence < 1:
        raise InputError("draws: at least 20 are needed for an interval, and confidence lies between 0 and 1")
    if not settings.massive_ratio > 1:
        raise InputError(f"massive_ratio: {settings.massive_ratio} must be above 1 (times the median)")
    if settings.dtype is not None and settings.dtype not in DTYPES:
        raise InputError(f"dtype: '{settings.dtype}' is unknown; choose one of {', '.join(DTYPES)}")
    if settings.data is None and not settings.texts:
        raise InputError("no text to compare on: give data (a folder of built data) or texts (files)")
    names, architectures = names_of(paths), [architecture_of(path) for path in paths]
    for path, other in zip(paths[1:], architectures[1:], strict=True):
        first = architectures[0]
        if other.num_layers != first.num_layers:
            raise InputError(
                f"{path} has {other.num_layers} layers, {paths[0]} has {first.num_layers}; representations are "
                "compared layer by layer, which models of different depth do not allow"
            )
    return names, architectures


def _inputs(settings: CKASettings, first: Path) -> list[TokenRows]:
    inputs: list[TokenRows] = []
    if settings.data is not None:
        inputs += held_out_inputs(settings.data, settings.sources, settings.rows, settings.seq_length)
    if settings.texts:
        tokenizer = tokenizer_of(first, settings.tokenizer)
        inputs += file_inputs(settings.texts, tokenizer, settings.rows, settings.seq_length)
    names = [item.name for item in inputs]
    if len(set(names)) != len(names):
        raise InputError(f"inputs: two have the same name ({', '.join(sorted(names))}); rename a file")
    return inputs


def _work(
    settings: CKASettings, names: list[str], inputs: list[TokenRows], moves: dict[tuple[int, int], dict[str, float]]
) -> CKAComparison:
    """The forward passes and the measures, in a process of its own; one model is in memory at a time."""
    runtime = start(ParallelConfig(), seed=0, dtype=DTYPES[settings.dtype] if settings.dtype else None)
    picks = {item.name: pick_tokens(item.rows, settings.tokens_per_text, settings.seed) for item in inputs}

    def states_of(model: Any) -> dict[str, States]:
        return {i.name: collect_states(model, i.rows, picks[i.name], settings.batch_tokens) for i in inputs}

    states = [states_of(read_model(Path(path), runtime)) for path in settings.models]
    result = CKAComparison(
        [{"name": name, "path": path} for name, path in zip(names, settings.models, strict=True)], {}, []
    )
    for (name, own), item in itertools.product(zip(names, states, strict=True), inputs):
        for layer, sizes in enumerate(own[item.name].sizes):
            place = {"model": name, "input": item.name, "layer": layer}
            result.massive.extend({**place, **found} for found in sizes.largest(settings.massive_ratio))
    for a, b in itertools.combinations(range(len(names)), 2):
        pair = f"{names[a]} / {names[b]}"
        nulls = []
        for draw in range(settings.null_draws if (a, b) in moves else 0):
            model = read_model(Path(settings.models[a]), runtime)
            distance = move_randomly(model, moves[a, b], settings.seed + draw)
            result.moved.setdefault(pair, []).append(distance)
            nulls.append(states_of(model))
        for item in inputs:
            place = {"pair": pair, "input": item.name}
            both = states[a][item.name], states[b][item.name]
            others = [(states[a][item.name], moved[item.name]) for moved in nulls]
            groups = {"mean": torch.arange(len(item.rows)), "token": texts_of(picks[item.name])}
            try:
                result.rows.extend({**place, **row} for row in _rows(settings, both, others, groups, runtime.device))
                result.maps.extend({**place, **found} for found in _maps(both))
            except ValueError as error:
                raise PrismError(f"{pair} on {item.name}: {error}") from error
    stop()
    return result


def _rows(
    settings: CKASettings,
    both: tuple[States, States],
    nulls: list[tuple[States, States]],
    groups: dict[str, torch.Tensor],
    device: torch.device,
) -> list[dict[str, Any]]:
    """All values of one pair on one input; the measures are computed where the models are, in fp64."""
    rows = []
    for pooling, treatment in itertools.product(POOLINGS, settings.treatments):
        if pooling == "token" and not settings.tokens_per_text:
            continue
        drawn = half_samples(groups[pooling], settings.draws, settings.seed).to(device)
        for layer in range(len(both[0].pooled)):
            place = {"pooling": pooling, "treatment": treatment, "layer": layer}
            try:
                values = _values(settings, _treated(settings, both, place, device), drawn, len(groups["mean"]))
                null = [_values(settings, _treated(settings, pair, place, device), None, 0) for pair in nulls]
            except ValueError as error:
                raise ValueError(f"layer {layer}, {pooling}, {treatment}: {error}") from error
            for measure, (value, low, high) in values.items():
                found = [own[measure][0] for own in null]
                ends = {
                    "null": sum(found) / len(found) if found else None,
                    "null_low": min(found, default=None),
                    "null_high": max(found, default=None),
                }
                rows.append({**place, "measure": measure, "value": value, "low": low, "high": high, **ends})
    return rows


def _treated(
    settings: CKASettings, both: tuple[States, States], place: dict[str, Any], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    layer = place["layer"]
    first, second = ((s.pooled if place["pooling"] == "mean" else s.tokens)[layer].to(device) for s in both)
    massive = both[0].sizes[layer].massive(settings.massive_ratio), both[1].sizes[layer].massive(settings.massive_ratio)
    treated = treat(first, second, place["treatment"], massive)
    return treated.first, treated.second


Value = tuple[float, float | None, float | None]


def _values(
    settings: CKASettings, rows: tuple[torch.Tensor, torch.Tensor], drawn: torch.Tensor | None, texts: int
) -> dict[str, Value]:
    """Every measure of one pair of layers, the forms of CKA with an interval if there are draws."""
    a, b = gram_of(rows[0], "the first model"), gram_of(rows[1], "the second model")
    values: dict[str, Value] = {}
    for measure in MEASURES:
        estimate = cka(a, b, measure)
        ends = None
        if drawn is not None:
            found = drawn_cka(a, b, drawn, measure)
            ends = half_sample_interval(estimate, found, texts, settings.confidence)
        values[measure] = (estimate, *(ends or (None, None)))
    values["procrustes"] = procrustes_of_grams(a.centred, b.centred), None, None
    values["mutual_neighbours"] = mutual_neighbours(*rows, settings.neighbours), None, None
    return values


def _maps(both: tuple[States, States]) -> list[dict[str, Any]]:
    first, second = ([gram_of(layer) for layer in states.pooled] for states in both)
    return [
        {"treatment": RAW, "measure": measure, "values": cross_cka(first, second, measure).tolist()}
        for measure in MEASURES
    ]
