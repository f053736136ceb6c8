"""Log-likelihoods of multiple-choice questions: this project's Megatron engine and lm-eval's Hugging Face backend.

    python benchmarks/evaluation.py [--json] [--rounds 3] [--questions 24] [--batch 16] [--cases dense hybrid]
                                    [--workloads five-shot letters zero-shot] [--model DIR] [--threads 1]

The same weights in fp32 and the same token ids, four options to a question, interleaved in one process. A rate counts
the tokens of all requests, context and continuation, as asked for: what a side does not read twice is its own merit.
The peer is `lm_eval.models.huggingface.HFLM` with its own collator, which sorts by length and reads the context of
one-token continuations once; it gets batches of `--batch` rows. Ours reads up to 1,024 tokens at a time: fewer.
A figure is the median of the ratios per round. Log-likelihoods of both are compared in every round, and the run fails
where they differ by more than 1e-4 (beyond 100 nats, by more than a millionth), or where one side calls a continuation
greedy and the other does not. A millionth, because options here are random: SmolLM2-135M gives some of them -500 nats,
of which fp32 keeps about 3e-7 on either side (both were up to 1.3e-4 off the same model in fp64, at -444 nats).

- `five-shot`: five examples, a question and options of 2 to 16 tokens.
- `letters`: the same with options of one token, as in MMLU.
- `zero-shot`: a question and options of 10 to 40 tokens, as in HellaSwag; only the question is shared.

Cases: `dense`, Llama-shaped with 10.5M parameters; `hybrid`, Nemotron-H-shaped with 8.6M: Mamba-2, attention and MLP
layers, of which transformers has torch code without fused kernels. `--model` adds a Hugging Face folder, such as the
one that `tests/checkpoint/test_smollm2.py` writes. Needs lm-eval: pip install 'prism-nemo[eval]'.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tokenizers
import torch
from train_throughput import DENSE, HYBRID
from transformers.utils import logging as transformers_logging

from prism_nemo.config import ParallelConfig
from prism_nemo.runtime import start, stop

TARGET, TOLERANCE, RELATIVE = 1.5, 1e-4, 1e-6
CASES: dict[str, dict[str, Any]] = {"dense": DENSE, "hybrid": HYBRID}
# Examples, tokens of an example and of a question, and of the options from shortest to longest.
WORKLOADS: dict[str, tuple[int, int, tuple[int, int], tuple[int, int]]] = {
    "five-shot": (5, 60, (30, 60), (2, 16)),
    "letters": (5, 60, (30, 60), (1, 1)),
    "zero-shot": (0, 0, (40, 90), (10, 40)),
}
OPTIONS = 4

Pair = tuple[list[int], list[int]]
Scores = list[tuple[float, bool]]
Scorer = Callable[[list[Pair]], Scores]


def workload(name: str, questions: int, vocab_size: int) -> list[Pair]:
    """(context, continuation) of every option of every question."""
    shots, shot, asked, option = WORKLOADS[name]
    draw = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> list[int]:
        count = int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(1, vocab_size, (count,), generator=draw).tolist()

    examples = [token for _ in range(shots) for token in tokens(shot, shot)]
    pairs: list[Pair] = []
    for _ in range(questions):
        context = examples + tokens(*asked)
        pairs += [(context, tokens(*option)) for _ in range(OPTIONS)]
    return pairs


def make_folder(shape: dict[str, Any], folder: Path) -> Path:
    """A model with random weights, as a Hugging Face folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "conv" not in name:
                parameter.mul_(3.0)  # log-probabilities then vary, as those of a trained model do
    model.save_pretrained(folder)
    return folder


def ours(folder: Path) -> tuple[Scorer, int]:
    """This project's engine, and its parameters."""
    from prism_nemo.checkpoint.convert import load_hf_weights
    from prism_nemo.checkpoint.hf import HFReader
    from prism_nemo.generation.score import Row, score_rows
    from prism_nemo.models.build import build_model
    from prism_nemo.models.family import read_hf_config

    runtime = start(ParallelConfig(), seed=0)
    architecture = read_hf_config(folder)
    model = build_model(architecture, runtime)
    load_hf_weights(model, architecture, HFReader(folder), 1)

    def score(pairs: list[Pair]) -> Scores:
        scored = score_rows(model, [Row(context + tokens, len(context)) for context, tokens in pairs])
        return [(sum(one.logprobs), one.greedy) for one in scored]

    return score, sum(p.numel() for p in model.parameters())


def peer(folder: Path, batch: int) -> Scorer:
    """lm-eval's backend on the same folder."""
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        sys.exit(f"lm-eval is needed ({error}): pip install 'prism-nemo[eval]'")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from prism_nemo.checkpoint.verification import set_dt_limits
    from prism_nemo.models.family import read_hf_config

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    architecture = read_hf_config(folder)
    set_dt_limits(model, architecture)  # a floor that transformers alone gives Nemotron-H: another function
    # Never asked: requests come as token ids.
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    model.config.max_position_embeddings = architecture.max_position_embeddings
    lm = HFLM(
        pretrained=model.eval(), tokenizer=tokenizer, backend="causal", batch_size=batch, device="cpu",
        max_length=architecture.max_position_embeddings,
    )  # fmt: skip

    def score(pairs: list[Pair]) -> Scores:
        # The texts are keys of a cache that is not in use.
        requests = [((str(i), ""), context, tokens) for i, (context, tokens) in enumerate(pairs)]
        found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        return [(float(logprob), bool(greedy)) for logprob, greedy in found]

    return score


def timed(scorer: Scorer, pairs: list[Pair]) -> tuple[float, Scores]:
    """Tokens per second, and the scores."""
    began = time.perf_counter()
    scores = scorer(pairs)
    return sum(len(context) + len(tokens) for context, tokens in pairs) / (time.perf_counter() - began), scores


def measure(case: str, folder: Path, names: list[str], rounds: int, questions: int, batch: int) -> list[dict[str, Any]]:
    """Alternate both sides on each workload."""
    from prism_nemo.models.family import read_hf_config

    mine, parameters = ours(folder)
    contestants = {"ours": mine, "peer": peer(folder, batch)}
    vocab_size = read_hf_config(folder).vocab_size
    found = []
    for name in names:
        pairs = workload(name, questions, vocab_size)
        for scorer in contestants.values():
            scorer(pairs[: 2 * OPTIONS])  # warm up
        rates: dict[str, list[float]] = {"ours": [], "peer": []}
        gap, equal = 0.0, True
        for i in range(rounds):
            scores: dict[str, Scores] = {}
            for side in list(contestants) if i % 2 else reversed(list(contestants)):
                rate, scores[side] = timed(contestants[side], pairs)
                rates[side].append(rate)
            both = list(zip(scores["ours"], scores["peer"], strict=True))
            gap = max(gap, *(abs(a - b) for (a, _), (b, _) in both))
            equal = equal and all(
                abs(a - b) <= max(TOLERANCE, RELATIVE * abs(b)) and own == other for (a, own), (b, other) in both
            )
        ratios = [a / b for a, b in zip(rates["ours"], rates["peer"], strict=True)]
        found.append(
            {
                "name": f"log-likelihoods {case} {name}: ours / lm-eval HFLM",
                "ours": round(statistics.median(rates["ours"]), 1),
                "peer": round(statistics.median(rates["peer"]), 1),
                "unit": "tokens/s",
                "ratio": round(statistics.median(ratios), 3),
                "target": TARGET,
                "pass": statistics.median(ratios) >= TARGET and equal,
                "ratios": [round(ratio, 3) for ratio in ratios],
                "largest_difference": gap,
                "tolerance": TOLERANCE,
                "equal": equal,
                "requests": len(pairs),
                "tokens": sum(len(context) + len(tokens) for context, tokens in pairs),
                "batch": batch,
                "parameters": parameters,
            }
        )
    stop()
    return found


def main() -> None:
    """Command line; exit code 1 if scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--model", type=Path, help="a Hugging Face folder to measure as well")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    equal = True
    with tempfile.TemporaryDirectory() as root:
        folders = [(case, make_folder(CASES[case], Path(root) / case)) for case in arguments.cases]
        if arguments.model is not None:
            folders.append((arguments.model.name, arguments.model))
        for case, folder in folders:
            for result in measure(
                case, folder, arguments.workloads, arguments.rounds, arguments.questions, arguments.batch
            ):
                equal = equal and result["equal"]
                if arguments.json:
                    print(json.dumps(result), flush=True)
                else:
                    print(
                        f"{result['name']}: {result['ours']} / {result['peer']} tok/s, {result['ratio']} "
                        f"(target {TARGET}; largest difference {result['largest_difference']:.1e})",
                        flush=True,
                    )
    if not equal:
        sys.exit("the log-likelihoods of the two sides differ")


if __name__ == "__main__":
    main()
