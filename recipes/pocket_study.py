"""The study at pocket size: every cell and control of `prism_nemo.study`, then its tables, verdicts and page.

    prism-nemo study --out study --slice-minutes 100          # again until it does not exit with 75
    prism-nemo study --out study --data docs/data --page docs/pocket_study.md

or without the command: ``python -m recipes.pocket_study study``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from prism_nemo.errors import PrismError
from prism_nemo.study.run import SEEDS, run_study
from prism_nemo.study.settings import FAMILIES


def main(arguments: list[str] | None = None) -> int:
    """Run the whole study in the folder that is named; returns the exit code."""
    asked = sys.argv[1:] if arguments is None else arguments
    if len(asked) != 1:
        print("usage: python -m recipes.pocket_study OUT", file=sys.stderr)
        return 2
    try:
        found = run_study(Path(asked[0]), None, FAMILIES, SEEDS, "full", 2, None, lambda line: print(line, flush=True))
    except PrismError as error:
        print(f"recipes.pocket_study: {error}", file=sys.stderr)
        return error.exit_code
    for claim in found["claims"]:
        print(f"{claim['verdict']}: {claim['claim']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
