"""What the tests of the engine run in processes of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from generation_workers import load_model

from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError
from prism_nemo.generation import cpu_kernels, layers
from prism_nemo.generation.decode import Decoder
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.parity import layer_gaps
from prism_nemo.generation.requests import Request, Response, SamplingParams, request_seed
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import forward_logits
from prism_nemo.runtime import start, stop

Written = list[tuple[list[int], list[float], bool]]


def requests_of(prompts: list[list[int]], samples: int = 3, stop_ids: tuple[int, ...] = (5, 6)) -> list[Request]:
    """Sampled, greedy and cut requests of lengths from 1 to 24, several of each prompt."""
    found = []
    for i in range(samples * len(prompts)):
        place = request_seed(3, i)
        kinds = [
            SamplingParams(1 + (7 * i) % 24, 1.0, stop_ids=stop_ids, seed=place),
            SamplingParams(24, 0.0, stop_ids=stop_ids),
            SamplingParams(18, 1.3, top_k=20, stop_ids=stop_ids, seed=place),
            SamplingParams(18, 0.8, top_p=0.9, stop_ids=stop_ids, seed=place),
        ]
        found.append(Request(prompts[i // samples], kinds[i % 4]))
    return found


def write(model: LanguageModel, requests: list[Request], **options: Any) -> Written:
    """Responses as plain values."""
    return [(r.tokens, r.logprobs, r.finished) for r in Engine(model, **options).generate(requests)]


def in_layout(
    hf_dirs: list[str], parallel: ParallelConfig, prompts: list[list[int]], slots: list[int]
) -> list[list[Written]]:
    """By rank and model, the responses."""
    runtime = start(parallel, seed=0)
    found = []
    for hf_dir, count in zip(hf_dirs, slots, strict=True):
        found.append(write(load_model(hf_dir, runtime), requests_of(prompts), slots=count))
    everyone: list[Any] = [None] * runtime.world_size
    torch.distributed.all_gather_object(everyone, found)
    stop()
    return everyone


def against_forward(hf_dirs: list[str], prompts: list[list[int]], options: list[dict[str, Any]]) -> list[list[Any]]:
    """By model and options the responses, with the log-probabilities of their tokens by a full forward."""
    runtime = start(ParallelConfig(), seed=0)
    found: list[list[Any]] = []
    for hf_dir in hf_dirs:
        model, requests = load_model(hf_dir, runtime), requests_of(prompts)
        known: dict[tuple[int, tuple[int, ...]], Any] = {}
        found.append([])
        for chosen in options:
            written = write(model, requests, **chosen)
            for i, (tokens, _, _) in enumerate(written):
                if (i, tuple(tokens)) not in known:
                    known[i, tuple(tokens)] = _scores(model, requests[i], tokens)
            found[-1].append((written, [known[i, tuple(tokens)] for i, (tokens, _, _) in enumerate(written)]))
    stop()
    return found


def _scores(model: LanguageModel, request: Request, tokens: list[int]) -> tuple[list[float], bool]:
    """Log-probabilities of a response's tokens by a full forward, and whether they are its best if greedily chosen."""
    logits = forward_logits(model, torch.tensor([request.prompt + tokens[:-1]]))
    assert logits is not None
    own = logits[0, len(request.prompt) - 1 :, : model.architecture.vocab_size].log_softmax(-1)
    greedy = request.sampling.temperature > 0 or own.argmax(-1).tolist() == tokens
    return own.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist(), greedy


def refusals(model: LanguageModel, requests: list[Request]) -> list[str]:
    """What an engine says to each request."""
    found = []
    for request in requests:
        try:
            write(model, [request])
        except InputError as error:
            found.append(str(error))
        else:
            found.append("accepted")
    return found


def twice(model: LanguageModel, requests: list[Request], **options: Any) -> tuple[Written, Written]:
    """The same requests in the given order, and in reverse (put back in order)."""
    return write(model, requests, **options), write(model, requests[::-1], **options)[::-1]


def stop_text(model: LanguageModel, prompt: list[int], stop_at: int) -> tuple[Any, Any, str]:
    """A free greedy response; one that stops at the text of two of its tokens; and that text."""

    def decode(tokens: list[int]) -> str:
        return "".join(f"<{token}>" for token in tokens)

    (free,) = write(model, [Request(prompt, SamplingParams(12, 0.0))])
    text = decode(free[0][stop_at - 1 : stop_at + 1])
    stopping = Request(prompt, SamplingParams(12, 0.0, stop_texts=("nowhere", text)))
    (stopped,) = write(model, [stopping], decode=decode)
    return free, stopped, text


@contextmanager
def _kernels(used: bool) -> Iterator[None]:
    """Without the kernels for CPU, as on a GPU, or with them."""
    kept = cpu_kernels.serves
    if not used:
        cpu_kernels.serves = lambda tensor: False
    try:
        yield
    finally:
        cpu_kernels.serves = kept


def with_and_without_kernels(model: LanguageModel, prompts: list[list[int]]) -> tuple[Written, Written]:
    """The same requests in few slots, by the kernels for CPU and by torch's."""
    with _kernels(False):
        torchs = write(model, requests_of(prompts), slots=11)
    return write(model, requests_of(prompts), slots=11), torchs


def capacity_of(
    model: LanguageModel, prompts: list[list[int]], options: dict[str, Any], packed: bool
) -> tuple[int, int]:
    """Rows and tokens per row of the largest cache that was made."""
    from prism_nemo.generation import caches

    seen = []

    def watch(kind: Any) -> None:
        make, grow = kind.__init__, kind.grow

        def made(self: Any, shape: Any, like: Any) -> None:
            make(self, shape, like)
            seen.append((shape[0], shape[2]))

        def grown(self: Any, capacity: int) -> None:
            grow(self, capacity)
            seen.append((self.keys.shape[0], capacity))

        kind.__init__, kind.grow = made, grown

    watch(caches.PackedKeyValues if packed else caches.KeyValues)
    with _kernels(packed):
        write(model, requests_of(prompts), **options)
    return max(rows for rows, _ in seen), max(columns for _, columns in seen)


def with_little_memory(
    model: LanguageModel, prompts: list[list[int]], rows: float
) -> tuple[list[Response], int, int, str]:
    """Responses where half of the free memory holds the caches of `rows` of the longest request.

    And the most rows that were made, by how much the caches of 3 rows are larger than foretold, and the refusal.
    """
    from prism_nemo.generation import room

    decoder = Decoder(model)
    fact = sum(cache.nbytes() for cache in decoder.caches(3, 41))
    free = int(2 * rows * room.row_bytes(decoder, 41))
    kept, room.free_memory = room.free_memory, lambda device: free
    made = []
    caches = Decoder.caches

    def counted(self: Decoder, count: int, capacity: int) -> Any:
        made.append(count)
        return caches(self, count, capacity)

    Decoder.caches = counted  # type: ignore[method-assign]
    said = ""
    responses: list[Response] = []
    try:
        responses = Engine(model).generate(requests_of(prompts))
    except InputError as error:
        said = str(error)
    finally:
        room.free_memory = kept
        Decoder.caches = caches  # type: ignore[method-assign]
    return responses, max(made), fact - 3 * room.row_bytes(decoder, 41), said


def overflowing(model: LanguageModel, prompt: list[int]) -> None:
    """A weight that is not a number must not become token 0."""
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "final" in name).fill_(float("nan"))
    write(model, [Request(prompt, SamplingParams(3))])


def _scaled(kind: Any, wrong: int, method: str, factor: float) -> Callable[..., Any]:
    """A layer's method whose first output is scaled in the `wrong`-th layer."""
    right = getattr(kind, method)

    def broken(self: Any, *args: Any) -> Any:
        found = right(self, *args)
        if self.name != f"decoder.layers.{wrong}":
            return found
        return (found[0] * factor, *found[1:]) if isinstance(found, tuple) else found * factor

    return broken


def gaps_with_mistake(
    hf_dir: str, parallel: ParallelConfig, tokens: list[int], mistakes: list[tuple[str, str, int] | None]
) -> list[list[tuple[str, float]]]:
    """`layer_gaps` of the right decoder (None), and of ones with (class, method, layer) scaled by 1.01."""
    model = load_model(hf_dir, start(parallel, seed=0))
    found = []
    for mistake in mistakes:
        if mistake is None:
            found.append(layer_gaps(model, tokens))
            continue
        kind, method, layer = getattr(layers, mistake[0]), mistake[1], mistake[2]
        right = getattr(kind, method)
        setattr(kind, method, _scaled(kind, layer, method, 1.01))
        found.append(layer_gaps(model, tokens))
        setattr(kind, method, right)
    stop()
    return found


def rounding_of_bf16(hf_dirs: list[str], prompts: list[list[int]]) -> list[tuple[float, float, float, int]]:
    """Of each model in bf16, how far log-probabilities lie from those in fp32 of the same weights.

    Returns:
        Root mean square of the decoder's errors, of the training forward's, and of their difference; and how many.
    """
    runtime = start(ParallelConfig(), seed=0)
    found = []
    for hf_dir in hf_dirs:
        model = load_model(hf_dir, dataclasses.replace(runtime, dtype=torch.bfloat16))
        exact = load_model(hf_dir, runtime)
        decoded, trained, wanted = [], [], []
        requests = requests_of(prompts)
        for request, (tokens, logprobs, _) in zip(requests, write(model, requests, slots=7), strict=True):
            row, first = torch.tensor([request.prompt + tokens[:-1]]), len(request.prompt) - 1
            for scored, kept in ((model, trained), (exact, wanted)):
                logits = forward_logits(scored, row)
                assert logits is not None
                own = logits[0, first:, : model.architecture.vocab_size].log_softmax(-1)
                kept += own.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
            decoded += logprobs
        a, b, c = (torch.tensor(values, dtype=torch.float64) for values in (decoded, trained, wanted))
        errors = [((x - y) ** 2).mean().sqrt().item() for x, y in ((a, c), (b, c), (a, b))]
        found.append((*errors, len(a)))
    stop()
    return found


def around_an_update(model: LanguageModel, requests: list[Request]) -> tuple[Written, Written, Written]:
    """What one engine writes before and after the weights change in place, and what a new one writes then."""
    engine = Engine(model)
    before = [(r.tokens, r.logprobs, r.finished) for r in engine.generate(requests)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    after = [(r.tokens, r.logprobs, r.finished) for r in engine.generate(requests)]
    return before, after, write(model, requests)
