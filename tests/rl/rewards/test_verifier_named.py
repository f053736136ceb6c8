"""Verifiers by their names and by dotted paths, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.choice import ChoiceVerifier
from prism_nemo.rl.rewards.exact import ExactVerifier
from prism_nemo.rl.rewards.mathematics import MathVerifier
from prism_nemo.rl.rewards.task import Problem
from prism_nemo.rl.rewards.verifier import Verifier, verifier_named

MODULE = """
from prism_nemo.errors import InputError
from prism_nemo.rl.rewards.verifier import Verifier

class Silent(Verifier):
    name = "silent"
    def verify(self, problem, answer):
        return 0.25

class Quick(Silent):
    isolated = False

class Demanding(Silent):
    def __init__(self, path):
        self.path = path

class Unfinished(Verifier):
    name = "unfinished"

class Refusing(Silent):
    def __init__(self):
        raise InputError("no sandbox here")

class Other:
    pass

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a module of a user's, which can be imported."""
    name = "rewards_of_a_user"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "needy_rewards.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for known in (name, "broken_rewards", "needy_rewards"):
        monkeypatch.delitem(sys.modules, known, raising=False)
    return name


@pytest.mark.parametrize(
    ("name", "kind"), [("math", MathVerifier), ("choice", ChoiceVerifier), ("exact", ExactVerifier)]
)
def test_short_names(name: str, kind: type[Verifier]) -> None:
    verifier = verifier_named(name)
    assert type(verifier) is kind
    assert verifier.name == name
    assert verifier.isolated is kind.isolated


def test_dotted_paths_and_names_of_the_table(module: str) -> None:
    problem = Problem("t", "?", "", "7")
    assert verifier_named(f"{module}:Silent").verify(problem, "7") == 0.25
    assert verifier_named("mine", {"mine": f"{module}:Silent"}).verify(problem, "7") == 0.25
    # The table goes first, so that a user can put one of his own in the place of ours.
    assert verifier_named("math", {"math": f"{module}:Silent"}).name == "silent"


def test_a_users_verifier_runs_apart_unless_it_says_otherwise(module: str) -> None:
    assert verifier_named(f"{module}:Silent").isolated is True
    assert verifier_named(f"{module}:Quick").isolated is False
    assert Verifier.isolated is False


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("mth", "verifier 'mth' is unknown; known: choice, code, exact, math, or a dotted path"),
        ("no_such_package.rewards:Mine", "no module 'no_such_package'"),
        ("prism_nemo.no_such:Mine", r"no module 'prism_nemo\.no_such'"),
        ("needy_rewards:Mine", "'needy_rewards' needs 'a_package_that_nobody_has', which is missing"),
        ("broken_rewards:Mine", "importing it raised ZeroDivisionError"),
        ("rewards_of_a_user:Mine", "has no class 'Mine'"),
        ("rewards_of_a_user:Other", "not a subclass of"),
        ("rewards_of_a_user:number", "not a subclass of"),
        ("rewards_of_a_user:Demanding", "cannot be made without arguments"),
        ("rewards_of_a_user:Unfinished", "cannot be made without arguments"),
        ("rewards_of_a_user:Refusing", "no sandbox here"),
        (":Mine", "not a dotted path"),
        ("rewards_of_a_user:", "not a dotted path"),
    ],
)
def test_what_cannot_be_had_is_named(module: str, path: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        verifier_named(path)


def test_errors_of_the_table_name_its_key(module: str) -> None:
    with pytest.raises(InputError, match=r"rewards\.verifiers\.mine: 'not-a-path' is not a dotted path"):
        verifier_named("mine", {"mine": "not-a-path"})
    with pytest.raises(InputError, match="known: choice, code, exact, math, mine"):
        verifier_named("your", {"mine": f"{module}:Silent"})


def test_sympy_is_imported_only_where_it_is_needed() -> None:
    program = (
        "import sys\n"
        "from prism_nemo.rl.rewards.verifier import verifier_named\n"
        "verifier_named('exact'); verifier_named('choice'); verifier_named('math')\n"
        "print('sympy' in sys.modules or 'math_verify' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"
