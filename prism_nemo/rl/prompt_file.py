"""Prompts from a file of JSON lines, each with what is needed to judge an answer.

| key | meaning |
|---|---|
| ``question`` | what is asked; put into a template |
| ``prompt`` | instead of it: the prompt word for word |
| ``answer`` | text or number; for ``choice`` the index or the letter of the right option; not needed for ``code`` |
| ``reward`` | what judges an answer: ``math``, ``choice``, ``exact``, ``code``, or a name in ``rewards.verifiers`` |
| ``options`` | texts to choose from, for ``choice`` or a verifier of yours; their order depends on the question |
| ``metadata`` | more for the verifier, such as the tests of a program |
| ``domain``, ``id`` | optional; the domain is the reward's name if not given, ids must differ |

Other keys are kept and not looked at; null stands for a key that is not there.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import zstandard

from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.rewards.task import OPEN, Problem, Task

PREFIX = "prompts:"
TEMPLATE = "Q: {question}\n" + OPEN
_LETTERS = "ABCDEFGHIJ"
_BATCH = 1024
_TOKENS_PER_BYTE = 4
# Of an answer that is a word, a number or a program, options would be left out of the prompt without a word.
_WITHOUT_OPTIONS = ("math", "exact", "code")


class PromptFile(Task):
    """A list of prompts. Rows of a plain file stay on disk, and memory holds where each begins (28 bytes a row); those
    of a compressed file are kept in memory, decompressed.

    Args:
        path: ``.jsonl``, ``.jsonl.gz`` or ``.jsonl.zst``.
        templates: Forms of a prompt, with ``{question}`` in each; one is picked per question, always the same one.

    Attributes:
        verifiers: Name of each verifier that rows ask for, and the first line that does.
        domains: Number of rows of each.

    Raises:
        InputError: For a file that cannot be read, or a row that cannot be used; names file, line and key.
        PrismError: From `row` and `problem`, if the file has been changed since.
    """

    def __init__(self, path: Path, templates: Sequence[str] = ()) -> None:
        self.path, self.name, self.domain = path, f"{PREFIX}{path}", "prompts"
        self.templates = list(templates) or [TEMPLATE]
        for template in self.templates:
            if "{question}" not in template:
                raise InputError(f"prompt_templates: '{template}' has no {{question}}")
        self._file, self._unpacked = path.absolute(), _unpacked(path)
        self.verifiers: dict[str, int] = {}
        self.domains: Counter[str] = Counter()
        self._spans, self._lines, self._checks = self._index()

    def __len__(self) -> int:
        return len(self._lines)

    def row(self, index: int) -> dict[str, Any]:
        """A row as it stands in the file."""
        start, size = int(self._spans[index, 0]), int(self._spans[index, 1])
        try:
            with self._open() as stream:
                stream.seek(start)
                raw = stream.read(size)
        except FileNotFoundError:
            raise PrismError(f"{self.where(index)}: the file was removed after it was read; start again") from None
        if zlib.crc32(raw) != self._checks[index]:
            # Offsets into another file would give half rows, or another question with this one's number.
            raise PrismError(f"{self.where(index)}: the file was changed after it was read; start again")
        return dict(json.loads(raw))

    def problem(self, index: int) -> Problem:
        """A row as a problem."""
        return self._problem(self.row(index), int(self._lines[index]))

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`."""
        return self.problem(rng.randrange(len(self)))

    def sample(self, rng: random.Random, split: str) -> Problem:
        """Any row, whatever the split: a file is one split, and whoever wrote it knows which."""
        return self.draw(rng)

    def distinct(self, count: int, split: str, seed: int) -> list[Problem]:
        """See `Task.distinct`; rows in random order, the first of those with the same question."""
        order = list(range(len(self)))
        random.Random(f"{self.name}/{split}/{seed}").shuffle(order)
        found: dict[str, Problem] = {}
        for index in order:
            if len(found) == count:
                break
            problem = self.problem(index)
            found.setdefault(problem.question, problem)
        return list(found.values())

    def where(self, index: int) -> str:
        """File and line of a row, for messages."""
        return f"{self.path}:{int(self._lines[index])}"

    def _open(self) -> IO[bytes]:
        return self._file.open("rb") if self._unpacked is None else io.BytesIO(self._unpacked)

    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(rows, 2) first byte and size of each row, its line number and its checksum; every row is checked."""
        spans: list[tuple[int, int]] = []
        lines: list[int] = []
        checks: list[int] = []
        ids: dict[str, int] = {}
        start = 0
        with self._open() as stream:
            for number, raw in enumerate(stream, start=1):
                if raw.strip():
                    row = self._parsed(raw, number)
                    problem = self._problem(row, number)
                    if row.get("id") is not None:
                        before = ids.setdefault(str(row["id"]), number)
                        if before != number:
                            raise InputError(f"{self.path}:{number}: 'id' {row['id']!r} is that of line {before} too")
                    self.verifiers.setdefault(problem.verifier, number)
                    self.domains[problem.domain] += 1
                    spans.append((start, len(raw)))
                    lines.append(number)
                    checks.append(zlib.crc32(raw))
                start += len(raw)
        if not spans:
            raise InputError(f"{self.path}: holds no prompts; write one JSON object per line")
        return np.array(spans, np.int64), np.array(lines, np.int64), np.array(checks, np.uint32)

    def _parsed(self, raw: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(raw.decode("utf-8"))
            if rb"\ud" in raw.lower():  # half of a pair of surrogates is valid JSON and no text
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.path}:{number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise InputError(f"{self.path}:{number}: every line must be one JSON object, not {type(row).__name__}")
        return row

    def _problem(self, row: dict[str, Any], number: int) -> Problem:
        where = f"{self.path}:{number}"
        given = [key for key in ("question", "prompt") if row.get(key) is not None]
        if len(given) != 1:
            raise InputError(f"{where}: needs 'question' or 'prompt', one of them")
        question = _text(row, given[0], where)
        verifier = _text(row, "reward", where)
        metadata = {} if row.get("metadata") is None else row["metadata"]
        if not isinstance(metadata, dict):
            raise InputError(f"{where}: 'metadata' must be an object, not {_short(metadata)}")
        domain = verifier if row.get("domain") is None else _text(row, "domain", where)
        shown = question
        if verifier == "choice" or row.get("options") is not None:
            if given[0] == "prompt":
                raise InputError(f"{where}: 'prompt' is shown word for word, and 'options' are not; give 'question'")
            if verifier in _WITHOUT_OPTIONS:
                raise InputError(f"{where}: 'options' are for reward choice, and this row's is {verifier}")
            shown, answer, options = self._choice(row, question, where)
            metadata = {**metadata, "options": options}
        elif verifier == "code":
            answer = "" if row.get("answer") is None else str(row["answer"])
        else:
            answer = _answer(row, where)
        text = shown if given[0] == "prompt" else self._template(question).replace("{question}", shown)
        problem = Problem(self.name, question, "", answer, metadata, domain, verifier, text)
        if verifier == "code":
            from prism_nemo.rl.rewards.code import read_tests

            try:
                read_tests(problem)
            except InputError as error:
                raise InputError(f"{where}: {error}") from None
        return problem

    def _template(self, question: str) -> str:
        if len(self.templates) == 1:
            return self.templates[0]
        digest = hashlib.sha256(question.encode()).digest()
        return self.templates[int.from_bytes(digest[:8], "big") % len(self.templates)]

    def _choice(self, row: dict[str, Any], question: str, where: str) -> tuple[str, str, list[str]]:
        """The question with its lettered options, the right letter, and the options as shown."""
        from prism_nemo.rl.rewards.choice import shuffled_options

        options = row.get("options")
        if not isinstance(options, list) or not all(isinstance(o, str) and o.strip() for o in options):
            raise InputError(f"{where}: 'options' must be a list of texts")
        if not 2 <= len(options) <= len(_LETTERS) or len(set(options)) < len(options):
            raise InputError(f"{where}: 'options' must be 2 to {len(_LETTERS)} different texts")
        answer = row.get("answer")
        if isinstance(answer, str) and len(answer) == 1 and answer.upper() in _LETTERS:
            answer = _LETTERS.index(answer.upper())
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
            raise InputError(
                f"{where}: 'answer' must be the index (from 0) or the letter of one of the {len(options)} options, "
                f"not {_short(row.get('answer'))}"
            )
        ordered, letter = shuffled_options(question, options, answer, 0)
        listed = "\n".join(f"{_LETTERS[i]}. {option}" for i, option in enumerate(ordered))
        return f"{question}\n{listed}", letter, ordered


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: '{key}' must be a text that is not empty, not {_short(value)}")
    return value


def _answer(row: dict[str, Any], where: str) -> str:
    value = row.get("answer")
    number = isinstance(value, int) and not isinstance(value, bool)
    if not (number or (isinstance(value, float) and math.isfinite(value))) and not (
        isinstance(value, str) and value.strip()
    ):
        raise InputError(f"{where}: 'answer' must be a text or a number, not {_short(value)}")
    return str(value)


def _short(value: Any) -> str:
    """A value for a message; rows may be long."""
    text = repr(value)
    return "missing" if value is None else text if len(text) <= 60 else f"{text[:57]}..."


def _unpacked(path: Path) -> bytes | None:
    """The bytes of a compressed file; None for a plain one, which can be opened."""
    try:
        if path.name.endswith(".gz"):
            return gzip.decompress(path.read_bytes())
        if path.name.endswith(".zst"):
            return _unzst(path.read_bytes())
        path.open("rb").close()
        return None
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path}: is damaged ({error}); copy it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _unzst(data: bytes) -> bytes:
    """All frames of a zstd file: one that was appended to has several, and a decompressor stops after the first.

    Raises:
        ZstdError: If it ends inside of a frame.
    """
    parts = []
    while data:
        stream = zstandard.ZstdDecompressor().decompressobj()
        parts.append(stream.decompress(data))
        if not stream.eof:
            raise zstandard.ZstdError("it ends inside of a frame")
        data = stream.unused_data
    return b"".join(parts)


def check_prompt_lengths(
    tasks: Sequence[Task], tokenizer: Tokenizer, room: int, option: str = "rollout.max_new_tokens"
) -> None:
    """Refuse prompt files with prompts that leave no room for a response.

    Args:
        tasks: Those that are prompt files are looked at.
        tokenizer: The model's.
        room: Most tokens of a prompt: the model's positions less those of the longest response.
        option: What sets the latter, for the message.

    Raises:
        InputError: With the number of such prompts and the line of the longest.
    """
    for task in tasks:
        if not isinstance(task, PromptFile):
            continue
        longest, at, count = 0, 0, 0
        for first in range(0, len(task), _BATCH):
            prompts = {i: task.problem(i).prompt for i in range(first, min(first + _BATCH, len(task)))}
            # Encoding 300,000 prompts takes a minute, and every rank does it. A byte is at most a token, or three where
            # a normaliser takes a character apart (NFD), so most prompts are short enough without a look.
            prompts = {i: text for i, text in prompts.items() if len(text.encode()) > room // _TOKENS_PER_BYTE}
            for index, ids in zip(prompts, tokenizer.encode_batch(list(prompts.values())), strict=True):
                count += len(ids) > room
                if len(ids) > longest:
                    longest, at = len(ids), index
        if count:
            raise InputError(
                f"{task.path}: {count} of {len(task)} prompts are longer than the {room} tokens that "
                f"{option} leaves; the longest has {longest} tokens ({task.where(at)}). Lower {option} or remove them"
            )
