"""The quickstart's data: real general text, procedural documents, a tokenizer, and the two mixtures."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from prism_nemo.data.build import build_mixture
from prism_nemo.data.corpora import write_general_corpus
from prism_nemo.data.mixture import Mixture, Retention, Source
from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_bpe
from prism_nemo.quickstart.settings import GENERAL_SHARE, TASKS, PocketSettings
from prism_nemo.rl.rewards.task import CLOSE, END, OPEN, task_named

HELD_OUT = "general-heldout"
BASE_DOMAIN_SHARE = 0.03  # so that the base knows the form exists: RL on it is hard, not impossible by construction


def write_documents(folder: Path, settings: PocketSettings) -> dict[str, Path]:
    """Worked problems of the training split, one JSONL file per task."""
    files = {}
    for name in TASKS:
        task, rng = task_named(name), random.Random(f"documents/{name}/{settings.seed}")
        path = folder / f"{name}.jsonl"
        with path.open("w") as file:
            for _ in range(settings.documents_per_task):
                file.write(json.dumps({"text": task.sample(rng, "train").document}) + "\n")
        files[name] = path
    return files


def train_tokenizer(folder: Path, general: Path, documents: dict[str, Path], vocab_size: int) -> Tokenizer:
    """Byte-level BPE over general text and documents; digits stay single, or arithmetic could not be learned."""
    texts = [json.loads(line)["text"] for line in general.read_text().splitlines()[:200]]
    for path in documents.values():
        for line in path.read_text().splitlines()[:1500]:
            text = json.loads(line)["text"]
            texts.append(text.replace(OPEN, "").replace(CLOSE, ""))
    return save_tokenizer(train_bpe(texts, vocab_size, ["<pad>", END, OPEN, CLOSE]), folder)


def document_shares(documents: dict[str, Path], tokenizer: Tokenizer) -> dict[str, float]:
    """Token shares that give every task the same number of examples; their lengths differ by a factor of two."""
    tokens = {}
    for name, path in documents.items():
        texts = [json.loads(line)["text"] for line in path.read_text().splitlines()[:500]]
        tokens[name] = sum(len(ids) + 1 for ids in tokenizer.encode_batch(texts)) / len(texts)
    return {name: count / sum(tokens.values()) for name, count in tokens.items()}


def mixture_sources(
    general: Path, heldout: Path, documents: dict[str, Path], shares: dict[str, float], general_share: float
) -> list[Source]:
    """General text, the tasks' documents by their shares of the rest, and held-out text that is not trained on."""
    sources = [Source("general", "general", [str(general)], general_share)]
    for task, path in documents.items():
        sources.append(Source(task, task_named(task).domain, [str(path)], (1.0 - general_share) * shares[task]))
    return [*sources, Source(HELD_OUT, "general", [str(heldout)], 0.0)]


def mixtures(general: Path, heldout: Path, documents: dict[str, Path], shares: dict[str, float]) -> dict[str, Mixture]:
    """The base's mixture (almost all general text) and the mid-training mixture (general, maths, code, science)."""

    def build(name: str, general_share: float) -> Mixture:
        sources = mixture_sources(general, heldout, documents, shares, general_share)
        return Mixture(name, sources, Retention(min(general_share, GENERAL_SHARE), ["general"]))

    return {"base": build("base", 1.0 - BASE_DOMAIN_SHARE), "midtraining": build("midtraining", GENERAL_SHARE)}


def prepare(out: Path, settings: PocketSettings) -> dict[str, Any]:
    """Write everything the stages read; what is there already and unchanged is kept.

    Returns:
        ``tokenizer`` (folder), ``vocab_size``, and the built folders ``base`` and ``midtraining``.
    """
    raw = out / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    general, heldout = write_general_corpus(raw, settings.general_chars)
    documents = write_documents(raw, settings)
    folder = out / "tokenizer"
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder)
    else:
        tokenizer = train_tokenizer(folder, general, documents, settings.vocab_size)
    result: dict[str, Any] = {"tokenizer": str(folder), "vocab_size": tokenizer.vocab_size}
    shares = document_shares(documents, tokenizer)
    for name, mixture in mixtures(general, heldout, documents, shares).items():
        build_mixture(mixture, tokenizer, out / "tokens" / name)
        result[name] = str(out / "tokens" / name)
    return result
