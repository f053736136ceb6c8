"""A tiny model with a tokenizer, lm-eval tasks of every kind that stand in files, and models that know the answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tiny_llama import save_tiny_llama
from tokenizers import processors

from prism_nemo.data.tokenizer import Tokenizer, load_tokenizer, save_tokenizer, train_bpe
from prism_nemo.evaluation.engines.contract import Continuation, Likelihood
from prism_nemo.generation.requests import Request, Response

SENTENCE = "the red fox sees a slow dog near old trees and two birds sing of rain in a small town by the river"
WORDS = SENTENCE.split()
ABOUT = {"path": "x", "kind": "native", "name": "x", "hash": "0" * 64}
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def save_tokenizer_files(folder: Path, bos: bool = False) -> Tokenizer:
    """A small byte-level BPE; with `bos`, one that begins every text with a token of its own."""
    rng = random.Random(0)
    bpe = train_bpe([text(rng, 400)], 300, ["<eos>", "<pad>", "<bos>"])
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", bpe.token_to_id("<bos>"))]
        )
    save_tokenizer(bpe, folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    if bos:
        config["bos_token"] = "<bos>"
    file.write_text(json.dumps({**config, "chat_template": CHAT}))
    return load_tokenizer(folder)


def save_model(folder: Path, bos: bool = False) -> Path:
    """A random Llama that reads 128 tokens."""
    save_tiny_llama(folder)
    save_tokenizer_files(folder, bos)
    return folder


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choice_rows(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Questions with four options of different lengths; some of one token."""
    rng = random.Random(seed)
    return [
        {
            "question": f"{text(rng, rng.randint(3, 12))} {number}?",
            "choices": [text(rng, 1 + (number + i) % 4) + "." * (i == 3) for i in range(4)],
            "answer": rng.randrange(4),
        }
        for number in range(count)
    ]


CHOICE_YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
num_fewshot: {shots}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
LAST_WORD_YAML = """
task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text}}}}"
doc_to_target: " {{{{word}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WHOLE_YAML = """
task: whole_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
"""
WRITE_YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}} ="
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "the"], max_gen_toks: 12, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def write_tasks(folder: Path) -> Path:
    """Tasks of all four kinds of request; some of their texts are longer than the model reads."""
    rng = random.Random(2)
    data = folder / "data"
    write_choice(folder, "choices", choice_rows(12), shots=2)
    words = [{"text": text(rng, 4 * n + 2), "word": rng.choice(WORDS)} for n in range(14)]
    texts = [{"text": text(rng, n)} for n in (1, 5, 20, 90, 200)]
    sums = [{"question": text(rng, n), "answer": rng.choice(WORDS)} for n in (2, 5, 9, 60)]
    (folder / "last_word.yaml").write_text(LAST_WORD_YAML.format(data=write_jsonl(data / "words.jsonl", words)))
    (folder / "whole_text.yaml").write_text(WHOLE_YAML.format(data=write_jsonl(data / "texts.jsonl", texts)))
    write_writing(folder, "writing", sums)
    return folder


def write_choice(folder: Path, name: str, rows: Sequence[dict[str, Any]], shots: int = 0, more: str = "") -> None:
    data = write_jsonl(folder / "data" / f"{name}.jsonl", rows)
    (folder / f"{name}.yaml").write_text(CHOICE_YAML.format(name=name, data=data, shots=shots) + more)


def write_writing(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
    data = write_jsonl(folder / "data" / f"{name}.jsonl", rows)
    (folder / f"{name}.yaml").write_text(WRITE_YAML.format(name=name, data=data))


class Knowing:
    """A model that finds those continuations likely that `likes` says, and writes what `writes` says.

    Attributes:
        scored: All continuations that it was asked for.
        requests: All requests.
    """

    engine = "knowing"

    def __init__(
        self,
        tokenizer: Tokenizer,
        likes: Callable[[str, str], bool] = lambda context, continuation: False,
        writes: Callable[[str], str] = lambda prompt: "",
        max_length: int = 100_000,
    ) -> None:
        self.tokenizer, self.max_length, self._likes, self._writes = tokenizer, max_length, likes, writes
        self.scored: list[Continuation] = []
        self.requests: list[Request] = []

    def score(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        self.scored += continuations
        decode = self.tokenizer.decode
        found = []
        for asked in continuations:
            liked = self._likes(decode(asked.context), decode(asked.tokens))
            found.append(Likelihood(-0.01 if liked else -50.0 * len(asked.tokens), len(asked.tokens), liked))
        return found

    def generate(self, requests: Sequence[Request]) -> list[Response]:
        self.requests += requests
        responses = []
        for request in requests:
            tokens = self.tokenizer.encode(self._writes(self.tokenizer.decode(request.prompt)))
            cut = tokens[: request.sampling.max_new_tokens]
            responses.append(Response(request.prompt, cut, [0.0] * len(cut), len(cut) == len(tokens)))
        return responses


def likes(right: set[str]) -> Callable[[str, str], bool]:
    """Finds those continuations likely that are the right answer to some question."""
    return lambda context, continuation: continuation.strip() in right
