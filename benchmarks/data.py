"""Building token data and reading batches of it.

Building, against the tokenizer alone in memory and against `datasets.map`, interleaved:

    python benchmarks/data.py [--json] [--rounds 5] [--megabytes 8] [--threads 1]

All three tokenise the same text with the same tokenizer, read from nothing, files, and files:

- `encode_batch_fast` of `tokenizers` on texts that lie in memory, in the batches that our build uses: the ceiling;
- ours: `build_mixture`, from a JSONL file to an indexed dataset and a manifest that are synced to disk;
- `datasets`: `load_dataset` of the same file and `map` with the same fast tokenizer, into its own cache on disk.

Rounds alternate the order, and the figures are medians of per-round ratios, so that a busy machine slows all alike.
The text is Python's own library; the tokenizer is trained on part of it (32,768 tokens, byte-level BPE).

Then the batch path, start-up, memory and realised shares of a large plan: `data_batches.py`, which also runs alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_batches

VOCABULARY = 32768
BATCH_CHARACTERS = 1_000_000


def prepare(folder: Path, megabytes: float) -> tuple[Path, list[str], Any]:
    """Writes the text as JSON lines; returns the file, the texts and a trained tokenizer."""
    from prism_nemo.data.corpora import write_general_corpus
    from prism_nemo.data.tokenizer import save_tokenizer, train_bpe

    general, _ = write_general_corpus(folder / "raw")
    library = [json.loads(line)["text"] for line in general.read_text().splitlines()]
    # Pieces of some thousand characters, the length of a web page.
    pieces = [text[at : at + 4000] for text in library for at in range(0, len(text), 4000)]
    texts: list[str] = []
    size = 0
    for piece in pieces:
        if size >= megabytes * 1e6:
            break
        texts.append(piece)
        size += len(piece.encode())
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file, texts, save_tokenizer(train_bpe(texts[:1000], VOCABULARY, ("<pad>", "<eos>")), folder / "tokenizer")


def contestants(
    folder: Path, file: Path, texts: list[str], tokenizer: Any, threads: int
) -> dict[str, Callable[[], int]]:
    """Functions that tokenise everything and return the number of tokens, without ends of documents."""
    import datasets

    from prism_nemo.data.build import build_mixture
    from prism_nemo.data.mixture import Mixture, Source

    inner = tokenizer._inner
    mixture = Mixture("benchmark", [Source("text", "code", [str(file)], 1.0)])

    def ceiling() -> int:
        total = size = 0
        batch: list[str] = []
        for text in texts:
            batch.append(text)
            size += len(text)
            if size >= BATCH_CHARACTERS:
                total += sum(map(len, inner.encode_batch_fast(batch, add_special_tokens=False)))
                batch, size = [], 0
        return total + sum(map(len, inner.encode_batch_fast(batch, add_special_tokens=False)))

    def ours() -> int:
        shutil.rmtree(folder / "out", ignore_errors=True)
        manifest = build_mixture(mixture, tokenizer, folder / "out", workers=threads)
        return manifest.sources[0].tokens - manifest.sources[0].documents

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        found = [item.ids for item in inner.encode_batch_fast(rows["text"], add_special_tokens=False)]
        return {"ids": found, "length": [len(ids) for ids in found]}

    def mapped() -> int:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        data = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
        workers = threads if threads > 1 else None
        done = data.map(encode, batched=True, remove_columns=["text"], num_proc=workers)
        return sum(done["length"])

    return {"ceiling": ceiling, "ours": ours, "datasets": mapped}


def measure(rounds: int, megabytes: float, threads: int) -> dict[str, Any]:
    """Runs everything `rounds` times after one warm-up."""
    import datasets

    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, texts, tokenizer = prepare(folder, megabytes)
        runs = contestants(folder, file, texts, tokenizer, threads)
        tokens: dict[str, int] = {}
        times: list[dict[str, float]] = []
        for i in range(rounds + 1):
            spent = {}
            for label in list(runs) if i % 2 else reversed(list(runs)):
                began = time.perf_counter()
                tokens[label] = runs[label]()
                spent[label] = time.perf_counter() - began
            if i:
                times.append(spent)
    if len(set(tokens.values())) != 1:
        raise SystemExit(f"the contestants disagree on the number of tokens: {tokens}")
    total = tokens["ours"]
    rate = {label: round(total / statistics.median(t[label] for t in times), 1) for label in tokens}
    ratio = statistics.median(t["ceiling"] / t["ours"] for t in times)
    against_map = statistics.median(t["datasets"] / t["ours"] for t in times)
    return {
        "name": "data",
        "ours": rate["ours"],
        "peer": rate["ceiling"],
        "unit": "tokens/s",
        "ratio": round(ratio, 3),
        "target": 0.85,
        "pass": ratio >= 0.85 and against_map > 1.0,
        "datasets_map": rate["datasets"],
        "ratio_to_datasets_map": round(against_map, 3),
        "tokens": total,
        "threads": threads,
        "ratios": [round(t["ceiling"] / t["ours"], 3) for t in times],
        "ratios_to_datasets_map": [round(t["datasets"] / t["ours"], 3) for t in times],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=8)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    # Read by the Rust side at its first batch. With one thread its own loop is used, as in our single process.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if arguments.threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(arguments.threads)
    result = measure(arguments.rounds, arguments.megabytes, arguments.threads)
    if arguments.json:
        for line in (result, *data_batches.measure(arguments.rounds)):
            print(json.dumps(line))
        return
    print(f"{result['tokens'] / 1e6:.1f}M tokens, {result['threads']} thread(s)")
    print(
        f"ours {result['ours']} tok/s, encode_batch_fast in memory {result['peer']} tok/s, ratio {result['ratio']} "
        f"(target 0.85); datasets.map {result['datasets_map']} tok/s, ratio {result['ratio_to_datasets_map']} "
        "(target 1.0)"
    )
    for line in data_batches.measure(arguments.rounds):
        print(f"{line['name']}: {line['ours']:,} {line['unit']}, target {line['target']:,}, pass {line['pass']}")


if __name__ == "__main__":
    main()
