"""Programs score if and only if the right values come out of them, however hard they try otherwise."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
from decimal import Decimal
from fractions import Fraction

import pytest
from sandbox_tools import BOTH

from prism_nemo.config import RewardConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.rewards.code import CodeVerifier, program_in, read_tests, same_output, same_value
from prism_nemo.rl.rewards.judge import Judge, verdict_of
from prism_nemo.rl.rewards.pool import Verdict
from prism_nemo.rl.rewards.sandbox import SandboxLimits, plain
from prism_nemo.rl.rewards.task import Problem

LIMITS = SandboxLimits(wall_seconds=15)


def problem(**metadata) -> Problem:
    return Problem("code", "Add two numbers.", "", "", metadata)


CALLS = problem(entry_point="add", cases=[[[1, 2], 3], [[5, -7], -2]])
SCRIPT = problem(cases=[["1 2\n", "3\n"], ["5 -7\n", "-2\n"]])
ASSERTS = problem(asserts=["assert add(1, 2) == 3", "assert add(5, -7) == -2"])
CHECK = problem(
    entry_point="add",
    asserts="""
def check(candidate):
    for a in (1, 5):
        assert candidate(a, 2) == a + 2
    assert abs(candidate(0.5, 0.25) - 0.75) < 1e-6
""",
)
FORMS = {"calls": CALLS, "asserts": ASSERTS, "check": CHECK}
RIGHT = "def add(a, b):\n    return a + b\n"
RIGHT_SCRIPT = "a, b = map(int, input().split())\nprint(a + b)\n"


@pytest.fixture(scope="module", params=BOTH)
def verifier(request):
    return CodeVerifier(request.param, limits=LIMITS, case_seconds=1.0)


@pytest.fixture(scope="module")
def share(verifier):
    return CodeVerifier(verifier.sandbox, "share", LIMITS, case_seconds=1.0)


@pytest.mark.parametrize("form", FORMS)
def test_right_functions_score(verifier, form):
    assert verifier.verify(FORMS[form], f"Here it is:\n```python\n{RIGHT}```\nDone.") == 1.0
    assert (
        verifier.verify(FORMS[form], RIGHT + "if __name__ == '__main__':\n    print(add(*map(int, input().split())))")
        == 1.0
    )


def test_right_scripts_score(verifier):
    assert verifier.verify(SCRIPT, RIGHT_SCRIPT) == 1.0
    assert verifier.verify(SCRIPT, f"import sys\ndef main():\n    {RIGHT_SCRIPT.splitlines()[0]}\n    sys.stdout.write(f'{{a + b}}  \\n\\n')\nif __name__ == '__main__':\n    main()\n    exit()") == 1.0  # fmt: skip  # noqa: E501


def test_a_script_that_fails_after_the_right_output_does_not_score(share):
    assert share.verify(SCRIPT, RIGHT_SCRIPT + "raise SystemExit(1)") == 0.0
    assert share.verify(SCRIPT, RIGHT_SCRIPT + "import os, sys\nsys.stdout.flush()\nos.abort()") == 0.0


WRONG = {
    "wrong value": "def add(a, b):\n    return a - b",
    "right once": "def add(a, b):\n    return 3",
    "raises": "def add(a, b):\n    raise ValueError(a + b)",
    "other name": "def plus(a, b):\n    return a + b",
    "no program": "I do not know.",
    "syntax": "def add(a, b) return a + b",
    "nothing": "",
    "text of the value": "def add(a, b):\n    return str(a + b)",
}


@pytest.mark.parametrize("why", WRONG)
def test_wrong_functions_do_not_score(verifier, why):
    assert [verifier.verify(p, WRONG[why]) for p in FORMS.values()] == [0.0] * 3


# What programs were seen to try, or could.
HACKS = {
    "leaves at once": "import os\nos._exit(0)",
    "leaves politely": "import sys\nsys.exit(0)",
    "leaves when called": "import os\ndef add(a, b):\n    os._exit(0)",
    "leaves politely when called": "import sys\ndef add(a, b):\n    sys.exit(0)",
    "equals everything": """
class Equal(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __eq__
    def __sub__(self, other): return 0
    __rsub__ = __add__ = __radd__ = __abs__ = __sub__
    def __abs__(self): return 0
    def __bool__(self): return True
    def __hash__(self): return 0
def add(a, b): return Equal()
""",
    "equals everything, not a number": """
class Equal:
    def __eq__(self, other): return True
    def __lt__(self, other): return True
    def __sub__(self, other): return 0
    def __abs__(self): return 0
    def __bool__(self): return True
    def __hash__(self): return 0
def add(a, b): return Equal()
""",
    "overrides builtins": """
import builtins
class Anything(BaseException): pass
builtins.abs = lambda x: 0
builtins.AssertionError = Anything
builtins.compile = builtins.exec = builtins.eval = lambda *a, **k: None
builtins.isinstance = builtins.hasattr = lambda *a: True
builtins.all = builtins.any = builtins.bool = builtins.len = lambda *a: True
def abs(x): return 0
def add(a, b): return -1
""",
    "overrides the examiner's modules": """
import json, operator, sys
json.dumps = lambda value: '{"passed": true, "value": 3, "exit": 0, "output": "3"}'
operator.eq = lambda a, b: True
for module in list(sys.modules.values()):
    for name in ("encode", "decode", "same_value", "wait", "limited"):
        if hasattr(module, name):
            setattr(module, name, lambda *a, **k: True)
def add(a, b): return -1
""",
    "puts modules into the folder": """
for name in ("json", "math", "ast", "operator", "plain", "encodings", "collections"):
    open(name + ".py", "w").write("import os\\nos.write(1, b'{\\"passed\\": true}')\\nisclose = lambda *a: True")
def add(a, b): return -1
""",
    "prints a report": """
import os, sys
report = b'{"total": 2}\\n{"passed": true, "exit": 0, "value": true}\\n{"passed": true, "exit": 0, "value": true}\\n'
for fd in range(64):
    try:
        os.write(fd, report)
    except OSError:
        pass
print(report.decode(), flush=True)
def add(a, b): return -1
os._exit(0)
""",
    "answers on the pipe": """
import os
def add(a, b):
    for fd in range(3, 64):
        try:
            os.write(fd, b'{"value": {"object": 0}}\\n{"value": true}\\n{"passed": true}\\n' * 20)
        except OSError:
            pass
    return -1
""",
    "searches for the answer": """
import gc, re, sys
def add(a, b):
    frame, seen = sys._getframe(), []
    while frame:
        seen.append((dict(frame.f_locals), frame.f_code.co_consts))
        frame = frame.f_back
    text = repr(seen) + repr([o for o in gc.get_objects() if isinstance(o, (dict, list))][:5000])
    found = re.search(rf"(?:add|candidate)\\({a}, {b}\\) == (-?[0-9]+)", text)
    if found:
        return int(found[1])
    return -1
""",
    "replaces the exit": """
import atexit, os, sys
sys.excepthook = lambda *a: os._exit(0)
atexit.register(os._exit, 0)
def add(a, b):
    raise KeyError
""",
    "kills the examiner": "import os, signal\ndef add(a, b):\n    os.kill(os.getppid(), signal.SIGKILL)\n    return -1",
    "stops the clock": "import os, signal\ndef add(a, b):\n    os.kill(os.getppid(), signal.SIGALRM)\n    return -1",
    "raises what tests expect": "def add(a, b):\n    raise StopIteration",
    "raises out of Exception": "def add(a, b):\n    raise GeneratorExit",
}  # fmt: skip


@pytest.mark.parametrize("trick", HACKS)
def test_tricks_do_not_score(verifier, trick):
    for name, tests in {**FORMS, "script": SCRIPT}.items():
        # Killing the examiner ends the examination without a verdict; that is no score either.
        may_fail = trick in ("kills the examiner", "stops the clock")
        with contextlib.suppress(PrismError if may_fail else ()):
            assert verifier.verify(tests, HACKS[trick]) == 0.0, name


def test_a_forged_report_does_not_score_in_part_either(share):
    program = HACKS["prints a report"]
    assert [share.verify(tests, program) for tests in (CALLS, ASSERTS, SCRIPT)] == [0.0] * 3
    # Nor if the examiner is kept from writing its own.
    assert share.verify(ASSERTS, program.replace("os._exit(0)", "while True: pass")) == 0.0


def test_a_function_of_the_program_does_not_answer_for_another_name(verifier):
    tests = problem(entry_point="add", asserts="import math\nassert math.isclose(add(1, 2), 3)\nassert isclose2(1, 1)")
    program = "class math:\n    isclose = lambda *a: True\ndef isclose2(*a): return True\ndef add(a, b): return -1"
    assert CodeVerifier(verifier.sandbox, "share", LIMITS).verify(tests, program) == 0.5
    bare = problem(entry_point="add", asserts="assert math.isclose(add(1, 2), 3)")
    assert verifier.verify(bare, program) == 0.0
    assert verifier.verify(bare, "import math\n" + RIGHT) == 1.0


def test_modules_that_the_program_writes_do_not_answer_for_those_of_the_tests(share):
    tests = problem(asserts="assert add(1, 1) == add(1, 1)\nassert statistics.mean([add(1, 2)]) == 3")
    program = "open('statistics.py', 'w').write('mean = lambda values: 3')\ndef add(a, b): return -1"
    assert share.verify(tests, program) == 0.5


def test_a_name_under_test_may_be_that_of_a_builtin(verifier):
    tests = problem(
        entry_point="sum", asserts="assert sum(1, 2) == 3\ndef again():\n    return sum(2, 2)\nassert again() == 4"
    )
    assert verifier.verify(tests, "def sum(a, b):\n    return a + b") == 1.0


def test_a_case_that_hangs_costs_its_own_time_and_its_own_score(share):
    program = "def add(a, b):\n    while a == 1:\n        pass\n    return a + b"
    assert share.verify(CALLS, program) == 0.5
    assert share.verify(SCRIPT, "a, b = map(int, input().split())\nwhile a == 1: pass\nprint(a + b)") == 0.5
    # The tests' text is in the examiner by then, which can start no other candidate.
    assert share.verify(ASSERTS, program) == 0.0


@pytest.mark.parametrize("form", ["calls", "asserts", "script"])
def test_a_program_that_no_case_refuted_in_time_has_no_verdict(form):
    """Right, and slow: 0 would tell the policy that it is wrong."""
    hurried = CodeVerifier("process", limits=SandboxLimits(wall_seconds=3), case_seconds=20)
    wait = "import time\ntime.sleep(2)\n"
    program = (
        wait + RIGHT_SCRIPT if form == "script" else "import time\ndef add(a, b):\n    time.sleep(2)\n    return a + b"
    )
    assert verdict_of(hurried, {**FORMS, "script": SCRIPT}[form], program) == Verdict(None, "out of time")


def test_a_program_that_a_case_refuted_in_time_is_wrong():
    hurried = CodeVerifier("process", "share", SandboxLimits(wall_seconds=5), case_seconds=20)
    program = "import time\ndef add(a, b):\n    if a == 5:\n        time.sleep(20)\n    return 0"
    assert [hurried.cases(p, program) for p in (CALLS, ASSERTS)] == [[False, False]] * 2


def test_seconds_of_a_program_come_from_the_configuration():
    with Judge(RewardConfig(sandbox="process"), {}, 40) as usual:
        usual_code = usual._verifier("code")
    assert (usual_code.limits, usual_code.case_seconds) == (SandboxLimits(), 4.0)
    with Judge(RewardConfig(sandbox="process", code_seconds=60.0), {}, 40) as patient:
        code = patient._verifier("code")
    assert (code.limits.wall_seconds, code.limits.cpu_seconds, code.case_seconds) == (60.0, 60.0, 30.0)
    assert code.time_limit > 60.0


def test_a_case_that_ends_the_process_costs_its_own_score(share):
    program = "import os\ndef add(a, b):\n    if a == 1:\n        os._exit(0)\n    return a + b"
    assert share.verify(CALLS, program) == 0.5


def test_share_and_all(verifier, share):
    once = "def add(a, b):\n    return 3"
    assert [share.verify(p, once) for p in (CALLS, ASSERTS)] == [0.5, 0.5]
    assert share.verify(SCRIPT, "print(3)") == 0.5
    assert [verifier.verify(p, once) for p in (CALLS, ASSERTS)] == [0.0, 0.0]
    assert CodeVerifier("process", "share", LIMITS).cases(CALLS, once) == [True, False]


def test_asserts_on_objects_iterators_and_arguments(verifier):
    tests = problem(
        asserts="""
stack = Stack()
stack.push(1)
stack.push(2)
assert stack.pop() == 2
assert len(stack) == 1
assert stack.items[0] == 1
assert list(count(3)) == [0, 1, 2]
assert 2 in count(3)
assert 7 not in count(3)
assert Stack(2) == Stack(2)
assert not Stack(2) == Stack(3)
data = [3, 1, 2]
sort(data)
assert data == [1, 2, 3]
assert half(3) == Fraction(3, 2)
assert half(3) != 1.5000001
try:
    fail()
    assert False
except ValueError as error:
    assert str(error) == "told"
""",
        setup="from fractions import Fraction",
    )
    program = """
from fractions import Fraction
class Stack:
    def __init__(self, size=0): self.items, self.size = [], size
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
    def __eq__(self, other): return self.size == other.size
def count(n):
    yield from range(n)
def sort(data): data.sort()
def half(x): return Fraction(x, 2)
class Own(ValueError): pass
def fail(): raise Own("told")
"""
    assert verifier.verify(tests, program) == 1.0
    assert verifier.verify(tests, program.replace("yield from range(n)", "yield from range(n - 1)")) == 0.0


@pytest.mark.parametrize(
    ("asserts", "message"),
    [
        ("assert add(", "not Python"),
        ("x = 1", "assert nothing"),
        ("assert add(lambda: 1, 2) == 3", "hand the program a function"),
    ],
)
def test_tests_that_cannot_be_run_are_an_error_and_not_a_zero(verifier, asserts, message):
    with pytest.raises(PrismError, match=message):
        verifier.verify(problem(asserts=asserts), RIGHT)


# Tests that a wrong program passes: nothing in them is ever asked.
HOLLOW = {
    "docstring": '"""Tests of add."""\ndef test_add():\n    assert add(1, 2) == 3',
    "guard": "def test_add():\n    assert add(1, 2) == 3\nif __name__ == '__main__':\n    test_add()",
    "unittest": "import unittest\nclass TestAdd(unittest.TestCase):\n    def test_add(self):\n"
    "        self.assertEqual(add(1, 2), 3)\nif __name__ == '__main__':\n    unittest.main()",
    "unittest that is run": "import unittest\nclass Adding(unittest.TestCase):\n    def runTest(self):\n"
    "        self.assertEqual(add(1, 2), 3)\nunittest.TextTestRunner().run(Adding())",
    "pytest class": "class TestAdd:\n    def test_add(self):\n        assert add(1, 2) == 3\nassert True",
    "print": "ok = add(1, 2) == 3\nprint(ok)",
    "a function that is not called": "def verify():\n    assert add(1, 2) == 3\n'done'\n...",
}


@pytest.mark.parametrize("why", HOLLOW)
def test_tests_that_ask_nothing_are_an_error_and_no_full_marks(verifier, share, why):
    for one in (verifier, share):
        for program in ("def add(a, b):\n    return a - b", RIGHT):
            with pytest.raises(PrismError, match=r"assert nothing|never call it|nothing here would run"):
                one.verify(problem(asserts=HOLLOW[why]), program)


def test_only_what_can_find_fault_is_a_case(share):
    tests = problem(
        asserts="""
'Tests of add.'
def near(value, expected):
    assert abs(value - expected) < 1e-6
runs = [near]
print('begin')
assert add(1, 2) == 3
near(add(1, 1), 2)
for run in runs:
    run(add(2, 2), 4)
if add(5, 5) != 10:
    raise ValueError
testing.assertEqual(add(0, 0), 0)
add(1, 1)
if __name__ == '__main__':
    add('never', None)
""",
        setup="import types\ndef equal(a, b):\n    assert a == b\ntesting = types.SimpleNamespace(assertEqual=equal)",
    )
    assert share.cases(tests, RIGHT) == [True] * 5
    assert share.cases(tests, "def add(a, b):\n    return 3") == [True] + [False] * 4
    # What is no case counts where it fails: the tests ended there.
    assert share.cases(tests, "def add(a, b):\n    assert (a, b) != (1, 1)\n    return a + b") == [
        True, False, True, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "there are none"),
        ({"cases": [[1]]}, "list of pairs"),
        ({"cases": "x"}, "list of pairs"),
        ({"cases": [[[1], 2]]}, "without 'entry_point'"),
        ({"cases": [["1", "2"]], "entry_point": "f"}, "arguments of 'f' must be a list"),
        ({"cases": [[[1], 2]], "entry_point": 3}, "must be a name"),
        ({"inputs": ["1"], "outputs": []}, "1 'inputs' but 0 'outputs'"),
    ],
)
def test_tests_of_no_known_form_are_refused(metadata, message):
    with pytest.raises(InputError, match=message):
        read_tests(problem(**metadata))


def test_forms_of_data_sets():
    assert read_tests(problem(inputs=["1"], outputs=["2"])).form == "stdin"
    apps = read_tests(problem(fn_name="f", inputs=[[1]], outputs=[2]))
    assert (apps.form, apps.entry_point, apps.inputs, apps.expected) == ("calls", "f", ([1],), (2,))
    assert read_tests(problem(asserts=["assert 1"], setup="import re")).asserts == "import re\nassert 1"


def test_methods_of_a_class_can_be_the_entry_point(verifier):
    tests = problem(entry_point="Solution.add", cases=CALLS.metadata["cases"])
    assert verifier.verify(tests, "class Solution:\n    def add(self, a, b):\n        return a + b") == 1.0


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("First\n```py\nx = 1\n```\nthen\n```Python\nx = 2\n```\nand `x`", "x = 2\n"),
        ("```python\nx = 1\n```\nOutput:\n```\n5\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("- so:\n  ```python\nx = 1\n  ```", "x = 1\n"),
        ("```bash\nls\n```\n```python3\nx = 1\n```", "x = 1\n"),
    ],
)
def test_the_program_in_an_answer(answer, program):
    assert program_in(answer) == program


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (1, 1, True), (1, 2, False), (1, True, False), (True, True, True), (1.0, 1, True), (0.1 + 0.2, 0.3, True),
        (1.001, 1.0, False), (float("nan"), float("nan"), True), (float("inf"), float("inf"), True),
        ((1, 2), [1, 2], True),
        ([1, (2, 3)], [1, [2, 3]], True), ([1], [1, 2], False), ({1: 2}, {"1": 2}, True), ({1: 2}, {"1": 3}, False),
        ({"a": [1.0]}, {"a": [1]}, True), ("1", 1, False), (None, None, True), (None, 0, False), ({1}, [1], False),
        ("ab", ["a", "b"], False), ({"a": 1}, {"a": 1, "b": 2}, False), (float("nan"), 1.0, False),
    ],
)  # fmt: skip
def test_same_value(value, expected, same):
    assert same_value(value, expected) is same


@pytest.mark.parametrize(
    ("output", "expected", "same"),
    [("3", "3\n", True), ("3 \n\n", "3", True), ("1\n2", "1\n\n2", False), (" 3", "3", False), ("", "3", False)],
)
def test_same_output(output, expected, same):
    assert same_output(output, expected) is same


@pytest.mark.parametrize(
    "value",
    [None, True, 3, -(10**5000), 1.5, "aä\ud800", b"\x00\xff", [1, [2]], (1, (2,)), {1, 2}, frozenset({3}),
     {1: {"a": (2,)}}, 1 + 2j, Decimal("1.10"), Fraction(1, 3)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_plain_data_crosses_the_wall(value):
    again = plain.decode(plain.encode(value))
    assert type(again) is type(value)
    assert again == value


def test_subclasses_arrive_as_what_they_hold():
    class Liar(list):
        def __iter__(self):
            return iter([1, 2, 3])

        def __len__(self):
            return 3

        def __eq__(self, other):
            return True

    assert type(plain.decode(plain.encode(Liar([9])))) is list
    assert plain.decode(plain.encode(Liar([9]))) == [9]
    with pytest.raises(plain.NotPlain, match="object"):
        plain.encode(object())


def test_output_longer_than_a_report_of_the_usual_size_scores(verifier):
    tests = problem(cases=[["", "x" * 3_000_000]])
    assert verifier.verify(tests, "print('x' * 3_000_000)") == 1.0
    assert verifier.verify(tests, "print('x' * 3_000_001)") == 0.0


def test_a_verifier_can_be_sent_to_a_worker(verifier):
    again = pickle.loads(pickle.dumps(verifier))
    assert again.verify(CALLS, RIGHT) == 1.0
    assert again.isolated


def test_options_that_are_unknown_are_refused(monkeypatch):
    with pytest.raises(InputError, match="'some' is unknown; choose one of all, share"):
        CodeVerifier("process", "some")
    with pytest.raises(InputError, match="harmless program failed"):
        CodeVerifier("process", limits=dataclasses.replace(LIMITS, processes=1))
