"""What judges an answer, and how one is found by its name."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping

from prism_nemo.errors import InputError, PrismError
from prism_nemo.rl.rewards.task import Problem

# Imported when asked for: sympy alone takes a third of a second.
_KNOWN = {
    "math": "prism_nemo.rl.rewards.mathematics:MathVerifier",
    "choice": "prism_nemo.rl.rewards.choice:ChoiceVerifier",
    "exact": "prism_nemo.rl.rewards.exact:ExactVerifier",
    "code": "prism_nemo.rl.rewards.code:CodeVerifier",
}


class NoVerdict(PrismError):
    """Whether an answer is right could not be found out; the message, a few words without numbers, is counted."""


class Verifier(ABC):
    """Judges answers; pure and picklable.

    A verifier may have a method ``prepare()``, which a worker process calls once before the first answer, and an
    attribute ``time_limit``, seconds for one verdict if it needs more than the configured ones.

    Attributes:
        name: Short name in configurations.
        isolated: Whether it must run in a worker process. A verifier that is given by its dotted path and does not
            say so runs in one.
    """

    name: str
    isolated: bool = False

    @abstractmethod
    def verify(self, problem: Problem, answer: str) -> float:
        """Score of an answer, in [0, 1].

        Args:
            problem: With the right answer in `Problem.answer`, and what else the verifier needs in its metadata.
            answer: The response's text after the thinking part.

        Raises:
            NoVerdict: If there is none for this answer; anything else that is raised has the same effect.
        """


def verifier_named(name: str, table: Mapping[str, str] | None = None) -> Verifier:
    """The verifier of a name.

    Args:
        name: ``math``, ``choice``, ``exact``, ``code``, a name in `table`, or a dotted path ``package.module:Class``.
        table: More names: name -> dotted path. They go before the built-in ones.

    Raises:
        InputError: If there is none of that name, or it is not a `Verifier` that can be made without arguments.
    """
    table = table or {}
    if name in table:
        return _load(table[name], f"rewards.verifiers.{name}")
    if name in _KNOWN:
        return _load(_KNOWN[name], "rewards", built_in=True)
    if ":" in name:
        return _load(name, "rewards")
    known = ", ".join(sorted({*_KNOWN, *table}))
    raise InputError(f"rewards: verifier '{name}' is unknown; known: {known}, or a dotted path package.module:Class")


def _load(path: str, where: str, built_in: bool = False) -> Verifier:
    """Import a class and make one of it; errors begin with `where` the path was given."""
    module_name, colon, class_name = path.partition(":")
    if not (colon and module_name and class_name):
        raise InputError(f"{where}: '{path}' is not a dotted path; write package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # The module itself (or a package of it) is missing, or one that it imports.
        own = error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}."))
        what = (
            f"there is no module '{error.name}'" if own else f"'{module_name}' needs '{error.name}', which is missing"
        )
        raise InputError(f"{where}: '{path}': {what}; install it or put its folder on PYTHONPATH") from error
    except Exception as error:
        raise InputError(f"{where}: '{path}': importing it raised {type(error).__name__}: {error}") from error
    found = getattr(module, class_name, None)
    if found is None:
        raise InputError(f"{where}: '{path}': the module '{module_name}' has no class '{class_name}'")
    if not (isinstance(found, type) and issubclass(found, Verifier)):
        raise InputError(f"{where}: '{path}' is not a subclass of prism_nemo.rl.rewards.verifier.Verifier")
    try:
        verifier = found()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{where}: '{path}' cannot be made without arguments: {error}") from error
    says = any("isolated" in vars(kind) for kind in type(verifier).__mro__ if kind is not Verifier)
    if not (built_in or says or "isolated" in vars(verifier)):
        # What a user writes may hang or crash; only its author can say that it does not.
        verifier.isolated = True
    return verifier
