"""From responses to scores: the form, the verifier, the penalties, and what to do where there is no verdict."""

from __future__ import annotations

import math
import numbers
import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from prism_nemo.config import RewardConfig
from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.pool import Verdict, VerifierPool
from prism_nemo.rl.rewards.task import CLOSE, END, OPEN, Problem, Score, Task
from prism_nemo.rl.rewards.verifier import NoVerdict, Verifier, verifier_named

GATES = ("think", "none")
_SPELLED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Answered:
    """A response to a problem.

    Attributes:
        problem: The question.
        text: What the model wrote, with the text of the end token if it was reached.
        tokens: The same as ids.
        finished: Whether the end token was reached.
    """

    problem: Problem
    text: str
    tokens: Sequence[int]
    finished: bool


def check_rewards(config: RewardConfig) -> None:
    """Refuse what no judge can work with.

    Raises:
        InputError: Naming the key.
    """
    if config.gate not in GATES:
        raise InputError(f"rewards.gate: '{config.gate}' is unknown; choose one of {', '.join(GATES)}")
    for name in ("workers", "repetition_ngram"):
        if getattr(config, name) < 1:
            raise InputError(f"rewards.{name}: {getattr(config, name)} must be at least 1")
    for name in ("time_limit", "memory_gb", "code_seconds"):
        if not getattr(config, name) > 0:
            raise InputError(f"rewards.{name}: {getattr(config, name)} must be positive")
    for name in ("stop_penalty", "repetition_penalty"):
        if not getattr(config, name) >= 0:
            raise InputError(f"rewards.{name}: {getattr(config, name)} must be 0 or more; it is subtracted")


def how_judged(config: RewardConfig) -> dict[str, Any]:
    """The settings that decide whether an answer is right, apart from the form around it.

    Verdicts under others are of another kind, and are neither put into one file with these nor compared with them.
    """
    names = ("verifiers", "sandbox", "code_score", "code_seconds", "time_limit", "memory_gb")
    return {name: getattr(config, name) for name in names}


class Judge:
    """Scores responses; a context that ends its worker processes.

    A problem of a task is scored by the task; one that names a verifier by that. Verifiers that may hang or crash run
    in processes of their own, and each such accident costs one verdict.

    Args:
        config: Form, verifiers, penalties and limits.
        tasks: By name.
        max_new_tokens: The most a response may have.
        end: Text of the model's end token.

    Raises:
        InputError: For settings or verifiers that cannot work; before any response is scored.
    """

    def __init__(self, config: RewardConfig, tasks: Mapping[str, Task], max_new_tokens: int, end: str = END) -> None:
        check_rewards(config)
        self._config, self._tasks, self._end = config, tasks, end
        self._verifiers: dict[str, Verifier] = {}
        self._pool: VerifierPool | None = None
        self._failures: Counter[str] = Counter()
        for task in tasks.values():
            for name, line in getattr(task, "verifiers", {}).items():
                try:
                    self._verifier(name)
                except InputError as error:
                    raise InputError(f"{task.name.partition(':')[2]}:{line}: {error}") from None

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def take_failures(self) -> dict[str, int]:
        """How many verdicts could not be had since this was last asked, by kind."""
        found = dict(self._failures)
        self._failures.clear()
        return found

    def score(self, answered: Sequence[Answered]) -> list[Score]:
        """One score for each response, in their order."""
        scores: list[Score | None] = [None] * len(answered)
        asked: list[tuple[int, str, Problem, str]] = []
        for i, item in enumerate(answered):
            if not item.problem.verifier:
                scores[i] = self._by_task(item)
                continue
            well_formed, answer = self._form(item)
            if answer is None:
                scores[i] = Score(0.0, well_formed, None, 0.0)
            else:
                asked.append((i, item.problem.verifier, item.problem, answer))
        for (i, _, _, answer), verdict in zip(asked, self._verdicts(asked), strict=True):
            scores[i] = _judged(verdict, answer)
        result = []
        for item, score in zip(answered, scores, strict=True):
            if score is None:
                raise RuntimeError("a response was left without a score")
            if score.failure is not None:
                self._failures[score.failure] += 1
            result.append(self._penalised(item, score))
        return result

    def _verifier(self, name: str) -> Verifier:
        if name not in self._verifiers:
            if name == "code" and name not in self._config.verifiers:
                from prism_nemo.rl.rewards.code import CodeVerifier

                self._verifiers[name] = CodeVerifier.within(
                    self._config.code_seconds, self._config.sandbox, self._config.code_score
                )
            else:
                self._verifiers[name] = verifier_named(name, self._config.verifiers)
            if self._verifiers[name].isolated:
                _check_pickles(name, self._verifiers[name])
        return self._verifiers[name]

    def _verdicts(self, asked: list[tuple[int, str, Problem, str]]) -> list[Verdict]:
        """In the order asked."""
        verdicts: list[Verdict | None] = [None] * len(asked)
        isolated = []
        for n, (_, name, problem, answer) in enumerate(asked):
            verifier = self._verifier(name)
            if verifier.isolated:
                isolated.append(n)
            else:
                verdicts[n] = verdict_of(verifier, problem, answer)
        if isolated:
            if self._pool is None:
                self._pool = VerifierPool(self._config.workers, self._config.time_limit, self._config.memory_gb)
            jobs = [(self._verifier(asked[n][1]), asked[n][2], asked[n][3]) for n in isolated]
            for n, verdict in zip(isolated, self._pool.run(jobs), strict=True):
                verdicts[n] = verdict
        return [verdict if verdict is not None else Verdict(None, "no verdict") for verdict in verdicts]

    def _body(self, item: Answered) -> str:
        """A response without its end token."""
        return item.text.removesuffix(self._end) if item.finished else item.text

    def _by_task(self, item: Answered) -> Score:
        """A task's own rule, which knows its form.

        A task looks for `END`, whatever the model's end token is called; and a model that spells `END` in letters has
        not ended.
        """
        task = self._tasks[item.problem.task]
        body = self._body(item)
        try:
            if self._config.gate == "think":
                score = task.score(item.problem, body.replace(END, _SPELLED) + (END if item.finished else ""))
            else:
                answer = body.rpartition(CLOSE)[2].strip()
                score = Score(task.grade(item.problem, answer), True, answer)
        except Exception as error:  # a task of the user's may raise anything
            return Score(0.0, False, None, 0.0, failure=f"raised {type(error).__name__}")
        problem = _not_a_mark(score.reward)
        return score if problem is None else Score(0.0, score.well_formed, score.answer, 0.0, failure=problem)

    def _form(self, item: Answered) -> tuple[bool, str | None]:
        """Whether the response has the required form, and its answer, None if there is nothing to verify.

        The study's gate (arXiv 2603.17074, section 9.1): ``<think> ... </think> response``, and the end token. A prompt
        may have opened the thinking already.
        """
        body = self._body(item)
        if self._config.gate == "none":
            answer = body.rpartition(CLOSE)[2].strip()
            return True, answer or None
        opened = item.problem.prompt.rstrip().endswith(OPEN)
        form = body.count(CLOSE) == 1 and (
            OPEN not in body if opened else body.count(OPEN) == 1 and body.lstrip().startswith(OPEN)
        )
        if not (form and item.finished):
            return False, None
        return True, body.split(CLOSE)[1].strip() or None

    def _penalised(self, item: Answered, score: Score) -> Score:
        penalties = {}
        if self._config.stop_penalty and not item.finished:
            penalties["stop"] = -self._config.stop_penalty
        if self._config.repetition_penalty:
            share = repeated_share(item.tokens, self._config.repetition_ngram)
            if share:
                penalties["repetition"] = -self._config.repetition_penalty * share
        if not penalties:
            return score
        correct = score.reward if score.correct is None else score.correct
        return replace(score, reward=score.reward + sum(penalties.values()), correct=correct, penalties=penalties)


def repeated_share(tokens: Sequence[int], n: int) -> float:
    """Share of a response's n-grams that occurred in it before: 0 for none, close to 1 for an endless loop.

    ``1 - distinct n-grams / n-grams``, of tokens; 0 where there is no n-gram.
    """
    count = len(tokens) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[i : i + n]) for i in range(count)}) / count


def verdict_of(verifier: Verifier, problem: Problem, answer: str) -> Verdict:
    """Ask a verifier in this process; whatever it does wrong is named."""
    try:
        value = verifier.verify(problem, answer)
    except NoVerdict as error:
        return Verdict(None, str(error))
    except (Exception, SystemExit) as error:  # a verifier must not end the trainer
        return Verdict(None, f"raised {type(error).__name__}", _told(error))
    problem_found = _not_a_mark(value)
    return Verdict(float(value), None) if problem_found is None else Verdict(None, problem_found)


def _check_pickles(name: str, verifier: Verifier) -> None:
    """Refuse a verifier that no worker process could be given."""
    try:
        pickle.dumps(verifier)
    except Exception as error:  # pickle raises what the object's parts raise
        raise InputError(
            f"reward '{name}': {type(verifier).__name__} cannot be sent to a worker process: {_told(error)}. Keep what "
            "cannot be pickled out of it (open it in prepare()), or set isolated = False"
        ) from None


def _told(error: BaseException) -> str:
    """What an error says; one of the user's may fail to say it."""
    try:
        return str(error)[:300]
    except Exception:
        return ""


def _not_a_mark(value: object) -> str | None:
    """Why a value is no verdict between 0 and 1, or None."""
    if not isinstance(value, numbers.Real) or math.isnan(value):
        return "not a number"
    return None if 0.0 <= float(value) <= 1.0 else "outside 0 to 1"


def _judged(verdict: Verdict, answer: str) -> Score:
    if verdict.value is None:
        return Score(0.0, True, answer, 0.0, failure=verdict.failure)
    return Score(verdict.value, True, answer, verdict.value)
