"""What the analysis tests run in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.analysis.activations import States, collect_states
from prism_nemo.analysis.path import Between
from prism_nemo.analysis.perturb import move_randomly
from prism_nemo.analysis.sampled import AnswerSettings, pass_rates, questions_of
from prism_nemo.analysis.token_entropy import Asked, Told, token_entropies
from prism_nemo.analysis.weights import compare_weights
from prism_nemo.checkpoint.convert import hf_tensors
from prism_nemo.config import ParallelConfig
from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer
from prism_nemo.evaluation.engines.open import read_model
from prism_nemo.generation.requests import Request, Response
from prism_nemo.models.build import build_model
from prism_nemo.models.family import read_hf_config
from prism_nemo.rl.rewards.task import CLOSE
from prism_nemo.runtime import start, stop


def states_of(
    folders: Sequence[str],
    rows: list[list[int]],
    picks: list[list[int]],
    batch_tokens: int,
    moves: Sequence[tuple[dict[str, float], int]] = (),
) -> list[States]:
    """Of each model, and of the first one after each random move."""
    runtime = start(ParallelConfig(), seed=0)
    found = [collect_states(read_model(Path(f), runtime), rows, picks, batch_tokens) for f in folders]
    for relative, seed in moves:
        model = read_model(Path(folders[0]), runtime)
        move_randomly(model, relative, seed)
        found.append(collect_states(model, rows, picks, batch_tokens))
    stop()
    return found


def same_within_a_process(hf: str, native: str) -> tuple[float, set[int]]:
    """Share of equal weights, compared where groups are already laid out; and the processes it started meanwhile."""
    start(ParallelConfig(), seed=0)
    before = {child.pid for child in multiprocessing.active_children()}
    found = compare_weights(Path(hf), Path(native)).total.equal_fraction
    started = {child.pid for child in multiprocessing.active_children()} - before
    assert dist.is_initialized()  # the groups are still the caller's
    stop()
    return found, {pid for pid in started if pid is not None}


def moved_randomly(folder: str, relative: dict[str, float], seeds: Sequence[int]) -> list[Any]:
    """Weights under their Hugging Face names after a random move, for each seed, with the distance reported."""
    runtime = start(ParallelConfig(), seed=0)
    found = []
    for seed in seeds:
        model = read_model(Path(folder), runtime)
        distance = move_randomly(model, relative, seed)
        tensors = {name: tensor.clone() for name, tensor in hf_tensors(model, model.architecture)}
        found.append((distance, tensors))
    stop()
    return found


def between(folders: list[str], shares: list[tuple[float, ...]]) -> list[dict[str, torch.Tensor]]:
    """Weights under their Hugging Face names at points between models, reached one after the other."""
    runtime = start(ParallelConfig(), seed=0)
    model = build_model(read_hf_config(Path(folders[0])), runtime).requires_grad_(False)
    way = Between(model, [Path(folder) for folder in folders])
    found = []
    for own in shares:
        way.move(own)
        found.append({name: tensor.clone() for name, tensor in hf_tensors(model, model.architecture)})
    stop()
    return found


class KnownAnswers:
    """A model that answers right at some (question, sample), and else wrong, in the required form."""

    def __init__(self, tokenizer: Tokenizer, settings: AnswerSettings, right: set[tuple[int, int]]) -> None:
        self.tokenizer, self.right, self.asked = tokenizer, right, list[tuple[int, ...]]()
        problems = questions_of(settings, settings.tasks[0])
        self.answers = {tuple(tokenizer.encode(p.prompt)): (i, p.answer) for i, p in enumerate(problems)}

    def generate(self, requests: list[Request]) -> list[Response]:
        """See `prism_nemo.generation.requests.Sampler`."""
        found = []
        for request in requests:
            number, answer = self.answers[tuple(request.prompt)]
            sample = self.asked.count(tuple(request.prompt))
            self.asked.append(tuple(request.prompt))
            text = f"{CLOSE}{answer if (number, sample) in self.right else 'wrong'}"
            ids = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
            found.append(Response(request.prompt, ids, [0.0] * len(ids), True))
        return found


def rates_of_known_answers(tokenizer: str, settings: AnswerSettings, right: set[tuple[int, int]]) -> Any:
    """Pass rates of a model that is right where it is told to be."""
    start(ParallelConfig(), seed=0)
    known = load_tokenizer(tokenizer)
    rates = pass_rates(KnownAnswers(known, settings, right), known, settings, 0.95)
    stop()
    return rates


def entropies_of(folders: Sequence[str], rows: list[tuple[list[int], int]]) -> list[list[Told]]:
    """Entropy and likelihood of tokens, for each model."""
    runtime = start(ParallelConfig(), seed=0)
    asked = [Asked(*row) for row in rows]
    found = [token_entropies(read_model(Path(folder), runtime), asked) for folder in folders]
    stop()
    return found
