from __future__ import annotations

import dataclasses
import socket
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from megatron.core.datasets.indexed_dataset import IndexedDataset
from small_text import words, write_jsonl

from prism_nemo.data.batches import BatchIterator
from prism_nemo.data.blend import Blend, build_blend, held_out_rows
from prism_nemo.data.build import build_mixture, load_manifest
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.tokenizer import Tokenizer
from prism_nemo.errors import InputError

SHARES = {"abc": 0.6, "xyz": 0.3, "uvw": 0.1}
SEQ = 32


def blend(folder: Path, cache: Path, samples: int = 2000, **more: object) -> Blend:
    settings: dict[str, object] = {"seq_length": SEQ, "num_samples": samples, "seed": 5, "cache_dir": cache, **more}
    return build_blend(folder, **settings)  # type: ignore[arg-type]


def rows(dataset: Blend) -> torch.Tensor:
    return torch.stack([dataset[i]["tokens"] for i in range(len(dataset))])


def test_shares_are_realised_overall_and_at_every_point_of_the_run(built: Path, tmp_path: Path) -> None:
    dataset = blend(built, tmp_path)
    assert len(dataset) == 2000
    names = [dataset.source_of(i) for i in range(2000)]
    for name, share in SHARES.items():
        running = np.cumsum([n == name for n in names])
        assert abs(running[-1] / 2000 - share) < 0.01
        assert np.abs(running - share * np.arange(1, 2001)).max() <= 2


def test_samples_come_from_the_source_that_they_name(built: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = blend(built, tmp_path)
    counts: Counter[str] = Counter()
    for i in range(0, 2000, 7):
        letters = {c for c in tokenizer.decode(dataset[i]["tokens"].tolist()).replace("<eos>", "") if c.isalpha()}
        (name,) = [n for n in SHARES if letters <= set(n)]
        assert name == dataset.source_of(i)
        counts[name] += 1
    assert set(counts) == set(SHARES)


def test_labels_are_the_tokens_one_place_on(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Against the stored stream, because the last label is not among the tokens of its row."""
    text = write_jsonl(tmp_path / "a.jsonl", [words("abcdefxyz", 3000, 3)])
    manifest = build_mixture(Mixture("m", [Source("a", "d", [str(text)], 1.0)]), tokenizer, tmp_path / "out")
    stored = IndexedDataset(manifest.prefix("a"))
    stream = stored[0].astype(np.int64)
    dataset = blend(tmp_path / "out", tmp_path / "cache", 50)
    windows = {bytes(stream[i : i + SEQ].tobytes()): i for i in range(len(stream) - SEQ)}
    batch = next(
        BatchIterator(dataset, micro_batch_size=50, data_parallel_rank=0, data_parallel_size=1, global_batch_size=50)
    )
    for tokens, labels in zip(batch["tokens"], batch["labels"], strict=True):
        at = windows[tokens.numpy().tobytes()]
        assert labels.tolist() == stream[at + 1 : at + 1 + SEQ].tolist()
    assert batch["loss_mask"].eq(1).all()
    assert batch["position_ids"].eq(torch.arange(SEQ)).all()


def test_one_epoch_shows_every_token_once(built: Path, tmp_path: Path) -> None:
    manifest = load_manifest(built)
    tokens = manifest.source("xyz").tokens
    samples = (tokens - 1) // SEQ
    seen = np.bincount(rows(blend(built, tmp_path, samples, include=["xyz"])).flatten().numpy(), minlength=512)
    stored = IndexedDataset(manifest.prefix("xyz"))
    all_of_it = np.bincount(np.concatenate([stored[i] for i in range(len(stored))]), minlength=512)
    assert (seen <= all_of_it).all()
    assert (all_of_it - seen).sum() == tokens - samples * SEQ


def test_same_seed_same_rows_and_the_cache_changes_nothing(built: Path, tmp_path: Path) -> None:
    first = rows(blend(built, tmp_path / "a", 300))
    assert torch.equal(first, rows(blend(built, tmp_path / "a", 300)))
    assert torch.equal(first, rows(blend(built, tmp_path / "b", 300)))
    assert not torch.equal(first, rows(blend(built, tmp_path / "a", 300, seed=6)))


def test_a_cache_that_was_left_half_written_is_not_believed(built: Path, tmp_path: Path) -> None:
    first = rows(blend(built, tmp_path, 300))
    (cache,) = tmp_path.iterdir()
    (cache / "ready").unlink()
    for file in cache.glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-40])
    assert torch.equal(first, rows(blend(built, tmp_path, 300)))


def test_rebuilt_text_does_not_meet_an_old_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def build(letters: str, documents: int) -> set[str]:
        texts = [words(letters, 50, i) for i in range(documents)]
        mixture = Mixture("m", [Source("a", "d", [str(write_jsonl(tmp_path / "a.jsonl", texts))], 1.0)])
        build_mixture(mixture, tokenizer, tmp_path / "out")
        seen = rows(blend(tmp_path / "out", tmp_path / "cache", 100)).unique().tolist()
        return {c for c in tokenizer.decode(seen).replace("<eos>", "") if c.isalpha()}

    assert build("abc", 30) <= set("abc")
    assert build("xyz", 5) <= set("xyz")


def test_include_normalises_anew_and_weight_zero_is_never_drawn(built: Path, tmp_path: Path) -> None:
    dataset = blend(built, tmp_path, 400, include=["abc", "uvw", "held"])
    counts = Counter(dataset.source_of(i) for i in range(400))
    assert counts["abc"] == pytest.approx(400 * 6 / 7, abs=2)
    assert set(counts) == {"abc", "uvw"}
    only = blend(built, tmp_path, 10, include=["uvw"])
    assert len(only) == 10
    assert only.source_of(9) == "uvw"


def test_the_blend_ends_where_it_was_asked_to(built: Path, tmp_path: Path) -> None:
    dataset = blend(built, tmp_path, 11)
    for index in (11, -1):
        with pytest.raises(IndexError):
            dataset[index]


def test_many_uneven_sources_do_not_exhaust_one(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = str(write_jsonl(tmp_path / "a.jsonl", [words("abc", 200, 1)]))
    sources = [Source(f"s{i}", "d", [text], 0.95 if i == 0 else 0.05 / 39) for i in range(40)]
    build_mixture(Mixture("m", sources), tokenizer, tmp_path / "out")
    for samples in (1, 7, 100):
        assert len(rows(blend(tmp_path / "out", tmp_path / "cache", samples))) == samples


def test_a_written_out_padding_token_keeps_its_loss(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", ["a <pad> b " * 200])
    build_mixture(Mixture("m", [Source("a", "d", [str(text)], 1.0)]), tokenizer, tmp_path / "out")
    sample = blend(tmp_path / "out", tmp_path / "cache", 2)[0]
    assert (sample["labels"] == tokenizer.pad_id).any()
    assert sample["loss_mask"].eq(1).all()


def test_bad_requests(built: Path, three_sources: Mixture, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for key in ("seq_length", "num_samples"):
        with pytest.raises(InputError, match=f"{key}: 0"):
            blend(built, tmp_path, **{key: 0})
    with pytest.raises(InputError, match="did you mean 'xyz'"):
        blend(built, tmp_path, include=["xyzz"])
    with pytest.raises(InputError, match="sum to 0"):
        blend(built, tmp_path, include=["held"])
    with pytest.raises(InputError, match="no finished build"):
        blend(tmp_path, tmp_path)
    limited = dataclasses.replace(
        three_sources, sources=[dataclasses.replace(s, max_epochs=1.0) for s in three_sources.sources]
    )
    build_mixture(limited, tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match=r"too often: abc \d+\.\d\d epochs, max_epochs 1[;.]"):
        blend(tmp_path / "out", tmp_path)


def test_held_out_rows_are_spread_over_the_source(built: Path) -> None:
    manifest = load_manifest(built)
    stored = IndexedDataset(manifest.prefix("held"))
    stream = np.concatenate([stored[i] for i in range(len(stored))]).astype(np.int64)
    tokens, labels = held_out_rows(built, "held", 16, 10)
    assert tokens.shape == labels.shape == (10, 16)
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens[0].tolist() == stream[:16].tolist()
    assert labels[0].tolist() == stream[1:17].tolist()
    assert labels[-1].tolist() == stream[-16:].tolist()
    assert torch.equal(tokens, held_out_rows(built, "held", 16, 10)[0])
    most = (len(stream) - 1) // 16
    full, _ = held_out_rows(built, "held", 16, most)
    assert len(full) == most
    with pytest.raises(InputError, match=f"at most {most} rows"):
        held_out_rows(built, "held", 16, most + 1)
    with pytest.raises(InputError, match="at least 1"):
        held_out_rows(built, "held", 16, 0)


def _worker(rank: int, port: int, built: str, cache: str, out: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dataset = blend(Path(built), Path(cache), 64)
    it = BatchIterator(dataset, micro_batch_size=4, data_parallel_rank=rank, data_parallel_size=2, global_batch_size=16)
    torch.save([next(it) for _ in range(8)], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_see_what_one_sees(built: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_worker, (port, str(built), str(tmp_path / "cache"), str(tmp_path)), nprocs=2)
    one = BatchIterator(
        blend(built, tmp_path / "cache1", 64),
        micro_batch_size=16,
        data_parallel_rank=0,
        data_parallel_size=1,
        global_batch_size=16,
    )
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for step in range(4):
        whole = next(one)
        for key, expected in whole.items():
            parts = [batch[key] for batches in ranks for batch in batches[2 * step : 2 * step + 2]]
            assert torch.equal(torch.cat(parts), expected)


def test_a_row_costs_far_less_than_a_millisecond(built: Path, tmp_path: Path) -> None:
    it = BatchIterator(
        blend(built, tmp_path, 4000, seq_length=128),
        micro_batch_size=8,
        data_parallel_rank=0,
        data_parallel_size=1,
        global_batch_size=8,
    )
    best = float("inf")
    for _ in range(5):  # the best of several, because other work shares the machine
        begin = time.perf_counter()
        for _ in range(20):
            next(it)
        best = min(best, (time.perf_counter() - begin) / 160)
    assert best < 0.5e-3
