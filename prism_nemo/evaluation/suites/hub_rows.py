"""Questions of the study's benchmarks from the Hugging Face Hub, as rows of question files.

What is fetched is saved beside the other files, so that it is fetched once and every model gets the same questions.
The columns are those that the data sets had in 2025. Not yet run against the Hub: tested on rows of that form.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import write_text

# Months of LiveCodeBench that the study's 279 problems come from (release v5, August 2024 to January 2025).
_MONTHS = ("2024-08", "2024-09", "2024-10", "2024-11", "2024-12", "2025-01")
_STDIN = "Write a Python program that reads from standard input and writes to standard output."


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hub.

    Attributes:
        id: Of the data set.
        split: Name of its split.
        form: Which of `FORMS` its rows have.
        config: Name of its configuration.
        files: JSON files to read instead, for data sets that have a loading script.
    """

    id: str
    split: str
    form: str
    config: str | None = None
    files: tuple[str, ...] = ()


def fetch(source: HubSource, path: Path) -> str | None:
    """Save a data set as a question file.

    Args:
        source: The data set.
        path: The file to write; its folder is created.

    Returns:
        None, or why it could not be had.
    """
    if any(os.environ.get(name, "0").upper() in ("1", "TRUE", "ON") for name in _OFFLINE):
        return f"{' or '.join(_OFFLINE)} says that there is no network"
    try:
        import datasets
        from huggingface_hub import HfApi
    except ImportError:
        return "the package `datasets` is not installed"
    try:
        commit = HfApi().dataset_info(source.id).sha
        if source.files:
            names = [f"hf://datasets/{source.id}@{commit}/{name}" for name in source.files]
            found = datasets.load_dataset("json", data_files=names, split="train", streaming=True)
        else:
            found = datasets.load_dataset(source.id, source.config, split=source.split, revision=commit)
        rows = list(convert(source, found, f"{source.id}@{commit}"))
    except Exception as error:  # offline, not allowed, other columns: a dozen classes of three libraries
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
    if not rows:
        return "it has no questions of the form that is known here"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    return None


_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def convert(source: HubSource, rows: Iterable[Mapping[str, Any]], origin: str) -> Iterator[dict[str, Any]]:
    """Rows of a data set as rows of a question file.

    Args:
        source: Of the rows.
        rows: As the data set has them.
        origin: Recorded in each row.

    Raises:
        KeyError: If a column is missing.
    """
    form = FORMS[source.form]
    for row in rows:
        made = form(row)
        if made is not None:
            yield {**made, "source": origin}


def _aime(row: Mapping[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {"question": row["problem"], "answer": str(row["answer"])}
    return {"id": str(row["id"]), **made} if row.get("id") is not None else made


def _math500(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "id": row["unique_id"],
        "question": row["problem"],
        "answer": row["answer"],
        "metadata": {"subject": row.get("subject"), "level": row.get("level"), "solution": row.get("solution")},
    }


def _gpqa(row: Mapping[str, Any]) -> dict[str, Any]:
    # The right one first, for all of them: the order that is shown depends on the question (choice.shuffled_options).
    options = [str(row["Correct Answer"]).strip()] + [str(row[f"Incorrect Answer {i}"]).strip() for i in (1, 2, 3)]
    return {"id": row["Record ID"], "question": str(row["Question"]).strip(), "options": options, "answer": 0}


def _livecodebench(row: Mapping[str, Any]) -> dict[str, Any] | None:
    if str(row["contest_date"])[:7] not in _MONTHS:
        return None
    tests = json.loads(row["public_test_cases"]) + _private_tests(row["private_test_cases"])
    metadata: dict[str, Any] = {"platform": row.get("platform"), "difficulty": row.get("difficulty")}
    question = str(row["question_content"])
    if tests[0]["testtype"] == "functional":
        name = json.loads(row["metadata"])["func_name"]
        # Arguments stand on a line each, as JSON.
        cases: list[list[Any]] = [
            [[json.loads(line) for line in t["input"].splitlines() if line.strip()], json.loads(t["output"])]
            for t in tests
        ]
        metadata |= {"entry_point": f"Solution.{name}", "cases": cases}
        question += f"\n\nComplete this Python program:\n```python\n{row['starter_code']}\n```"
    else:
        metadata["cases"] = [[t["input"], t["output"]] for t in tests]
        question += f"\n\n{_STDIN}"
    return {"id": row["question_id"], "question": question, "metadata": metadata}


def _private_tests(text: str) -> list[dict[str, Any]]:
    try:
        return list(json.loads(text))
    except ValueError:
        # JSON in a pickle, compressed, in base64. A pickle may hold code: only one that is a text is read.
        packed = zlib.decompress(base64.b64decode(text))
        return list(json.loads(_TextUnpickler(io.BytesIO(packed)).load()))


class _TextUnpickler(pickle.Unpickler):
    """Reads pickles of built-in values and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a pickle that asks for {module}.{name} is not read")


def _codeforces(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """None for what an output alone cannot judge here: interactive problems, and input from a file."""
    tests = row.get("official_tests") or row.get("examples") or []
    if row.get("interaction_format") or row.get("input_mode") == "file" or not tests:
        return None
    parts = [f"{row['title']}\n\n{row['description']}"]
    for name in ("input", "output"):
        if row.get(f"{name}_format"):
            parts.append(f"{name.capitalize()}:\n{row[f'{name}_format']}")
    parts += [f"Example input:\n{e['input']}\nExample output:\n{e['output']}" for e in row.get("examples") or []]
    if row.get("note"):
        parts.append(f"Note:\n{row['note']}")
    return {
        "id": row["id"],
        "question": "\n\n".join([*parts, _STDIN]),
        "metadata": {"rating": row.get("rating"), "cases": [[t["input"], t["output"]] for t in tests]},
    }


FORMS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any] | None]] = {
    "aime": _aime,
    "math500": _math500,
    "gpqa": _gpqa,
    "livecodebench": _livecodebench,
    "codeforces": _codeforces,
}
