from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from prism_nemo.data.indexed import document_spans, read_index, token_dtype, write_index


@pytest.mark.parametrize("size", [2, 65499, 65500, 200_000])
def test_the_type_of_ids_is_megatrons_choice(size: int) -> None:
    assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_the_index_is_byte_for_byte_that_of_megatrons_builder(dtype: type, tmp_path: Path) -> None:
    lengths = [3, 1, 70, 2]
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for length in lengths:
        builder.add_document(list(range(length)), [length])
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_index(tmp_path / "ours.idx", np.array(lengths), np.dtype(dtype))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
    kind, found, _, _ = read_index(tmp_path / "ours.idx")
    assert kind == np.dtype(dtype)
    assert found.tolist() == lengths


def test_documents_of_several_sequences_are_one_span(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.int32)
    builder.add_document(list(range(5)), [2, 3])
    builder.add_document(list(range(4)), [4])
    builder.finalize(str(tmp_path / "a.idx"))
    _, spans = document_spans(tmp_path / "a.bin")
    assert spans.tolist() == [[0, 20], [20, 36]]
