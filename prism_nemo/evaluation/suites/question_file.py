"""Tasks from files of questions: the rows of a prompt file, with ids and splits.

The keys are those of `prism_nemo.rl.prompt_file`, and two more: ``split`` (validation or test) and, for worked examples
in prompts, ``metadata.solution``. A benchmark's file may leave ``reward`` out; see `suites.py`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.hashes import sha256
from prism_nemo.errors import InputError
from prism_nemo.evaluation.question import Question
from prism_nemo.evaluation.settings import SPLITS
from prism_nemo.rl.prompt_file import PromptFile

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")
VALIDATION_SHARE = 0.2


class QuestionFile(PromptFile):
    """A prompt file whose rows may leave keys out that are the same for all of them.

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst``.
        defaults: Values of keys that a row does not have.

    Raises:
        InputError: For a file that cannot be read, or a row that cannot be used; names file, line and key.
    """

    def __init__(self, path: Path, defaults: Mapping[str, Any] | None = None) -> None:
        self._defaults = dict(defaults or {})
        super().__init__(path, ["{question}"])

    def row(self, index: int) -> dict[str, Any]:
        """See `PromptFile.row`."""
        return self._filled(super().row(index))

    def _parsed(self, raw: bytes, number: int) -> dict[str, Any]:
        return self._filled(super()._parsed(raw, number))

    def _filled(self, row: dict[str, Any]) -> dict[str, Any]:
        return {**{key: value for key, value in self._defaults.items() if row.get(key) is None}, **_given(row)}

    def questions(self, splits: str = "test") -> list[Question]:
        """All rows as questions, in the order of the file.

        Args:
            splits: Of rows without a ``split`` of their own: validation, test, or ``hash`` for both.

        Raises:
            InputError: If two questions have one id, a split is unknown, or only some of the rows have one.
        """
        found: list[Question] = []
        lines: dict[str, str] = {}
        own: Counter[bool] = Counter()
        for index in range(len(self)):
            row, problem, where = self.row(index), self.problem(index), self.where(index)
            name = question_id(problem.question) if row.get("id") is None else str(row["id"])
            if name in lines:
                raise InputError(
                    f"{where}: asks the same question as {lines[name]}; remove one of them, or give both an 'id'"
                )
            lines[name] = where
            split = row.get("split")
            own[split is not None] += 1
            if split is not None and split not in SPLITS:
                raise InputError(f"{where}: 'split' must be {' or '.join(SPLITS)}, not {split!r}")
            # What a row words for itself is shown word for word; the rest is put into a format.
            text = problem.text if row.get("prompt") is not None else ""
            split = split or (split_by_hash(problem.question) if splits == "hash" else splits)
            found.append(Question(name, split, replace(problem, text=text)))
        if len(own) > 1:
            raise InputError(f"{self.path}: {own[True]} rows have a 'split' and {own[False]} have none; give it to all")
        return found


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """Without keys that are null, which stand for keys that are not there."""
    return {key: value for key, value in row.items() if value is not None}


def question_id(question: str) -> str:
    """Name of a question that has none: a hash of its text."""
    return hashlib.sha256(question.encode()).hexdigest()[:16]


def split_by_hash(question: str) -> str:
    """The split of a question, a property of its text alone: a fifth is validation."""
    bucket = hashlib.sha256(f"validation/{question}".encode()).digest()[0]
    return "validation" if bucket < 256 * VALIDATION_SHARE else "test"


def find_file(folder: Path, stem: str) -> Path | None:
    """The file of that name with one of the endings of question files, or None."""
    return next((folder / f"{stem}{ending}" for ending in ENDINGS if (folder / f"{stem}{ending}").is_file()), None)


def stem_of(path: Path) -> str:
    """Name of a question file without its ending."""
    return next(path.name.removesuffix(ending) for ending in ENDINGS if path.name.endswith(ending))


def read_questions(
    test: Path, validation: Path | None, defaults: Mapping[str, Any] | None = None, splits: str = "test"
) -> tuple[list[Question], dict[str, Any]]:
    """Questions of a file, and of the file of validation questions beside it.

    Args:
        test: File of the questions.
        validation: File of the validation questions; all rows of it are.
        defaults: See `QuestionFile`.
        splits: Of rows of `test` without a split; see `QuestionFile.questions`.

    Returns:
        The questions, and what is recorded about where they came from: files with their hashes.

    Raises:
        InputError: For a file that cannot be used, or a question that both files have.
    """
    questions = QuestionFile(test, defaults).questions("test" if validation else splits)
    about: dict[str, Any] = {"file": test.name, "sha256": sha256(test)}
    if validation is not None:
        more = QuestionFile(validation, defaults).questions("validation")
        _check_apart(questions, more, test, validation)
        questions = questions + more
        about |= {"validation_file": validation.name, "validation_sha256": sha256(validation)}
    return questions, about


def _check_apart(test: Sequence[Question], validation: Sequence[Question], first: Path, second: Path) -> None:
    ids = {question.id for question in test}
    texts = {question.problem.question for question in test}
    for question in validation:
        if question.split != "validation":
            raise InputError(
                f"{second}: question '{question.id}' says that it is of the test split; move it to {first}"
            )
        if question.id in ids:
            raise InputError(f"{second}: 'id' {question.id!r} is used in {first} too; ids must differ")
        if question.problem.question in texts:
            raise InputError(f"{second}: question '{question.id}' is a question of {first} too; remove it from one")
