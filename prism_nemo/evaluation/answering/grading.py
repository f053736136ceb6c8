"""From what a model wrote to verdicts: the verifiers of reinforcement learning, without its gate on the form.

An answer that is no answer counts as wrong, and `Answer.failure` says why: nothing here ends an evaluation whose
answers took hours to generate.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from prism_nemo.config import RewardConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.question import EvaluationTask, Question
from prism_nemo.evaluation.result import Answer, QuestionResult
from prism_nemo.rl.rewards.choice import chosen
from prism_nemo.rl.rewards.code import program_in
from prism_nemo.rl.rewards.exact import normalised
from prism_nemo.rl.rewards.final_answer import statements
from prism_nemo.rl.rewards.judge import Answered, Judge, repeated_share
from prism_nemo.rl.rewards.latex import canonical
from prism_nemo.rl.rewards.task import CLOSE, END, OPEN, Problem, task_named
from prism_nemo.rl.rewards.verifier import verifier_named
from prism_nemo.training.progress import Progress

EMPTY = "empty"
CUT_OFF = "cut off"
REPEATING = "cut off while repeating itself"
THINKING = "thinking not closed"
NOTHING_AFTER = "nothing after thinking"
OPEN_FENCE = "code fence not closed"
# Where one of these is the reason, no answer could be read; elsewhere a verdict could not be had.
FORM = (EMPTY, CUT_OFF, REPEATING, THINKING, NOTHING_AFTER, OPEN_FENCE)

_BATCH = 256
_FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
# A loop shows at the end; parts of 32 bytes are longer than what prose repeats by chance.
_TAIL, _PART, _LOOP = 4000, 32, 0.5


@dataclass(frozen=True)
class Written:
    """What a model wrote.

    Attributes:
        text: Without end token or stop text.
        tokens: Its length, the end token included.
        finished: Whether it ended by itself.
    """

    text: str
    tokens: int
    finished: bool


@dataclass(frozen=True)
class Given:
    """An answer with what it answers.

    Attributes:
        problem: The question.
        prompt: What the model was given.
        written: What it wrote.
    """

    problem: Problem
    prompt: str
    written: Written


def check_verifiers(task: EvaluationTask, rewards: RewardConfig) -> None:
    """Refuse a task whose answers cannot be judged here, before any are generated.

    Raises:
        InputError: Naming the task and the verifier, such as one whose sandbox does not work on this machine.
    """
    for name in sorted({question.problem.verifier for question in task.questions} - {""}):
        try:
            if name == "code" and name not in rewards.verifiers:
                from prism_nemo.rl.rewards.code import CodeVerifier

                CodeVerifier(rewards.sandbox, rewards.code_score)
            else:
                verifier_named(name, rewards.verifiers)
        except InputError as error:
            raise InputError(f"{task.name}: {error}") from None


class Grader:
    """Judges the answers of a task; a context that ends its worker processes.

    Args:
        task: Whose answers.
        rewards: Verifiers and their limits. Penalties and the gate play no part.
    """

    def __init__(self, task: EvaluationTask, rewards: RewardConfig) -> None:
        procedural = {q.problem.task for q in task.questions if not q.problem.verifier}
        # A procedural task knows its form and judges that too.
        config = replace(rewards, gate="think" if procedural else "none", stop_penalty=0.0, repetition_penalty=0.0)
        self._judge = Judge(config, {name: task_named(name) for name in procedural}, task.sampling.max_new_tokens, END)

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._judge.close()

    def grade(self, given: Sequence[Given], done: Callable[[int], None] | None = None) -> list[Answer]:
        """Verdicts in the order of the answers.

        Args:
            given: Answers with their questions.
            done: Told how many were judged so far.

        Raises:
            PrismError: If worker processes cannot be started at all.
        """
        answers: list[Answer] = []
        for first in range(0, len(given), _BATCH):
            answers += self._graded(given[first : first + _BATCH])
            if done is not None:
                done(len(answers))
        return answers

    def _graded(self, given: Sequence[Given]) -> list[Answer]:
        failures = [why_unreadable(item) for item in given]
        judged = [item for item, failure in zip(given, failures, strict=True) if failure is None]
        scores = iter(
            self._judge.score(
                [Answered(i.problem, i.written.text + END, range(i.written.tokens), True) for i in judged]
            )
        )
        answers = []
        for item, failure in zip(given, failures, strict=True):
            written = item.written
            plain = Answer(written.text, written.tokens, written.finished, None, 0.0, failure)
            if failure is None:
                score = next(scores)
                read = read_answer(item.problem, score.answer) if score.well_formed else None
                correct = 0.0 if score.failure else float(score.reward)
                plain = replace(plain, read=read, correct=correct, failure=score.failure)
            answers.append(plain)
        return answers


def judge(
    task: EvaluationTask,
    questions: Sequence[Question],
    prompts: Sequence[str],
    given: Sequence[Sequence[Given]],
    rewards: RewardConfig,
) -> list[QuestionResult]:
    """Questions with their judged answers.

    Args:
        task: Whose.
        questions: Those that were answered.
        prompts: What the model was given for each.
        given: For each its answers.
        rewards: Verifiers and limits.
    """
    flat = [item for group in given for item in group]
    progress = Progress(f"judge {task.name}", len(flat))
    with Grader(task, rewards) as grader:
        verdicts = iter(grader.grade(flat, lambda count: progress.update(count, "answers")))
    return [
        QuestionResult(question.id, question.split, prompt, question.problem.answer, [next(verdicts) for _ in group])
        for question, prompt, group in zip(questions, prompts, given, strict=True)
    ]


def why_unreadable(item: Given) -> str | None:
    """Why an answer counts as wrong without being judged, or None."""
    written, problem = item.written, item.problem
    if not written.text.strip():
        return EMPTY
    if not written.finished:
        tail = written.text.encode()[-_TAIL:]
        return REPEATING if repeated_share(tail, _PART) > _LOOP else CUT_OFF
    opened = item.prompt.rstrip().endswith(OPEN) or OPEN in written.text
    if not problem.verifier:
        return None
    if opened and CLOSE not in written.text:
        return THINKING
    answer = written.text.rpartition(CLOSE)[2]
    if not answer.strip():
        return NOTHING_AFTER
    # Three more backticks would close it; the program may have been cut in the middle.
    return OPEN_FENCE if problem.verifier == "code" and len(_FENCE.findall(answer)) % 2 else None


def read_answer(problem: Problem, answer: str | None) -> str | None:
    """What an answer commits itself to, spelled so that equal answers are equal texts; for votes and for people.

    Votes compare spellings: 1/2 and 0.5 are two answers here, though the verifier takes either.

    Args:
        problem: The question.
        answer: The text after the thinking part.

    Returns:
        For ``choice`` the letter, for ``code`` a hash of the program, else the answer; None if there is none.
    """
    if not answer:
        return None
    try:
        if problem.verifier == "choice":
            return chosen(answer, [str(option) for option in problem.metadata.get("options", [])])
        if problem.verifier == "code":
            return hashlib.sha256(program_in(answer).encode()).hexdigest()[:16] if _FENCE.search(answer) else None
        if problem.verifier == "math":
            found = dict.fromkeys(canonical(statement.text) for statement in statements(answer))
            return ", ".join(found) or None
        return (normalised(answer) or None) if problem.verifier else answer
    except (ValueError, ArithmeticError, LookupError, RecursionError):
        return None  # the verdict stands; only the vote is lost
