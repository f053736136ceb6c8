"""Reading rows out of Parquet files, a few row groups at a time. Needs pyarrow, which is loaded only here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prism_nemo.data.problem import Problem
from prism_nemo.data.units import Unit
from prism_nemo.errors import InputError

_ROWS = 512


def parquet_units(name: str, unit_bytes: int) -> list[Unit]:
    """Cuts a file at its row groups.

    Raises:
        InputError: pyarrow is missing, or the file is no Parquet file.
    """
    meta = _open(name).metadata
    units: list[Unit] = []
    first = size = 0
    for group in range(meta.num_row_groups):
        size += meta.row_group(group).total_byte_size
        if size >= unit_bytes or group == meta.num_row_groups - 1:
            units.append(Unit("parquet", (name,), first, group + 1, size))
            first, size = group + 1, 0
    return units


def unit_range(unit: Unit) -> tuple[int, int]:
    """Returns the bytes of the file that hold the unit's row groups."""
    meta = _open(unit.files[0]).metadata
    begin, end = [], []
    for number in range(unit.start, unit.end):
        group = meta.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            offsets = [column.data_page_offset]
            if column.dictionary_page_offset is not None:
                offsets.append(column.dictionary_page_offset)
            begin.append(min(offsets))
            end.append(min(offsets) + column.total_compressed_size)
    return min(begin, default=0), max(end, default=0)


def rows_before(unit: Unit) -> int:
    """Returns how many rows of the file lie before the unit."""
    meta = _open(unit.files[0]).metadata
    return sum(meta.row_group(number).num_rows for number in range(unit.start))


def read_rows(unit: Unit, columns: dict[str, bool]) -> Iterator[tuple[int, Any]]:
    """Yields rows as mappings, numbered from 1; a row that is not UTF-8 as a `Problem`.

    Args:
        unit: Row groups of one file.
        columns: The fields that are read, and whether each must hold text; empty reads all.

    Raises:
        InputError: A column is missing or of the wrong type, or the file is damaged.
    """
    import pyarrow as pa

    name = unit.files[0]
    file = _open(name)
    wanted = [] if columns else list(file.schema_arrow.names)
    for column, is_text in columns.items():
        wanted.append(_column(name, file.schema_arrow, column, is_text))
    row = 0
    try:
        for batch in file.iter_batches(_ROWS, range(unit.start, unit.end), columns=list(dict.fromkeys(wanted))):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_row(batch, i) for i in range(batch.num_rows)]
            for record in rows:
                row += 1
                yield row, record
    except (pa.ArrowException, OSError) as err:
        raise InputError(f"{name}: is damaged after row {row} of this part: {err}; copy it again.") from err


def _row(batch: Any, number: int) -> Any:
    try:
        return {column: batch.column(column)[number].as_py() for column in batch.schema.names}
    except UnicodeDecodeError as err:
        return Problem("not UTF-8", f"is not UTF-8 text ({err}).")


def _column(name: str, schema: Any, column: str, is_text: bool) -> str:
    """The top-level column that holds a (dotted) field."""
    import pyarrow as pa

    top = column if column in schema.names else column.split(".")[0]
    if top not in schema.names:
        raise InputError(
            f"{name}: has no column {column!r}; its columns: {', '.join(schema.names)}. "
            "Set `text_field`, `template` or `turns` of the source."
        )
    kind = schema.field(top).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if is_text and top == column and not is_string:
        raise InputError(f"{name}: column {column!r} must be text, it is {kind}.")
    return top


def _open(name: str) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise InputError(f"{name}: reading Parquet needs pyarrow; run `pip install 'prism-nemo[data]'`.") from None
    try:
        return pq.ParquetFile(name)
    except (pa.ArrowException, OSError) as err:
        raise InputError(f"{name}: is no whole Parquet file: {err}; copy it again.") from err
