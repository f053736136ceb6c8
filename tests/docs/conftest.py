"""The test cluster of `tests/launch` and the made-up quickstart of `tests/report` serve here too."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1] / name) for name in ("launch", "report")]
