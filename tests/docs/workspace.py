"""The folder in which the documentation's commands run: a tiny model with a tokenizer, texts, questions, recipes."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from pages import DOCS, ROOT, blocks
from tiny_llama import save_tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "red", "green", "house", "river", "stone", "water"]


def make_workspace(folder: Path) -> Path:
    """Fill a folder with what a reader of the documentation is supposed to have.

    Args:
        folder: Existing and empty.
    """
    generator = random.Random(5)

    def sentence() -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(8, 40))) + "."

    texts = {
        "general": [{"text": sentence()} for _ in range(400)],
        "heldout": [{"text": sentence()} for _ in range(120)],
        "math": [{"question": f"What is {a}+{b}?", "answer": str(a + b)} for a in range(20) for b in range(20)],
    }
    (folder / "texts").mkdir()
    for name, rows in texts.items():
        (folder / "texts" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = [
        {"question": f"{a}+{b}=?", "answer": a + b, "reward": "math", "domain": "math"}
        for a, b in ((1, 2), (3, 4), (9, 9))
    ] + [{"question": f"Say {word}.", "answer": word, "reward": "exact"} for word in WORDS[:9]]
    text = "".join(json.dumps({**row, "split": "test"}) + "\n" for row in questions)
    (folder / "questions.jsonl").write_text(text)
    base = save_tiny_llama(folder / "models" / "base", eos_token_id=1, bos_token_id=0)
    _tokenizer([row["text"] for row in texts["general"]]).save(str(base / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    for page in sorted(DOCS.glob("*.md")):
        for block in blocks(page):
            if block.mark.startswith("file: "):
                path = folder / block.mark.removeprefix("file: ")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
    for name in ("recipes", "slurm"):
        os.symlink(ROOT / name, folder / name)
    return folder


def _tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
