"""Text to token ids: loading any fast tokenizer, and training a small byte-level BPE.

Loading goes through `tokenizers` alone: `transformers` takes seconds to import and is not needed to encode text.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from prism_nemo.errors import InputError

_USUAL_EOS = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")
_USUAL_PAD = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


class Tokenizer:
    """A tokenizer and the two ids that training needs.

    No beginning-of-sequence or other template token is ever added; documents end with `eos_id`, which the builder
    appends. Special tokens written out in the text (`<think>`) become their single id.

    Attributes:
        path: The `tokenizer.json` that was read.
        sha256: Of that file's bytes.
        vocab_size: The largest id plus one, which is what an embedding table has to cover.
        eos_id: End of document.
        pad_id: Padding; equals `eos_id` where the tokenizer has no padding token.
    """

    def __init__(self, inner: tokenizers.Tokenizer, path: Path, sha256: str, eos_id: int, pad_id: int) -> None:
        # A published tokenizer.json may carry truncation or padding, which would cut documents without a word.
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self._untrimmed: Any = None
        self.path = path
        self.sha256 = sha256
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.vocab_size = max(inner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end(self) -> str:
        """Text of `eos_id`: what a response that has ended ends with."""
        return self.decode([self.eos_id])

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without any token added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text; several cores where the machine has them."""
        return [item.ids for item in self._inner.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_batch_with_offsets(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Returns the ids of each text, the same as `encode_batch`, and where the tokens lie in it.

        Slower: the library has to follow every character through its normalisers.

        Returns:
            For each text its ids, and (tokens, 2) int64: the first character of each token and one past its last. A
            token that is some of the bytes of a character has all of that character.
        """
        if self._untrimmed is None:
            # A post-processor only adds special tokens, which we never ask for, and trims the white space off the
            # offsets: with ByteLevel's, a token of blanks would have no characters at all.
            self._untrimmed = copy.deepcopy(self._inner)
            self._untrimmed.post_processor = None
        found = self._untrimmed.encode_batch(list(texts), add_special_tokens=False)
        return [(item.ids, np.array(item.offsets, np.int64).reshape(-1, 2)) for item in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`, special tokens written out."""
        return self._inner.decode(list(ids), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Returns the id of one token as it stands in the vocabulary, or None."""
        return self._inner.token_to_id(token)


def load_tokenizer(path_or_dir: str | Path) -> Tokenizer:
    """Loads a `tokenizer.json`, or the one of a Hugging Face folder.

    The end and padding tokens come from `tokenizer_config.json` or `special_tokens_map.json` beside it; where neither
    names them, from the usual spellings.

    Raises:
        InputError: No readable `tokenizer.json`, or no end-of-document token can be found.
    """
    path = Path(path_or_dir)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{path}: no such file. A fast tokenizer (tokenizer.json) is needed; a folder that only has "
            "tokenizer.model is converted by transformers.AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    data = path.read_bytes()
    try:
        inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
    except Exception as err:  # the Rust side raises bare Exception
        raise InputError(f"{path}: is not a tokenizer.json: {err}") from err
    named = _named_tokens(path.parent)
    eos_id = _find(inner, named, "eos_token", _USUAL_EOS, path)
    if eos_id is None:
        raise InputError(
            f"{path}: no end-of-document token. Put `eos_token` into tokenizer_config.json beside it "
            f"(looked for {', '.join(_USUAL_EOS)})."
        )
    pad_id = _find(inner, named, "pad_token", _USUAL_PAD, path)
    return Tokenizer(inner, path, hashlib.sha256(data).hexdigest(), eos_id, eos_id if pad_id is None else pad_id)


def check_vocabulary(tokenizer: Tokenizer, hf_dir: str | Path) -> None:
    """Checks that a model has an embedding for every token, before hours are spent on tokens that it cannot read.

    Raises:
        InputError: The tokenizer has more tokens than the model, or the folder has no readable `config.json`.
    """
    file = Path(hf_dir) / "config.json"
    try:
        size = json.loads(file.read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise InputError(f"{file}: has no readable vocab_size ({err!r}).") from None
    if tokenizer.vocab_size > size:
        raise InputError(
            f"{tokenizer.path}: has {tokenizer.vocab_size} tokens, but the model {hf_dir} has {size}; build the data "
            "with the model's own tokenizer, or grow its embedding first."
        )


def train_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE in which every digit is a token of its own.

    Single digits: a model of a few million parameters learns arithmetic over digits, not over arbitrary chunks.

    Args:
        texts: Documents; read once.
        vocab_size: Upper bound, special tokens included; less comes out where the text has too few pairs.
        special_tokens: They take the first ids, in this order.

    Raises:
        InputError: `vocab_size` has no room for the 256 bytes and the special tokens, or a special token is repeated.
    """
    if len(set(special_tokens)) != len(special_tokens):
        raise InputError(f"special_tokens: {list(special_tokens)} repeats a token; name each once.")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(special_tokens)
    if vocab_size < least:
        raise InputError(
            f"vocab_size: {vocab_size} is too small; {len(alphabet)} bytes and {len(special_tokens)} special tokens "
            f"need at least {least}."
        )
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        # Every byte has an id even if the training text lacks it: nothing is ever unknown.
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer=trainer)
    return tok


def save_tokenizer(tok: tokenizers.Tokenizer, dir: str | Path, eos: str = "<eos>", pad: str = "<pad>") -> Tokenizer:
    """Writes a folder that `transformers.AutoTokenizer.from_pretrained` loads, and loads it back.

    Args:
        tok: For example from `train_bpe`.
        dir: Created if missing.
        eos: The end-of-document token; must be in the vocabulary.
        pad: The padding token; must be in the vocabulary.

    Raises:
        InputError: A token is not in the vocabulary.
    """
    for role, token in (("eos", eos), ("pad", pad)):
        if tok.token_to_id(token) is None:
            raise InputError(f"{role}: {token!r} is not in the vocabulary; train with it among the special tokens.")
    folder = Path(dir)
    folder.mkdir(parents=True, exist_ok=True)
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": pad,
        # Otherwise transformers removes the space before punctuation when it decodes, and text does not round-trip.
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000_000,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return load_tokenizer(folder)


def _named_tokens(folder: Path) -> dict[str, str]:
    """The tokens that the files beside tokenizer.json name; the first file that names one wins."""
    named: dict[str, str] = {}
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if not file.is_file():
            continue
        try:
            content: Any = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as err:
            raise InputError(f"{file}: is not JSON: {err}") from err
        for role in ("eos_token", "pad_token"):
            token = content.get(role)
            # Older folders write a token as a mapping with its stripping rules.
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named.setdefault(role, token)
    return named


def _find(
    inner: tokenizers.Tokenizer, named: dict[str, str], role: str, usual: Sequence[str], path: Path
) -> int | None:
    if role in named:
        found = inner.token_to_id(named[role])
        if found is None:
            raise InputError(f"{path}: has no token {named[role]!r}, which tokenizer_config.json names as {role}.")
        return found
    return next((i for i in map(inner.token_to_id, usual) if i is not None), None)
