"""The folder in which the documentation's commands run: a tiny model with a tokenizer, texts, questions, recipes.

Every block of the other pages gets a copy of its own, as Getting started left it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

from execution import written_by
from fake_run import write_run
from pages import ROOT, Block, blocks, commands_of, pages
from reader_files import write_jsonl, write_reader_files
from stand_ins import at_pocket_size, files_for
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
    for name, rows in texts.items():
        write_jsonl(folder / "texts" / f"{name}.jsonl", rows)
    questions = [
        {"question": f"{a}+{b}=?", "answer": a + b, "reward": "math", "domain": "math"}
        for a, b in ((1, 2), (3, 4), (9, 9))
    ] + [{"question": f"Say {word}.", "answer": word, "reward": "exact"} for word in WORDS[:9]]
    write_jsonl(folder / "questions.jsonl", [{**row, "split": "test"} for row in questions])
    write_reader_files(folder, [row["text"] for row in texts["general"]])
    write_run(folder / "made-up-quickstart")
    # As many positions as the longest text of the page about evaluation.
    base = save_tiny_llama(folder / "models" / "base", eos_token_id=1, bos_token_id=0, max_position_embeddings=8192)
    _tokenizer([row["text"] for row in texts["general"]]).save(str(base / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    for page in pages():
        for block in blocks(page):
            if "file" in block.clauses:
                path = folder / block.clauses["file"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(block.text)
    for name in ("recipes", "slurm"):
        os.symlink(ROOT / name, folder / name)
    return folder


def copy_for(block: Block, place: Path, folder: Path) -> Path:
    """A copy for one block: with its stand-ins, and without what its commands are to make.

    Args:
        block: With commands.
        place: What `make_workspace` and Getting started have made.
        folder: Not there yet.
    """
    shutil.copytree(place, folder, symlinks=True)
    for path in [path for command in commands_of(block) for path in written_by(at_pocket_size(command).words)]:
        # Of a run all of it goes: what is left would be continued.
        found = folder / path.removesuffix("/checkpoints")
        if found.is_dir():
            shutil.rmtree(found)
        else:
            found.unlink(missing_ok=True)
    for path, source in files_for(block).items():
        shutil.copytree(place / source, folder / path)
    return folder


def _tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
