"""Which prompts are kept, by how often a model solved them."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from prism_nemo.errors import InputError


def parse_rule(text: str, samples: int) -> tuple[int, int]:
    """Bounds of a rule, inclusive.

    Raises:
        InputError: If it is not ``N``, ``LO:``, ``:HI`` or ``LO:HI`` within 0 to `samples`.
    """
    match = re.fullmatch(r"(\d*)(:?)(\d*)", text)
    if match is None or not text.strip(":"):
        raise InputError(f"--keep {text}: expected N, LO:, :HI or LO:HI, counted in right answers of {samples}")
    low = int(match[1] or 0)
    high = low if not match[2] else int(match[3] or samples)
    if not 0 <= low <= high <= samples:
        raise InputError(f"--keep {text}: {low} to {high} right answers are not within 0 to {samples}")
    return low, high


def choose(
    measured: Sequence[dict[str, Any]], keep: dict[str, str], samples: int, balance: int | None, seed: int
) -> list[dict[str, Any]]:
    """The prompts to keep, in their order.

    Args:
        measured: One for each prompt, with ``domain`` and ``right``.
        keep: See `prism_nemo.rl.curate.FilterConfig`.
        samples: Answers that each prompt had.
        balance: See `prism_nemo.rl.curate.FilterConfig`.
        seed: Of random choices.

    Raises:
        InputError: If a domain has too few prompts to be filled up, or nothing is left.
    """
    by_domain: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in measured:
        by_domain[line["domain"]].append(line)
    kept: list[dict[str, Any]] = []
    for domain, lines in sorted(by_domain.items()):
        rule = keep.get(domain, keep.get("*"))
        if rule is None:
            continue
        low, high = parse_rule(rule, samples)
        chosen = [line for line in lines if low <= line["right"] <= high]
        if balance is not None:
            rng = random.Random(f"balance/{seed}/{domain}")
            unsolved = [line for line in lines if line["right"] == 0 and not low <= 0 <= high]
            missing = balance - len(chosen)
            if missing > len(unsolved):
                raise InputError(
                    f"--balance {balance}: domain {domain} has {len(chosen)} prompts by its rule and {len(unsolved)} "
                    f"that were never solved; use at most {len(chosen) + len(unsolved)}"
                )
            chosen = rng.sample(chosen, balance) if missing < 0 else chosen + rng.sample(unsolved, missing)
        kept += chosen
    if not kept:
        rates = Counter(line["right"] for line in measured)
        raise InputError(
            f"--keep: no prompt is left; right answers of {samples}: "
            + ", ".join(f"{n} in {count} prompts" for n, count in sorted(rates.items()))
            + "; pass rates are kept, another rule needs no new answers"
        )
    return sorted(kept, key=lambda line: line["number"])


def counts(measured: Sequence[dict[str, Any]], kept: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was measured of one domain, and what is kept of it."""
    numbers = {line["number"] for line in measured}
    mine = [line for line in kept if line["number"] in numbers]
    failures: Counter[str] = Counter()
    for line in measured:
        failures.update(line["failures"])
    return {
        "measured": len(measured),
        "kept": len(mine),
        "never_solved_kept": sum(line["right"] == 0 for line in mine),
        "right_answers": dict(sorted(Counter(line["right"] for line in measured).items())),
        "no_verdict": dict(failures),  # answers that count as wrong and may not be
    }
