"""Answers on disk: as they come, and kept for other evaluations of the same model.

They are appended and synced after each batch. A kill may leave half a line at the end, which is cut off, and those
answers are asked for again: with the same seeds, so they are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import zstandard

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.errors import PrismError
from prism_nemo.evaluation.answering.grading import Written


def digest(value: Any) -> str:
    """SHA-256 of a value of JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class AnswerLog:
    """Answers to one task in one format, on disk as they come.

    Args:
        path: Of the file; one of other answers (`key`) is begun anew.
        key: What decides the answers.
        say: Told what could not be read.

    Attributes:
        found: Answers so far, by question and sample.
    """

    def __init__(self, path: Path, key: str, say: Callable[[str], None]) -> None:
        self.path, self.key = path, key
        self.found: dict[tuple[str, int], Written] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        if not lines or _parsed(lines[0]) != {"key": key}:
            write_text(path, json.dumps({"key": key}) + "\n")
            return
        kept = [lines[0]]
        damaged = 0
        for line in lines[1:]:
            row = _parsed(line)
            try:
                answer = Written(str(row["text"]), int(row["tokens"]), bool(row["finished"]))
                self.found[str(row["id"]), int(row["sample"])] = answer
                kept.append(line)
            except (TypeError, KeyError, ValueError):
                damaged += bool(line.strip())
        if damaged:
            say(f"{path}: {damaged} answers could not be read (a run was ended while it wrote them); asked again")
        # What is appended must not go on a line that was cut short.
        whole = b"\n".join(kept) + b"\n"
        if damaged or whole != b"\n".join(lines):
            write_text(path, whole.decode())

    def append(self, answers: Mapping[tuple[str, int], Written]) -> None:
        """Add answers and wait until they are on disk.

        Raises:
            PrismError: If they cannot be written.
        """
        lines = [
            json.dumps({"id": id, "sample": sample, **dataclasses.asdict(answer)}) + "\n"
            for (id, sample), answer in answers.items()
        ]
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise PrismError(
                f"{self.path}: cannot be written ({error.strerror}); make room and run the same command again"
            ) from None
        self.found.update(answers)

    def remove(self) -> None:
        """Delete the file: the answers stand in the samples now."""
        self.path.unlink(missing_ok=True)


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


class Cache:
    """Answers of finished tasks, by what decides them: model, prompts, sampling, seed and engine.

    Verdicts are not in it: how answers are judged may change, and judging is cheap.

    Args:
        folder: Created when something is put in; None for no cache.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def _path(self, key: str) -> Path | None:
        return None if self._folder is None else self._folder / key[:2] / f"{key}.jsonl.zst"

    def take(self, log: AnswerLog, wanted: Sequence[tuple[str, int]]) -> bool:
        """Fill an empty log with the answers of another evaluation; returns whether there were any.

        An entry that is damaged or does not have all of the wanted answers is no entry.
        """
        path = self._path(log.key)
        if path is None or log.found or not path.is_file():
            return False
        try:
            text = zstandard.ZstdDecompressor().decompress(path.read_bytes())
            rows = [json.loads(line) for line in text.split(b"\n") if line]
            found = {
                (str(row["id"]), int(row["sample"])): Written(str(row["text"]), int(row["tokens"]), row["finished"])
                for row in rows[1:]
            }
        except (zstandard.ZstdError, OSError, ValueError, KeyError, TypeError):
            return False
        if not rows or rows[0] != {"key": log.key} or any(place not in found for place in wanted):
            return False
        log.append({place: found[place] for place in wanted})
        return True

    def put(self, log: AnswerLog) -> None:
        """Keep a finished log's answers; a cache that cannot be written costs nothing but the reuse."""
        path = self._path(log.key)
        if path is None or path.is_file():
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(zstandard.ZstdCompressor().compress(log.path.read_bytes()))
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
