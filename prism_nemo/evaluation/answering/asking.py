"""Putting questions to a model: prompts as tokens, a seed for each answer, and answers saved as they come."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError
from prism_nemo.evaluation.answering.answers import AnswerLog, Cache, digest
from prism_nemo.evaluation.answering.formats import PromptFormat, first_tokens, render, stop_tokens
from prism_nemo.evaluation.answering.grading import Written
from prism_nemo.evaluation.engines.contract import EvaluationModel
from prism_nemo.evaluation.question import AskedSampling, EvaluationTask, Question
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.generation.requests import Request, Response, SamplingParams, request_seed
from prism_nemo.training.progress import Progress


@dataclass(frozen=True)
class Asked:
    """Questions of a task as a model is given them.

    Attributes:
        name: Task, split and format, as in names of files.
        questions: In the order in which they are asked.
        prompts: Text of each.
        requests: The answers that are asked for, by question and sample, those of one question together.
        key: Hash of all that decides the answers.
    """

    name: str
    questions: Sequence[Question]
    prompts: list[str]
    requests: dict[tuple[str, int], Request]
    key: str

    @property
    def limits(self) -> list[int]:
        """Longest answer to each question, which a long prompt may shorten."""
        return [r.sampling.max_new_tokens for (_, sample), r in self.requests.items() if sample == 0]


def put(
    model: EvaluationModel,
    weights: str,
    task: EvaluationTask,
    form: PromptFormat,
    questions: Sequence[Question],
    sampling: AskedSampling,
    settings: EvaluateConfig,
) -> Asked:
    """Make the requests of a task; nothing is generated yet.

    Args:
        model: Whose tokenizer and length count.
        weights: Hash of the model's weights.
        task: The task.
        form: How it is asked.
        questions: Those of the task that are asked, of one split.
        sampling: How they are answered.
        settings: Seed, first token.

    Raises:
        InputError: If a prompt leaves the model no room for an answer.
    """
    tokenizer = model.tokenizer
    first, stops = first_tokens(tokenizer, settings.bos), stop_tokens(tokenizer)
    prompts = render(form, task, questions, tokenizer.path.parent)
    stop_texts = tuple(dict.fromkeys([*sampling.stop_texts, *form.stop_texts]))
    requests: dict[tuple[str, int], Request] = {}
    decided = []
    for question, encoded in zip(questions, tokenizer.encode_batch(prompts), strict=True):
        # A chat template writes the first token itself.
        ids = encoded if encoded[: len(first)] == first else first + encoded
        room = model.max_length - len(ids)
        if not ids or room < 1:
            raise InputError(
                f"{task.name}: question '{question.id}' is a prompt of {len(ids)} tokens in format '{form.name}'; the "
                f"model reads 1 to {model.max_length - 1} and needs room for an answer"
            )
        usual = SamplingParams(
            max_new_tokens=min(sampling.max_new_tokens, room),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop_ids=stops,
            stop_texts=stop_texts,
        )
        # The question and the sample alone decide the random numbers: not the batch, and not what was asked before.
        place = (settings.seed, _number(task.name), _number(question.id))
        for sample in range(sampling.samples):
            requests[question.id, sample] = Request(ids, dataclasses.replace(usual, seed=request_seed(*place, sample)))
        decided.append([question.id, ids, dataclasses.asdict(usual), sampling.samples, place])
    split = questions[0].split if questions else "none"
    decides = {
        "weights": weights,
        "tokenizer": tokenizer.sha256,
        "engine": model.engine,
        "requests": digest(decided),
    }
    return Asked(f"{task.name}.{split}.{form.name}", questions, prompts, requests, digest(decides))


def answers_of(
    model: EvaluationModel, asked: Asked, log: AnswerLog, cache: Cache, batch: int, say: Callable[[str], None]
) -> dict[tuple[str, int], Written]:
    """All answers: those that are there already, and the others from the model.

    Args:
        model: Is asked for what is missing only.
        asked: The requests.
        log: Gets the answers as they come.
        cache: Of other evaluations' answers.
        batch: Answers between two saves.
        say: Told where answers come from.
    """
    if cache.take(log, list(asked.requests)):
        say(f"{asked.name}: {len(asked.requests)} answers from the cache")
    missing = [place for place in asked.requests if place not in log.found]
    done = len(asked.requests) - len(missing)
    if missing and done:
        say(f"{asked.name}: goes on after {done} of {len(asked.requests)} answers")
    progress = Progress(asked.name, len(asked.requests), done)
    tokens = 0
    for first in range(0, len(missing), batch):
        places = missing[first : first + batch]
        requests = [asked.requests[place] for place in places]
        responses = model.generate(requests)
        written = {
            place: _written(model.tokenizer, request, response)
            for place, request, response in zip(places, requests, responses, strict=True)
        }
        log.append(written)
        tokens += sum(answer.tokens for answer in written.values())
        done += len(places)
        progress.update(done, f"{tokens:,} tokens")
    cache.put(log)
    return {place: log.found[place] for place in asked.requests}


def _written(tokenizer: Tokenizer, request: Request, response: Response) -> Written:
    """The text of a response without what ended it."""
    sampling, ids = request.sampling, list(response.tokens)
    if ids and ids[-1] in sampling.stop_ids:
        ids = ids[:-1]
    text = tokenizer.decode(ids)
    ends = [place for stop in sampling.stop_texts if (place := text.find(stop)) >= 0]
    if ends:
        text = text[: min(ends)]
    return Written(text, len(response.tokens), response.finished or bool(ends))


def _number(text: str) -> int:
    return int(digest(text)[:16], 16)


def sampling_of(asked: Asked, sampling: AskedSampling) -> dict[str, Any]:
    """How answers were sampled, and what the model's length left of the longest answer, for the result."""
    told = dataclasses.asdict(sampling)
    told["stop_texts"] = list(next(iter(asked.requests.values())).sampling.stop_texts)
    if min(asked.limits) < sampling.max_new_tokens:
        told["max_new_tokens_of_the_model"] = min(asked.limits)
    return told
