"""Megatron's indexed datasets on disk: writing the index and reading where documents lie, without loading torch.

The format is that of `megatron/core/datasets/indexed_dataset.py` 0.16.1: the `.bin` is token ids back to back, the
`.idx` says how long each sequence is and which sequences make up a document. The tests read what is written here with
Megatron.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from prism_nemo.errors import InputError

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}


def token_dtype(vocab_size: int) -> np.dtype:
    """Returns the type that ids are stored as: the rule of Megatron's `DType.optimal_dtype`."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: str | Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Writes the `.idx` of documents that lie back to back in the `.bin`, one sequence each.

    Args:
        path: The file to write.
        lengths: Tokens per document, (documents,).
        dtype: Of the stored ids.
    """
    code = next(code for code, name in _CODES.items() if name == dtype.name)
    pointers = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=pointers[1:], dtype=np.int64)
    with open(path, "wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        stream.write(lengths.astype(np.int32).tobytes())
        stream.write((pointers * dtype.itemsize).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def read_index(path: str | Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Returns the type of the ids, the sequence lengths, their byte offsets, and the borders of documents.

    Raises:
        InputError: Not such an index, or one that is cut short.
    """
    path = Path(path)
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEADER.size)
        magic, version, code, sequences, documents = _HEADER.unpack(head)
        if magic != _MAGIC or version != 1 or code not in _CODES:
            raise ValueError("its first bytes are not those of an index")
        raw = np.memmap(path, np.uint8, "r")
        need = _HEADER.size + sequences * 12 + documents * 8
        if len(raw) < need:
            raise ValueError(f"it has {len(raw)} bytes, its header says {need}")
    except (struct.error, ValueError, OSError) as err:
        raise InputError(f"{path}: is not an index of Megatron's, or is cut short: {err}.") from None
    at = _HEADER.size
    lengths = raw[at : at + sequences * 4].view(np.int32)
    pointers = raw[at + sequences * 4 : at + sequences * 12].view(np.int64)
    borders = raw[at + sequences * 12 : need].view(np.int64)
    return np.dtype(_CODES[code]), lengths, pointers, borders


def document_spans(bin_file: str | Path) -> tuple[np.dtype, np.ndarray]:
    """Returns the type of the ids and the byte range of each document in a `.bin`, (documents, 2).

    Raises:
        InputError: The index is damaged, the ids are no integers, or the `.bin` is shorter than the index says.
    """
    bin_file = Path(bin_file)
    dtype, lengths, pointers, borders = read_index(bin_file.with_suffix(".idx"))
    if dtype.kind not in "iu":
        raise InputError(f"{bin_file}: holds {dtype.name}, not token ids.")
    ends = pointers + lengths.astype(np.int64) * dtype.itemsize
    size = bin_file.stat().st_size
    if len(ends) and int(ends.max()) > size:
        raise InputError(f"{bin_file}: has {size} bytes, its index needs {int(ends.max())}; copy it again.")
    # A document without a sequence has no text either.
    kept = borders[:-1] < borders[1:]
    first, last = borders[:-1][kept], borders[1:][kept] - 1
    return dtype, np.stack([pointers[first], ends[last]], axis=1) if len(first) else np.zeros((0, 2), np.int64)
