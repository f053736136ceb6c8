"""What batches hold, against the stored documents read by Megatron."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import words, write_jsonl

from prism_nemo.data.batches import BatchIterator
from prism_nemo.data.build import build_mixture, load_manifest
from prism_nemo.data.manifest import Manifest
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.packing import PACKINGS, PIECE
from prism_nemo.data.plan import DataPlan, make_plan
from prism_nemo.data.samples import RowWriter, Samples, TokenFile
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import PrismError

SEQ = 32
MANY = 4000


def open_samples(
    folder: Path, index: Path, packing: str = "best_fit", isolate: bool = True, samples: int = MANY, seed: int = 5
) -> Samples:
    manifest = load_manifest(folder)
    plan = make_plan(manifest, seq_length=SEQ, seed=seed, packing=packing)
    found = Samples(manifest, plan, index, isolate)
    found.prepare(0, samples)
    return found


def documents_of(manifest: Manifest, name: str) -> list[list[int]]:
    stored = IndexedDataset(manifest.prefix(name))
    return [stored[i].astype(np.int64).tolist() for i in range(len(stored))]


def pieces_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    bounds = batch["cu_seqlens"].tolist()
    return list(pairwise(bounds))


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["abc", "xyz", "uvw"])
def test_each_epoch_holds_every_token_once_and_predicts_every_one_but_the_first_of_a_document(
    packing: str, name: str, built: Path, tmp_path: Path
) -> None:
    samples = open_samples(built, tmp_path, packing)
    drawn = next(item for item in samples.plan.sources if item.name == name)
    read: Counter[int] = Counter()
    predicted: Counter[int] = Counter()
    seen, sample = 0, 0
    while seen < drawn.rows_per_epoch:
        if samples.plan.locate(sample)[0] is drawn:
            batch = samples.rows(sample, 1)
            text = int(batch["text_tokens"])
            assert batch["loss_mask"][0, text:].eq(0).all()
            read.update(batch["tokens"][0, :text].tolist())
            predicted.update(batch["labels"][0][batch["loss_mask"][0] == 1].tolist())
            seen += 1
        sample += 1
    documents = documents_of(load_manifest(built), name)
    assert read == Counter(token for document in documents for token in document)
    assert predicted == Counter(token for document in documents for token in document[1:])


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_piece_is_a_stretch_of_one_document_of_the_source_that_is_named(
    packing: str, built: Path, tmp_path: Path
) -> None:
    samples = open_samples(built, tmp_path, packing)
    manifest = load_manifest(built)
    text = {name: [" ".join(map(str, document)) for document in documents_of(manifest, name)] for name in samples.names}
    for sample in range(0, 400, 3):
        batch = samples.rows(sample, 1)
        name = samples.names[int(batch["sources"])]
        for begin, end in pieces_of(batch):
            assert batch["position_ids"][0, begin:end].tolist() == list(range(end - begin))
            if begin >= int(batch["text_tokens"]):
                assert (begin, end) == (int(batch["text_tokens"]), SEQ)  # padding is one document at the end
                continue
            ids = batch["tokens"][0, begin:end].tolist()
            labels, mask = batch["labels"][0, begin:end].tolist(), batch["loss_mask"][0, begin:end].tolist()
            assert labels[:-1] == ids[1:]
            assert mask[:-1] == [1.0] * (len(ids) - 1)
            # The last token predicts the next one of its document if there is one, and nothing otherwise.
            stretch = ids if mask[-1] == 0 else [*ids, labels[-1]]
            found = [document for document in text[name] if f" {' '.join(map(str, stretch))} " in f" {document} "]
            assert found
            if mask[-1] == 0:
                assert any(document.split()[-len(ids) :] == list(map(str, ids)) for document in found)


def test_without_isolation_a_row_is_running_text(built: Path, tmp_path: Path) -> None:
    apart, running = (open_samples(built, tmp_path, isolate=isolate) for isolate in (True, False))
    for sample in range(50):
        one, other = apart.rows(sample, 1), running.rows(sample, 1)
        text = int(one["text_tokens"])
        assert "cu_seqlens" not in other
        assert torch.equal(one["tokens"], other["tokens"])
        assert other["position_ids"][0].tolist() == list(range(SEQ))
        assert other["labels"][0, : text - 1].tolist() == other["tokens"][0, 1:text].tolist()
        assert other["loss_mask"][0, : text - 1].eq(1).all()
        assert other["loss_mask"][0, text - 1] == one["loss_mask"][0, text - 1]
        assert other["loss_mask"][0, text:].eq(0).all()


def test_a_micro_batch_of_isolated_documents_is_one_packed_row(built: Path, tmp_path: Path) -> None:
    samples = open_samples(built, tmp_path)
    batch, single = samples.rows(10, 4), [samples.rows(10 + i, 1) for i in range(4)]
    assert {name: (tuple(values.shape), values.dtype) for name, values in batch.items() if name != "cu_seqlens"} == {
        "tokens": ((1, 4 * SEQ), torch.int64),
        "labels": ((1, 4 * SEQ), torch.int64),
        "position_ids": ((1, 4 * SEQ), torch.int64),
        "loss_mask": ((1, 4 * SEQ), torch.float32),
        "text_tokens": ((4,), torch.int64),
        "sources": ((4,), torch.int64),
    }
    for name in ("tokens", "labels", "position_ids", "loss_mask"):
        assert torch.equal(batch[name], torch.cat([row[name] for row in single], 1))
    bounds = [begin + i * SEQ for i, row in enumerate(single) for begin, _ in pieces_of(row)]
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"].tolist() == [*bounds, 4 * SEQ]


class MaskedFile(TokenFile):
    """Tokens that are their own place; every third is not trained on."""

    def __init__(self, size: int) -> None:
        self.tokens = np.arange(size).astype(np.uint16)
        self.loss = (np.arange(size) % 3 > 0).astype(np.uint8)


@settings(max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 9), st.booleans()), min_size=1, max_size=4),
    isolate=st.booleans(),
)
def test_a_loss_mask_is_that_of_the_token_that_is_predicted(
    lengths: list[tuple[int, int, bool]], isolate: bool
) -> None:
    writer = RowWriter(1, 40, isolate, 0)
    # Only the last piece of a row can be one that was cut.
    pieces = np.array([(o, n, g and i == len(lengths) - 1) for i, (o, n, g) in enumerate(lengths)], PIECE)
    writer.write(0, MaskedFile(64), pieces)
    batch = writer.batch()
    mask, labels = batch["loss_mask"].flatten().tolist(), batch["labels"].flatten().tolist()
    begin = 0
    for i, (offset, length, goes_on) in enumerate(pieces.tolist()):
        for place in range(begin, begin + length):
            inside = place < begin + length - 1 or goes_on
            if inside:
                assert labels[place] == offset + place - begin + 1
            if inside or (not isolate and i + 1 < len(pieces)):
                assert mask[place] == float(labels[place] % 3 > 0)
            else:
                assert mask[place] == 0
        begin += length
    assert mask[begin:] == [0.0] * (40 - begin)


def test_a_written_out_padding_token_keeps_its_loss(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", ["a <pad> b " * 200])
    build_mixture(Mixture("m", [Source("a", "d", [str(text)], 1.0)]), tokenizer, tmp_path / "out")
    batch = open_samples(tmp_path / "out", tmp_path / "index", samples=2).rows(0, 1)
    assert (batch["labels"] == tokenizer.pad_id).any()
    assert batch["loss_mask"].eq(1).all()


def tokens_of(samples: Samples, count: int) -> torch.Tensor:
    return samples.rows(0, count)["tokens"]


def test_same_seed_same_rows_and_the_index_changes_nothing(built: Path, tmp_path: Path) -> None:
    first = tokens_of(open_samples(built, tmp_path / "a"), 300)
    assert torch.equal(first, tokens_of(open_samples(built, tmp_path / "a"), 300))
    assert torch.equal(first, tokens_of(open_samples(built, tmp_path / "b"), 300))
    # A longer run sees the same samples first: the order is no function of the length of the run.
    assert torch.equal(first, tokens_of(open_samples(built, tmp_path / "c", samples=2 * MANY), 300))
    assert not torch.equal(first, tokens_of(open_samples(built, tmp_path / "a", seed=6), 300))


def test_a_second_epoch_is_shuffled_anew(built: Path, tmp_path: Path) -> None:
    samples = open_samples(built, tmp_path)
    drawn = samples.plan.sources[2]
    rows: dict[int, list[bytes]] = {0: [], 1: []}
    for sample in range(MANY):
        found, number = samples.plan.locate(sample)
        if found is drawn and number < 2 * drawn.rows_per_epoch:
            tokens = samples.rows(sample, 1)["tokens"].numpy().tobytes()
            rows[number // drawn.rows_per_epoch].append(tokens)
    assert len(rows[1]) == drawn.rows_per_epoch
    assert rows[0] != rows[1]


def test_an_index_that_was_left_damaged_is_made_anew(built: Path, tmp_path: Path) -> None:
    first = tokens_of(open_samples(built, tmp_path), 300)
    for file in tmp_path.glob("*/pieces.npy"):
        file.write_bytes(file.read_bytes()[:-40])
    folders = list(tmp_path.iterdir())
    (folders[0] / "sizes.json").unlink()
    assert torch.equal(first, tokens_of(open_samples(built, tmp_path), 300))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".tmp")]


def test_rebuilt_text_does_not_meet_an_old_index(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def build(letters: str, documents: int) -> set[str]:
        texts = [words(letters, 50, i) for i in range(documents)]
        mixture = Mixture("m", [Source("a", "d", [str(write_jsonl(tmp_path / "a.jsonl", texts))], 1.0)])
        build_mixture(mixture, tokenizer, tmp_path / "out")
        seen = tokens_of(open_samples(tmp_path / "out", tmp_path / "index", samples=100), 100).unique().tolist()
        return {c for c in tokenizer.decode(seen).replace("<eos>", "") if c.isalpha()}

    assert build("abc", 30) <= set("abc")
    assert build("xyz", 5) <= set("xyz")


def test_what_was_not_prepared_and_what_is_gone_are_errors(built: Path, tmp_path: Path) -> None:
    samples = open_samples(built, tmp_path, samples=10)
    with pytest.raises(PrismError, match="epoch 2, are missing or damaged; run the same command again"):
        samples.rows(MANY, 50)
    changed = samples.plan.changed_to(samples.plan.sources[:1], 10)
    later = Samples(load_manifest(built), changed, tmp_path)
    assert later.names == ("abc",)
    assert later.rows(10, 4)["sources"].eq(0).all()
    with pytest.raises(PrismError, match=r"is from source '(xyz|uvw)', which this run no longer draws from"):
        later.rows(0, 10)


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_ranks_together_see_the_global_order(dp: int, built: Path, tmp_path: Path) -> None:
    samples = open_samples(built, tmp_path)
    its = [
        BatchIterator(
            samples,
            micro_batch_size=2,
            data_parallel_rank=rank,
            data_parallel_size=dp,
            global_batch_size=16,
            consumed_samples=48,
        )
        for rank in range(dp)
    ]
    rows = [next(it)["tokens"] for it in its for _ in range(it.micro_batches_per_step)]
    assert torch.equal(torch.cat(rows, 1), samples.rows(48, 16)["tokens"])


def test_the_index_moves_with_the_build(built: Path, tmp_path: Path) -> None:
    """A plan does not depend on where the files lie."""
    shutil.copytree(built, tmp_path / "copy")
    plan = open_samples(tmp_path / "copy", tmp_path / "index").plan
    assert isinstance(plan, DataPlan)
    assert plan.hash == open_samples(built, tmp_path / "index2").plan.hash


@pytest.mark.parametrize("isolate", [True, False])
def test_a_template_that_asks_for_it_trains_on_answers_alone(
    isolate: bool, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """From the mixture file to the batch: what is in the loss, decoded, is the answers and the ends after them."""
    records = [{"q": words("abc", 1 + i % 2, i), "a": words("uvw", 1 + i % 2, 100 + i)} for i in range(40)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source("qa", "d", [str(tmp_path / "qa.jsonl")], 1.0, template="{q}\nAnswer: {a}", loss=["a"])
    build_mixture(Mixture("m", [source]), tokenizer, tmp_path / "out")
    assert max(map(len, documents_of(load_manifest(tmp_path / "out"), "qa"))) <= SEQ  # answers stay in one piece
    samples = open_samples(tmp_path / "out", tmp_path / "index", isolate=isolate)
    rows = samples.plan.sources[0].rows_per_epoch
    batch = samples.rows(0, rows)
    trained = batch["labels"].flatten()[batch["loss_mask"].flatten() == 1].tolist()
    answers = [part for part in tokenizer.decode(trained).split("<eos>") if part.strip()]
    assert sorted(part.strip() for part in answers) == sorted(record["a"] for record in records)
    assert len(trained) == load_manifest(tmp_path / "out").source("qa").loss_tokens
