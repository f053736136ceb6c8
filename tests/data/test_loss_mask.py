"""Which tokens are trained on: characters of fields and roles to tokens, for the kinds of tokenizers that there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from prism_nemo.data.loss_mask import token_mask
from prism_nemo.data.template import render_template, render_turns, spans_of, text_of
from prism_nemo.data.tokenizer import Tokenizer

TEXT = "Q: hi 😀 é  \n A:  42 ok"
SMALL = ["hi hi hi hi 42 42 ok  ok  ok \n Q: A:"] * 10


def byte_level(prefix_space: bool = False, trim: bool = False, normalizer: Any = None) -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    inner.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(SMALL, trainer)
    if trim:
        inner.post_processor = processors.ByteLevel(trim_offsets=True)
    if normalizer is not None:
        inner.normalizer = normalizer
    return Tokenizer(inner, Path("x"), "", 0, 0)


def sentencepiece(kind: str, byte_fallback: bool = True) -> Tokenizer:
    """As tokenizers converted from SentencePiece are: with Metaspace, or as Llama 2's with a normaliser."""
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, fuse_unk=True))
    if kind == "normalizer":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    special = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    inner.train_from_iterator(SMALL, trainer)
    return Tokenizer(inner, Path("x"), "", 1, 1)


KINDS = {
    "byte level": lambda: byte_level(),
    "prefix space": lambda: byte_level(prefix_space=True),
    "trimmed offsets": lambda: byte_level(trim=True),
    "prefix space, trimmed": lambda: byte_level(prefix_space=True, trim=True),
    "metaspace always": lambda: sentencepiece("always"),
    "metaspace first": lambda: sentencepiece("first"),
    "metaspace, unknown": lambda: sentencepiece("always", byte_fallback=False),
    "llama 2": lambda: sentencepiece("normalizer"),
}


def masked(tokenizer: Tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[list[str], list[str], int]:
    """The tokens in the loss, the others, and whether the end of the document is."""
    ((ids, offsets),) = tokenizer.encode_batch_with_offsets([text])
    assert ids == tokenizer.encode(text)
    mask = token_mask(offsets, spans, len(text))
    assert mask.dtype == np.uint8
    names = [tokenizer._inner.id_to_token(number) for number in ids]
    return (
        [name for name, inside in zip(names, mask, strict=False) if inside],
        [name for name, inside in zip(names, mask, strict=False) if not inside],
        int(mask[-1]),
    )


def test_by_hand() -> None:
    # "ab c" in the tokens "a", "b c" with the characters 0-1 and 1-4.
    offsets = np.array([[0, 1], [1, 4]])
    assert token_mask(offsets, [(0, 1)], 4).tolist() == [1, 0, 0]
    assert token_mask(offsets, [(1, 2)], 4).tolist() == [0, 1, 0]  # any of its characters
    assert token_mask(offsets, [(3, 4)], 4).tolist() == [0, 1, 1]  # the last character: and so the end
    assert token_mask(offsets, [(0, 4)], 4).tolist() == [1, 1, 1]
    assert token_mask(offsets, [], 4).tolist() == [0, 0, 0]
    # A token without characters goes with the one that it stands at; at the end, with the last one.
    empty = np.array([[0, 0], [0, 1], [1, 1], [1, 2], [2, 2]])
    assert token_mask(empty, [(0, 1)], 2).tolist() == [1, 1, 0, 0, 0, 0]
    assert token_mask(empty, [(1, 2)], 2).tolist() == [0, 0, 1, 1, 1, 1]
    assert token_mask(np.zeros((0, 2), np.int64), [], 0).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_text_counts_every_token_and_no_text_none(kind: str) -> None:
    tokenizer = KINDS[kind]()
    assert masked(tokenizer, TEXT, [(0, len(TEXT))])[1:] == ([], 1)
    assert masked(tokenizer, TEXT, [])[::2] == ([], 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("first", "end", "tokens"),
    [
        (6, 7, [["ð", "Ł", "ĺ", "Ģ"], ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], ["<unk>"]]),
        (8, 9, [["Ã", "©"], ["<0xC3>", "<0xA9>"], ["<unk>"]]),
        (9, 11, [["Ġ", "ĠĊ"], ["▁", "▁\n"], ["▁", "▁"]]),
        # With offsets that are trimmed the blank is in no token.
        (16, 17, [["Ġ42"], ["▁42"]]),
        (17, 19, [["Ġ42"], ["▁42"]]),
    ],
)
def test_all_tokens_of_what_counts_and_no_others(kind: str, first: int, end: int, tokens: list[list[str]]) -> None:
    inside, _, last = masked(KINDS[kind](), TEXT, [(first, end)])
    assert inside in tokens
    assert not last


def test_an_answer_at_the_end_takes_the_end_of_the_document_with_it(tokenizer: Tokenizer) -> None:
    render, _ = render_template("{q}\n{a}{tail}")
    for tail, last in (("", 1), ("!", 0)):
        pieces = render({"q": "abc", "a": "42", "tail": tail})
        _, _, end = masked(tokenizer, text_of(pieces), spans_of(pieces, {"a"}))
        assert end == last
    pieces = render_template("{q}\n{a}")[0]({"q": "abc", "a": ""})  # no answer: nothing to stop after
    assert masked(tokenizer, text_of(pieces), spans_of(pieces, {"a"}))[::2] == ([], 0)


@pytest.mark.parametrize("speakers", [True, False])
def test_only_what_a_role_says_counts_not_that_it_speaks(speakers: bool, tokenizer: Tokenizer) -> None:
    turns = [{"from": "human", "value": "ab"}, {"from": "gpt", "value": "cd"}, {"from": "human", "value": "ef"}]
    pieces = render_turns("m", speakers)({"m": turns})
    text = text_of(pieces)
    (span,) = spans_of(pieces, {"assistant"})
    assert text[slice(*span)] == "cd"
    assert [text[slice(*span)] for span in spans_of(pieces, {"user"})] == ["ab", "ef"]
    inside, _, end = masked(tokenizer, text, [span])
    assert "".join(inside).lstrip("Ġ") == "cd"
    assert not end


def test_a_field_that_stands_twice_counts_twice() -> None:
    pieces = render_template("{a} {b} {a}")[0]({"a": "x", "b": "yy"})
    assert spans_of(pieces, {"a"}) == [(0, 1), (5, 6)]


def test_special_tokens_in_the_text_count_as_one_token(tokenizer: Tokenizer) -> None:
    text = "ab <think>cd</think>ef"
    inside, _, _ = masked(tokenizer, text, [(3, 10)])
    assert inside[-1] == "<think>"
    assert masked(tokenizer, text, [(10, 12)])[0] == masked(tokenizer, "cd", [(0, 2)])[0]


def test_special_tokens_that_swallow_the_blanks_beside_them() -> None:
    tokenizer = byte_level(trim=True)
    tokenizer._inner.add_special_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    assert masked(tokenizer, "hi <x> ok", [(3, 6)])[0] == ["<x>"]
    assert masked(tokenizer, "hi <x> ok", [(7, 9)])[0][-1] in ("ok", "k")


def test_a_normaliser_that_joins_or_splits_characters() -> None:
    tokenizer = byte_level(normalizer=normalizers.NFKC())
    text = "e\u0301 ﬁ ½ x"  # becomes é, fi, 1⁄2
    assert len(masked(tokenizer, text, [(0, 2)])[0]) in (1, 2)
    assert "".join(masked(tokenizer, text, [(3, 4)])[0]).lstrip("Ġ") == "fi"
    assert len(masked(tokenizer, text, [(5, 6)])[0]) >= 3
    assert "".join(masked(tokenizer, text, [(7, 8)])[0]).lstrip("Ġ") == "x"


def bytes_of_alphabet() -> dict[str, int]:
    """GPT-2's table: printable bytes stand for themselves, the others follow from U+0100."""
    table, more = {}, 0
    for byte in range(256):
        if chr(byte).isprintable() and byte > 32 and byte not in (0xA0, 0xAD):
            table[chr(byte)] = byte
        else:
            table[chr(256 + more)] = byte
            more += 1
    return table


ANY = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40) | st.text(
    "hi 42ok\n é😀", max_size=40
)


@pytest.fixture(scope="module")
def trimmed() -> Tokenizer:
    return byte_level(trim=True)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.tuples(ANY, st.booleans()), max_size=6))
def test_the_mask_is_what_counting_bytes_gives(pieces: list[tuple[str, bool]], trimmed: Tokenizer) -> None:
    """Independent of the library's offsets: tokens of a byte-level BPE are bytes, back to back."""
    rendered = [(text, "a" if inside else None) for text, inside in pieces]
    text = text_of(rendered)
    table = bytes_of_alphabet()
    counted = [inside for piece, inside in pieces for sign in piece for _ in sign.encode()]
    ((ids, offsets),) = trimmed.encode_batch_with_offsets([text])
    expected, at = [], 0
    for number in ids:
        token = trimmed._inner.id_to_token(number)
        data = bytes(table[sign] for sign in token)
        assert text.encode()[at : at + len(data)] == data
        expected.append(int(any(counted[at : at + len(data)])))
        at += len(data)
    assert at == len(text.encode())
    last = next((inside for piece, inside in reversed(pieces) if piece), False)
    assert token_mask(offsets, spans_of(rendered, {"a"}), len(text)).tolist() == [*expected, int(last)]
