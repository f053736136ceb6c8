"""The folder of an evaluation, while it runs and afterwards.

Beside what `result.py` lists there are

    OUT/settings.json                        what the evaluation is; another one is refused
    OUT/answers/TASK.SPLIT.FORMAT.jsonl      answers as they come, until the task is judged
    OUT/elicitation/TASK.SPLIT.FORMAT.jsonl  what a prompt format was chosen by
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import sync
from prism_nemo.checkpoint.lock import RunLock, describe_process
from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.answering.answers import AnswerLog
from prism_nemo.evaluation.result import FORMAT, Answer, Evaluation, QuestionResult, TaskScore
from prism_nemo.run import versions, write_json

EVALUATION = "evaluation.json"
SETTINGS = "settings.json"
JUDGING = "judging"  # in an identity: what decides whether an answer is right
SAMPLES, ANSWERS, ELICITATION = "samples", "answers", "elicitation"


def locked(out: Path) -> RunLock:
    """The lock of an evaluation's folder.

    Raises:
        InputError: If another process has it.
    """
    try:
        lock = RunLock(out)
    except InputError:
        raise InputError(f"--out {out}: another evaluation is running in it; wait for it or use another") from None
    lock.record([describe_process(os.getpid())])
    return lock


class Store:
    """The folder of one evaluation, locked while it runs; a context.

    Args:
        out: The folder; created.
        identity: What the evaluation is. A folder of another one is refused.
        request: How it was asked for, so that it can be judged again.

    Raises:
        InputError: If the folder holds or runs another evaluation, or cannot be made.
    """

    def __init__(self, out: Path, identity: dict[str, Any], request: dict[str, Any]) -> None:
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be made: {error.strerror}") from None
        self._lock = locked(out)
        try:
            self._check(json.loads(json.dumps(identity)))
            write_json(out / SETTINGS, {"identity": identity, "request": request, "versions": versions()})
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def _check(self, identity: dict[str, Any]) -> None:
        if not (self.out / SETTINGS).is_file():
            if (self.out / EVALUATION).exists():
                raise InputError(f"--out {self.out}: holds an evaluation of another kind; use another folder")
            return
        before = read_settings(self.out)["identity"]
        changed = differences(before, identity)
        if changed:
            # Hashes of requests follow from the rest, and are named only where nothing else is.
            changed = [name for name in changed if not {"answers", "trials"} & set(name.split("."))] or changed
            if all(name.partition(".")[0] == JUDGING for name in changed):
                raise InputError(
                    f"--out {self.out}: holds an evaluation that was judged with another {', '.join(changed)}; judge "
                    "its answers again (prism-nemo regrade), or use another folder"
                )
            raise InputError(
                f"--out {self.out}: holds an evaluation with another {', '.join(changed)}; use another folder, or "
                "remove this one"
            )

    def log(self, name: str, key: str, say: Callable[[str], None]) -> AnswerLog:
        """The log of a task, split and format."""
        return AnswerLog(self.out / ANSWERS / f"{name}.jsonl", key, say)


def write_evaluation(out: Path, evaluation: Evaluation) -> None:
    """Write ``evaluation.json``."""
    write_json(out / EVALUATION, dataclasses.asdict(evaluation))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Dotted names of what differs between two settings."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [d for key in keys for d in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))]
    return [] if before == now else [name]


def write_results(path: Path, results: Sequence[QuestionResult]) -> None:
    """Write the questions of a task with their answers and verdicts, whole or not at all.

    Raises:
        PrismError: If the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Line by line: the answers to a benchmark may be gigabytes.
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(result)) + "\n" for result in results)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise PrismError(f"{path}: cannot be written ({error.strerror}); make room and run it again") from None


def read_results(path: Path) -> list[QuestionResult]:
    """The questions of a task as `write_results` left them.

    Raises:
        InputError: Naming file and line.
    """
    results = []
    number = 0
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                number += 1
                if line.strip():
                    row = json.loads(line)
                    row["answers"] = [Answer(**answer) for answer in row["answers"]]
                    results.append(QuestionResult(**row))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}:{number}: is not a question with answers: {error}") from None
    return results


def read_evaluation(out: Path) -> Evaluation:
    """``evaluation.json`` of a folder.

    Raises:
        InputError: If there is none, or it is of another format.
    """
    path = out / EVALUATION
    if not path.is_file() and (out / SETTINGS).is_file():
        raise InputError(f"{out}: the evaluation was not finished; run the same `prism-nemo eval` again")
    try:
        found = json.loads(_text(path))
        if found["format"] != FORMAT:
            raise InputError(f"{path}: has format {found['format']}; this version reads {FORMAT}")
        found["tasks"] = {name: TaskScore(**score) for name, score in found["tasks"].items()}
        return Evaluation(**found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is not an evaluation: {error}") from None


def read_settings(out: Path) -> dict[str, Any]:
    """``settings.json`` of a folder: ``identity`` and ``request``.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    path = out / SETTINGS
    try:
        found: dict[str, Any] = json.loads(_text(path))
        if not {"identity", "request"} <= found.keys():
            raise ValueError("has no identity and request")
        return found
    except (ValueError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error}); remove the folder to evaluate anew") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
