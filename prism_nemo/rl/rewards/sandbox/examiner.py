"""Examines a candidate program; runs inside of the sandbox, in a process of its own beside that of the candidate.

What must be true for a program to score: the right values come out of it. They are compared by `code.py`, outside of
the sandbox, with expected values that never get in. Asserts are the exception: they hold the expected values in their
text. They run here, in the examiner's process; the candidate's was forked off before the text was read and has no way
into it (no ptrace, no /proc, no file), and what it returns arrives as plain data.

Stdin: a job and then, once the candidate is running, its tests; each is JSON after eight bytes of length. Stdout: a
line of JSON for each case.
"""

import ast
import builtins
import contextlib
import json
import os
import signal
import sys

import plain
from candidate import ERROR_CHARACTERS, Candidate, Ended, Unsupported, become

os.unlink("plain.py")
os.unlink("candidate.py")
sys.path.remove("")  # from now on the folder is the candidate's: nothing here may be imported from it


class OutOfTime(BaseException):
    """The case took too long; not an Exception, so that tests do not catch it."""


def main():
    """Read the job, examine, report."""
    report = os.fdopen(os.dup(1), "w", encoding="utf-8")
    sys.stdout = sys.stderr  # what tests print is not a report

    def tell(**line):
        report.write(json.dumps(line) + "\n")
        report.flush()

    signal.signal(signal.SIGALRM, _out_of_time)
    job = json.loads(read_blob())
    {"stdin": examine_runs, "calls": examine_calls, "asserts": examine_asserts}[job["form"]](job, tell)


def read_blob():
    """A text of stdin, unbuffered: what follows must not be in this process yet."""

    def exactly(size):
        data = b""
        while len(data) < size:
            part = os.read(0, size - len(data))
            if not part:
                raise EOFError("the job is cut off")
            data += part
        return data

    return exactly(int.from_bytes(exactly(8), "little")).decode("utf-8")


def _out_of_time(*_):
    raise OutOfTime


@contextlib.contextmanager
def limited(seconds):
    """Raises OutOfTime after some wall time."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def examine_runs(job, tell):
    """The program is run once for each input, as a script."""
    for text in json.loads(read_blob())["inputs"]:
        given, out, err = (os.memfd_create(name) for name in ("in", "out", "err"))
        os.write(given, text.encode("utf-8", "replace"))
        os.lseek(given, 0, os.SEEK_SET)
        child = os.fork()
        if child == 0:
            become(job["program"], "__main__", given, out, err)
        status = wait(child, job["case_seconds"])
        output, error = (os.pread(fd, job["output_bytes"], 0).decode("utf-8", "replace") for fd in (out, err))
        tell(exit=status, output=output, error=error[-ERROR_CHARACTERS:])
        for fd in (given, out, err):
            os.close(fd)
        if status != 0 and job["stop_at_failure"]:
            break


def wait(child, seconds):
    """Wait for a process and return its exit code; kill it after `seconds` and return None."""
    try:
        with limited(seconds):
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except OutOfTime:
        try:
            os.kill(child, signal.SIGKILL)
        except PermissionError:
            return None  # process mode without root forbids all signals: it ends with the sandbox
        except ProcessLookupError:
            pass
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
        return None


def examine_calls(job, tell):
    """One function is called with each list of arguments; a fresh process after one that hung or ended."""
    candidate = Candidate(job["program"])
    for arguments in json.loads(read_blob())["inputs"]:
        lost = False
        try:
            with limited(job["case_seconds"]):
                value = plain.encode(candidate.ask("function", job["entry_point"], *arguments))
            tell(value=value)
            continue
        except OutOfTime:
            failed, lost = "out of time", True
        except Exception as error:
            failed, lost = f"{type(error).__name__}: {error}", isinstance(error, Ended)
        tell(error=failed[:ERROR_CHARACTERS])
        if job["stop_at_failure"] or (lost and not candidate.close()):
            break
        if lost:
            candidate = Candidate(job["program"])


class Names(dict):
    """Global names of the tests: their own, builtins, the standard library, and then the program's.

    In this order, so that a program cannot answer for `abs` or `math.isclose`; the name under test comes first of all.
    """

    def __init__(self, candidate, entry_point):
        super().__init__(__name__="tests")
        self._candidate, self._entry_point = candidate, entry_point

    def __missing__(self, name):
        if self._entry_point and name in (self._entry_point, "candidate"):
            return self._candidate.ask("name", self._entry_point)
        if hasattr(builtins, name):
            raise KeyError(name)
        if name in sys.stdlib_module_names:
            return __import__(name)
        return self._candidate.ask("name", name)


def examine_asserts(job, tell):
    """The statements of the tests are run one after the other, here; each that can find fault is a case."""
    candidate = Candidate(job["program"])
    tests = json.loads(read_blob())
    try:
        statements, cases = planned(tests["asserts"])
    except Unsupported as error:
        tell(unsupported=str(error))
        return
    tell(total=len(cases))
    namespace = Names(candidate, job["entry_point"])
    for statement in statements:
        failed = None
        try:
            with limited(job["case_seconds"]):
                exec(compile(ast.Module([statement], []), "tests.py", "exec"), namespace)
        except Unsupported as error:
            tell(unsupported=str(error))
            return
        except OutOfTime:
            failed = "out of time"
        except BaseException as error:
            failed = f"{type(error).__name__}: {error}"
        # Of what is no case only that it failed: then nothing after it can be right.
        if statement in cases or failed:
            tell(passed=failed is None, error=(failed or "")[:ERROR_CHARACTERS])
        # The tests are in this process: no fresh candidate can be forked off, which could find them in its memory.
        if failed and (job["stop_at_failure"] or failed == "out of time" or statement not in cases):
            return


def planned(text):
    """The statements of tests that are run, and those of them that are cases.

    A case is a statement with an assert in it, or one that uses what has an assert in it: a docstring, a ``print`` or
    a guard of ``__main__`` passes whatever the program does.

    Raises:
        Unsupported: For tests that are no Python, or would pass without having asserted anything.
    """
    try:
        statements = [s for s in ast.parse(text, "tests.py").body if not _is_guard(s)]
    except (SyntaxError, ValueError) as error:
        raise Unsupported(f"the asserts are not Python: {error}") from None
    names = [s.name for s in statements if isinstance(s, ast.FunctionDef)]
    calls = [s.value for s in statements if isinstance(s, ast.Expr) and isinstance(s.value, ast.Call)]
    called = {getattr(call.func, "id", "") for call in calls}
    if "check" in names and "check" not in called:
        statements += ast.parse("check(candidate)").body
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.ClassDef) and any(_name(base).endswith("TestCase") for base in node.bases):
            raise Unsupported(f"the asserts hold the unittest class {node.name}, which nothing here would run")
        if isinstance(node, _FUNCTIONS) and node.name.startswith("test") and not _is_used(node.name, statements):
            raise Unsupported(f"the asserts define {node.name} and never call it")
    binding = [(s, _bound(s)) for s in statements if isinstance(s, _PREPARING)]
    asserting: set[str] = set()  # names behind which there is an assert
    while more := {n for s, bound in binding for n in bound if n not in asserting and _asserts(s, asserting)}:
        asserting |= more
    cases = [s for s in statements if not isinstance(s, _PREPARING) and _asserts(s, asserting)]
    if not cases:
        raise Unsupported("the asserts assert nothing")
    return statements, cases


def _is_guard(statement):
    """Whether it is ``if __name__ == "__main__":``, which does not hold here."""
    return isinstance(statement, ast.If) and any(_name(node) == "__name__" for node in ast.walk(statement.test))


def _name(node):
    """The last part of a dotted name, or nothing."""
    return getattr(node, "id", "") or getattr(node, "attr", "")


def _is_used(name, statements):
    return any(_name(node) == name for statement in statements for node in ast.walk(statement))


def _bound(statement):
    """The names that a statement gives a value."""
    if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
        return {statement.name}
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _asserts(statement, asserting):
    """Whether an assert is in a statement, or behind a name in it; `raise`, exits and assertEqual are asserts too."""
    for node in ast.walk(statement):
        name = _name(node)
        if isinstance(node, (ast.Assert, ast.Raise)) or name in asserting:
            return True
        if name.lower().startswith("assert") or name in ("raises", "exit", "fail", "exec"):
            return True
    return False


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Statements that are no case by themselves.
_PREPARING = (
    *_FUNCTIONS, ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Pass,
)  # fmt: skip

main()
