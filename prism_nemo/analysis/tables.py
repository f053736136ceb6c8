"""Results as files: everything as JSON, and tidy rows as JSON lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.atomic import write_text
from prism_nemo.errors import InputError


def write_tables(out: Path, name: str, whole: dict[str, Any], rows: Iterable[dict[str, Any]]) -> list[Path]:
    """Write NAME.json, NAME.jsonl and, where pyarrow is installed, NAME.parquet into a folder.

    Args:
        out: The folder; created if it is not there.
        name: Of the files.
        whole: Plain JSON values.
        rows: Of a tidy table: one line for each value.

    Raises:
        InputError: If the folder cannot be written to.
    """
    lines = list(rows)
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f"{name}.json", json.dumps(whole))
        write_text(out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from error
    written = [out / f"{name}.json", out / f"{name}.jsonl"]
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return written
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lines), out / f"{name}.parquet")
    return [*written, out / f"{name}.parquet"]
