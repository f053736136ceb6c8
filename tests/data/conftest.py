"""Small sources with alphabets of their own, so that a token shows which source it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from small_text import SPECIAL, seed_of, words, write_jsonl

from prism_nemo.data.build import build_mixture
from prism_nemo.data.mixture import Mixture, Source
from prism_nemo.data.tokenizer import Tokenizer, save_tokenizer, train_bpe


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    text = [words("abcdef0123456789", 2000, 1), words("uvwxyz", 2000, 2), "def f(x):\n\treturn x + 1\n" * 20]
    return save_tokenizer(train_bpe(text, 512, SPECIAL), tmp_path_factory.mktemp("tok"))


@pytest.fixture(scope="session")
def three_sources(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Shares 60, 30 and 10 %, of sizes that do not follow the shares, and one held-out source."""
    root = tmp_path_factory.mktemp("text")

    def source(name: str, letters: str, documents: int, weight: float) -> Source:
        texts = [words(letters, 20 + 13 * (i % 9), seed_of(name) + i) for i in range(documents)]
        return Source(name, name, [str(write_jsonl(root / f"{name}.jsonl", texts))], weight)

    return Mixture(
        "three",
        [source("abc", "abc", 40, 0.6), source("xyz", "xyz", 200, 0.3), source("uvw", "uvw", 30, 0.1),
         source("held", "def", 20, 0.0)],
    )  # fmt: skip


@pytest.fixture(scope="session")
def built(three_sources: Mixture, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build folder of `three_sources`; read only."""
    folder = tmp_path_factory.mktemp("build")
    build_mixture(three_sources, tokenizer, folder)
    return folder


@pytest.fixture
def small_mixture(tmp_path: Path) -> Callable[[], Mixture]:
    """Two small sources under tmp_path/text, made anew at every call so that tests may edit the files."""

    def make() -> Mixture:
        one, two = tmp_path / "text/one.jsonl", tmp_path / "text/two.txt"
        if not one.exists():
            write_jsonl(one, ["aa bb", "cc 12 dd", ""])
            two.write_text("x = 1\n")
        return Mixture("small", [Source("one", "d1", [str(one)], 3.0), Source("two", "d2", [str(two)], 1.0)])

    return make
