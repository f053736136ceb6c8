"""Text to tokens by the rules of lm-eval's Hugging Face backend, so that both score the same tokens.

The rules are those of `HFLM` in lm_eval/models/huggingface.py (0.4.13): the tokenizer is transformers' own; whether a
first token is added is the tokenizer's decision unless `add_bos_token` says otherwise; a text that is written with the
first token already (chat templates do that) never gets a second one.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from prism_nemo.errors import InputError, PrismError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)


class TextTokens:
    """A tokenizer as lm-eval uses it.

    Args:
        folder: With tokenizer.json and tokenizer_config.json.
        add_bos_token: Whether texts begin with the first token; None leaves it to the tokenizer.
        prefix_id: What stands before an empty context; None for the first token, or else the end token.

    Attributes:
        tokenizer: Of transformers.
        prefix_id: See above.

    Raises:
        InputError: The folder has no tokenizer that transformers can read, or the tokenizer has no end token.
    """

    def __init__(self, folder: str | Path, add_bos_token: bool | None = None, prefix_id: int | None = None) -> None:
        from transformers import AutoTokenizer

        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        try:
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), **options)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: transformers finds no tokenizer there: {error}") from error
        if self.tokenizer.eos_token_id is None:
            raise InputError(f"{folder}: the tokenizer has no end token; put `eos_token` into tokenizer_config.json")
        self._add_bos = add_bos_token
        if prefix_id is None:
            bos = self.tokenizer.bos_token_id
            prefix_id = self.tokenizer.eos_token_id if bos is None else bos
        self.prefix_id: int = prefix_id
        self._prefix_text = str(self.tokenizer.decode([prefix_id]))

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a context or continuation.

        Args:
            text: The text.
            add_special_tokens: Overrules what the tokenizer and `add_bos_token` say.
        """
        if add_special_tokens is None and text.startswith(self._prefix_text):
            add_special_tokens = False
        return self._encode(text, add_special_tokens)

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt to generate from; HFLM looks for the first token here, not for the prefix."""
        bos = self.tokenizer.bos_token
        return self._encode(text, False if bos is not None and text.startswith(bos) else None)

    def _encode(self, text: str, add_special_tokens: bool | None) -> list[int]:
        wanted = self._add_bos if add_special_tokens is None else add_special_tokens
        return self.tokenizer.encode(text, **({} if wanted is None else {"add_special_tokens": wanted}))

    def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool, values: dict[str, Any]) -> str:
        """The prompt of a conversation by the tokenizer's chat template.

        Args:
            messages: Each with ``role`` and ``content``.
            add_generation_prompt: Whether the answer begins after the prompt; else the last message is continued.
            values: Further values of the template.

        Raises:
            PrismError: The tokenizer has no chat template, or it refuses the conversation.
        """
        if not self.tokenizer.chat_template:
            raise PrismError(
                "the tokenizer has no chat template; put chat_template.jinja beside tokenizer.json, or leave out "
                "--apply_chat_template"
            )

        def render(chosen: list[dict[str, str]]) -> str:
            prompt = self.tokenizer.apply_chat_template(
                chosen,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **values,
            )
            return str(prompt)

        try:
            return render(messages)
        except jinja2.exceptions.TemplateError as error:
            fewer = [message for message in messages if message["role"] != "system"]
            if len(fewer) == len(messages):
                raise PrismError(f"the chat template refuses the conversation: {error}") from error
            _log.warning("the chat template takes no system message; it is left out: %s", error)
        return render(fewer)


def ending_tokens(tokenizer: PreTrainedTokenizerBase, folder: Path) -> tuple[int, ...]:
    """Tokens that end an answer: the end token, and those of generation_config.json where transformers stops, too.

    Args:
        tokenizer: With an end token.
        folder: Where generation_config.json may be.

    Raises:
        InputError: The file is not JSON.
    """
    endings = [tokenizer.eos_token_id]
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: is not a JSON object: {error}") from error
        endings += named if isinstance(named, list) else [] if named is None else [named]
    return tuple(dict.fromkeys(endings))
