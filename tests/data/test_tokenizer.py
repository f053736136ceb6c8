from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_text import SPECIAL

from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_bpe
from prism_nemo.errors import InputError


def test_every_digit_is_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("12345 + 678 = 13023")
    pieces = [tokenizer.decode([i]) for i in ids]
    assert [p for p in pieces if any(c.isdigit() for c in p)] == list("1234567813023")


@given(text=st.text(max_size=200))
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_code_with_punctuation_round_trips(tokenizer: Tokenizer) -> None:
    text = "def f(x) :\n\treturn x , 'don' t' !\r\n  # é中\u2028"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text, ""]) == [tokenizer.encode(text), []]


def test_special_tokens_are_single_ids_in_the_given_order(tokenizer: Tokenizer) -> None:
    assert [tokenizer.encode(token) for token in SPECIAL] == [[0], [1], [2], [3]]
    assert tokenizer.decode([0, 1, 2, 3]) == "".join(SPECIAL)
    assert (tokenizer.pad_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.token_id("<think>") == 2
    assert tokenizer.token_id("<nope>") is None


def test_vocab_size_covers_every_id(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert max(tokenizer.encode("".join(map(chr, range(1, 2000))))) < 512


def test_training_is_deterministic(tmp_path: Path) -> None:
    text = ["the cat sat on the mat", "def f(x): return x"] * 5
    first, second = (save_tokenizer(train_bpe(text, 300, SPECIAL), tmp_path / name) for name in "ab")
    assert first.sha256 == second.sha256
    assert first.path == tmp_path / "a/tokenizer.json"


def test_transformers_loads_the_folder_and_agrees(tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(tokenizer.path.parent))
    text = "x = 1024 , abc<think>y</think> !"
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.decode(tokenizer.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.vocab_size


def test_importing_the_module_does_not_load_transformers_or_torch() -> None:
    code = "import sys, prism_nemo.data.build, prism_nemo.data.tokenizer; print([m for m in ('torch', 'transformers') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_truncation_and_padding_of_a_published_file_are_switched_off(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(tokenizer.path.parent, tmp_path, dirs_exist_ok=True)
    content = json.loads(tokenizer.path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "1 2 3 4 5 6 7"
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


def test_end_token_from_the_config_from_the_older_map_and_from_the_usual_names(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    shutil.copy(tokenizer.path, tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 1  # "<eos>" by its usual name
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</think>"}}')
    assert load_tokenizer(tmp_path).eos_id == 3
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<think>"}')
    assert load_tokenizer(tmp_path).eos_id == 2
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<gone>"}')
    with pytest.raises(InputError, match="no token '<gone>'"):
        load_tokenizer(tmp_path)


def test_without_a_padding_token_padding_is_the_end_token(tmp_path: Path) -> None:
    train_bpe(["text"], 300, ["</s>"]).save(str(tmp_path / "tokenizer.json"))
    tok = load_tokenizer(tmp_path)
    assert tok.pad_id == tok.eos_id == 0


def test_bad_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    train_bpe(["text"], 300, ["<odd>"]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="no end-of-document token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: is not JSON"):
        load_tokenizer(tmp_path)


def test_bad_training_requests(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least 257"):
        train_bpe(["x"], 256, ["<eos>"])
    with pytest.raises(InputError, match="repeats"):
        train_bpe(["x"], 300, ["<eos>", "<eos>"])
    with pytest.raises(InputError, match="pad: '<pad>' is not in the vocabulary"):
        save_tokenizer(train_bpe(["x"], 300, ["<eos>"]), tmp_path)
