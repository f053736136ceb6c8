"""Does a program do what its tests ask? Programs written by the model, run in the sandbox.

Tests come with a problem's ``metadata``, in one of the forms that data sets use:

| form | keys |
|---|---|
| script | ``cases``: ``[[stdin, stdout], ...]``; or ``inputs`` and ``outputs``, lists of texts |
| calls | the same with ``entry_point`` (or ``fn_name``): ``[[arguments, expected], ...]`` |
| asserts | ``asserts``: Python text, or a list of statements; ``entry_point`` if ``check(candidate)`` is to be called |

Expected values of the first two forms never enter the sandbox: they are compared here with what comes out, so a program
that skips, overrides or imitates the examiner gains nothing. Asserts must enter, as they are code; they run in a
process apart from the program's, which sees only the calls (see `sandbox/examiner.py`).

Asserts have limits of their own: the program's values reach them as plain data (numbers, strings, bytes, lists, tuples,
sets, dicts, deques, Decimal, Fraction) or as an object whose methods can be called; an object never equals a plain
value; two objects of the program are compared by the program's own ``__eq__``; and tests that hand a function of their
own to the program are refused, which is reported as a failure and not as a wrong answer.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.rewards.sandbox import Sandbox, SandboxLimits, plain
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import NoVerdict, Verifier

SCORES = ("all", "share")
_INSIDE = Path(__file__).parent / "sandbox"
_EXAMINER = (_INSIDE / "examiner.py").read_text(encoding="utf-8")
_FILES = {name: (_INSIDE / name).read_text(encoding="utf-8") for name in ("plain.py", "candidate.py")}
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "python3", "py")
_REPORT_BYTES = 64 * 2**20
# Relative difference of floats that counts as equal: what printing with six digits leaves.
_RELATIVE, _ABSOLUTE = 1e-6, 1e-9


@dataclass(frozen=True)
class Tests:
    """The tests of one problem.

    Attributes:
        form: ``stdin``, ``calls`` or ``asserts``.
        inputs: Texts (stdin) or lists of arguments (calls).
        expected: One for each input.
        entry_point: The function that is called; may be None for asserts.
        asserts: Python text.
    """

    form: str
    inputs: tuple[Any, ...]
    expected: tuple[Any, ...]
    entry_point: str | None
    asserts: str


def read_tests(problem: Problem) -> Tests:
    """The tests of a problem, from its metadata.

    Raises:
        InputError: If there are none, or they are not of a form that is known.
    """
    data, what = problem.metadata, f"tests of the problem '{problem.question[:60]}'"
    entry_point = data.get("entry_point") or data.get("fn_name")
    if entry_point is not None and not isinstance(entry_point, str):
        raise InputError(f"{what}: 'entry_point' must be a name, not {entry_point!r}")
    if data.get("asserts"):
        asserts = data["asserts"]
        text = asserts if isinstance(asserts, str) else "\n".join(map(str, asserts))
        return Tests("asserts", (), (), entry_point, f"{data.get('setup', '')}\n{text}")
    if "cases" in data:
        cases = data["cases"]
        if not isinstance(cases, list | tuple) or not all(isinstance(c, list | tuple) and len(c) == 2 for c in cases):
            raise InputError(f"{what}: 'cases' must be a list of pairs: what goes in and what must come out")
    else:
        inputs, outputs = data.get("inputs") or [], data.get("outputs") or []
        if len(inputs) != len(outputs):
            raise InputError(f"{what}: {len(inputs)} 'inputs' but {len(outputs)} 'outputs'")
        cases = list(zip(inputs, outputs, strict=True))
    if not cases:
        raise InputError(f"{what}: there are none; give 'cases', 'inputs' and 'outputs', or 'asserts' in its metadata")
    for given, expected in cases:
        if entry_point and not isinstance(given, list | tuple):
            raise InputError(f"{what}: arguments of '{entry_point}' must be a list, not {given!r}")
        if not entry_point and not (isinstance(given, str) and isinstance(expected, str)):
            raise InputError(f"{what}: without 'entry_point', cases are texts for stdin and stdout, not {given!r}")
    form = "calls" if entry_point else "stdin"
    return Tests(form, tuple(c[0] for c in cases), tuple(c[1] for c in cases), entry_point, "")


def program_in(answer: str) -> str:
    """The last fenced block of Python in an answer; else its last fenced block without a language; else all of it."""
    blocks = _FENCE.findall(answer)
    marked = [body for language, body in blocks if language.lower() in _PYTHON]
    plain_blocks = [body for language, body in blocks if not language]
    return (marked or plain_blocks or [answer])[-1]


class CodeVerifier(Verifier):
    """Runs the program of an answer against the problem's tests; all of them in one sandbox.

    Args:
        sandbox: ``bubblewrap`` or ``process``.
        score: ``all`` (1 if every case passes, else 0) or ``share`` (of the cases that pass).
        limits: Of each answer; wall time of all its cases together.
        case_seconds: Wall time of each case.

    Raises:
        InputError: If the sandbox cannot be had here, before any work starts.
    """

    name = "code"
    isolated = True

    def __init__(
        self,
        sandbox: str = "bubblewrap",
        score: str = "all",
        limits: SandboxLimits | None = None,
        case_seconds: float = 4.0,
    ) -> None:
        if score not in SCORES:
            raise InputError(f"rewards: code score '{score}' is unknown; choose one of {', '.join(SCORES)}")
        self.sandbox, self.score, self.limits = sandbox, score, limits or SandboxLimits()
        self.case_seconds = case_seconds
        with Sandbox(self.limits, sandbox, ready=0) as trial:
            trial.check()

    @classmethod
    def within(cls, seconds: float, sandbox: str, score: str) -> CodeVerifier:
        """One that gives each program so many seconds over all its cases, and half of them for each."""
        limits = SandboxLimits(wall_seconds=seconds, cpu_seconds=seconds)
        return cls(sandbox, score, limits, case_seconds=seconds / 2)

    @property
    def time_limit(self) -> float:
        """Seconds after which a verdict is overdue; the sandbox keeps the program's own limit, whatever it does."""
        return self.limits.wall_seconds + self.limits.start_seconds

    def verify(self, problem: Problem, answer: str) -> float:
        """Score an answer.

        Raises:
            InputError: If the problem's tests cannot be read.
            NoVerdict: If the time was over before a case had failed: a longer one might have shown a right program.
            PrismError: If no verdict could be had: the sandbox failed, or the tests cannot be run here.
        """
        passed = self.cases(problem, answer)
        return sum(passed) / len(passed) if self.score == "share" else float(all(passed))

    def cases(self, problem: Problem, answer: str) -> list[bool]:
        """Which of the problem's cases pass; the same errors as `verify`."""
        tests = read_tests(problem)
        job = {
            "form": tests.form,
            "program": program_in(answer),
            "entry_point": tests.entry_point,
            "case_seconds": self.case_seconds,
            "output_bytes": _output_bytes(tests),
            "stop_at_failure": self.score == "all",
        }
        secret = {"asserts": tests.asserts} if tests.form == "asserts" else {"inputs": tests.inputs}
        told = _sandbox(self.sandbox, self.limits, os.getpid()).run(_EXAMINER, _blob(job) + _blob(secret), _FILES)
        lines = _lines(told.stdout)
        if any("unsupported" in line for line in lines):
            raise PrismError(f"code: {next(line['unsupported'] for line in lines if 'unsupported' in line)}")
        if told.killed_by is None and told.exit_code != 0:
            # The examiner itself failed, not the program, which can end its own process only.
            raise PrismError(f"code: the examiner ended with {told.exit_code}: {told.stderr.strip()[-300:]}")
        if tests.form == "asserts":
            total = next((line["total"] for line in lines if "total" in line), 1)
            passed = [line["passed"] is True for line in lines if "passed" in line]
        else:
            total = len(tests.expected)
            judge = _printed if tests.form == "stdin" else _returned
            passed = [judge(line, expected) for line, expected in zip(lines, tests.expected, strict=False)]
        if told.killed_by == "time" and len(passed) < total and all(passed):
            raise NoVerdict("out of time")
        return passed + [False] * (total - len(passed))


def same_value(value: Any, expected: Any) -> bool:
    """Whether a function's value is the expected one, which came from JSON.

    As Python compares, but: floats within 1e-6 relative; tuples, which JSON lacks, equal lists; keys of dicts, which
    are texts in JSON, equal the numbers they name; True is not 1.
    """
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, float) or isinstance(expected, float):
        numbers = isinstance(value, int | float) and isinstance(expected, int | float)
        return numbers and (
            math.isclose(value, expected, rel_tol=_RELATIVE, abs_tol=_ABSOLUTE)
            or (value != value) & (expected != expected)
        )
    if isinstance(value, list | tuple) and isinstance(expected, list | tuple):
        return len(value) == len(expected) and all(map(same_value, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        named = {key if key in expected else str(key): item for key, item in value.items()}
        return named.keys() == expected.keys() and all(same_value(named[key], expected[key]) for key in expected)
    return bool(value == expected)


def same_output(output: str, expected: str) -> bool:
    """Whether two texts are the same but for spaces at the ends of lines and empty lines at the end."""
    return _stripped(output) == _stripped(expected)


def _stripped(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _printed(line: dict[str, Any], expected: str) -> bool:
    return line.get("exit") == 0 and same_output(str(line.get("output")), expected)


def _returned(line: dict[str, Any], expected: Any) -> bool:
    try:
        return "value" in line and same_value(plain.decode(line["value"]), expected)
    except (plain.NotPlain, RecursionError, OverflowError):
        return False


def _lines(report: str) -> list[dict[str, Any]]:
    """The lines of a report; the last may be cut off, if the sandbox was stopped."""
    lines = []
    for line in report.split("\n"):
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(data, dict):
            break
        lines.append(data)
    return lines


def _output_bytes(tests: Tests) -> int:
    """Kept of each case's output: more than what is expected needs not be seen to be wrong."""
    return 2 * max((len(str(text).encode()) for text in tests.expected), default=0) + 4096


def _blob(data: Any) -> bytes:
    text = json.dumps(data).encode()
    return len(text).to_bytes(8, "little") + text


@lru_cache
def _sandbox(mode: str, limits: SandboxLimits, process: int) -> Sandbox:
    """The sandbox of this process; a verifier is pickled, its sandbox is not.

    What the examiner may write is bounded by the number of cases and what is kept of each, not by the program.
    """
    return Sandbox(replace(limits, output_bytes=_REPORT_BYTES), mode, warn=False)
