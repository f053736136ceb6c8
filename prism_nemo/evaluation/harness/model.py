"""Our models inside EleutherAI's lm-evaluation-harness: ``lm_eval --model prism_nemo --model_args checkpoint=...``.

Texts become tokens exactly as in lm-eval's own Hugging Face backend (`lm_eval.models.huggingface.HFLM` of 0.4.13), so
that the same weights get the same scores; see `prism_nemo.evaluation.harness.tokens`. The model runs in one of our
engines, which read contexts that begin alike once.

Options after ``--model_args``: see `PrismNemoLM`. Model parallel: ``torchrun --nproc-per-node 2 -m lm_eval --model
prism_nemo --model_args checkpoint=...,tp=2``; every rank asks the same, the first prints.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from prism_nemo.errors import InputError, PrismError
from prism_nemo.evaluation.engines.contract import Continuation, EvaluationModel
from prism_nemo.evaluation.harness.tokens import TextTokens, ending_tokens
from prism_nemo.generation.requests import Request, SamplingParams, request_seed
from prism_nemo.lm_eval_door import NAME

if TYPE_CHECKING:
    from prism_nemo.evaluation.engines.open import OpenedModel

_log = logging.getLogger(__name__)
# Of HFLM: what a task that names no length may generate.
_MAX_GEN_TOKS = 256
# What lm-eval itself may put beside our own options; they decide nothing here.
_FROM_LM_EVAL = ("batch_size", "max_batch_size", "device", "trust_remote_code")


@register_model(NAME)
class PrismNemoLM(TemplateLM):
    """A checkpoint of ours, or a Hugging Face folder, as a model of lm-eval.

    Args:
        checkpoint: Path of a native checkpoint or of a Hugging Face folder; or a model that is already open.
        engine: megatron, transformers or vllm.
        tokenizer: Folder of the tokenizer; by default the checkpoint's own.
        tp: Tensor-parallel ranks.
        pp: Pipeline-parallel ranks.
        batch_tokens: Most tokens that the megatron engine scores at a time; by default as many as suit the device.
            lm-eval's ``--batch_size`` counts rows, which says little where contexts are shared, and is used by the
            transformers engine alone.
        max_length: Most tokens that are read, the answer included; by default what the model can.
        add_bos_token: Whether texts begin with the tokenizer's first token; by default as the tokenizer says.
        prefix_token_id: What stands before an empty context; by default the first token, or else the end token.
        think_end_token: Text after which the answer begins; what stands before it is cut off.
        enable_thinking: Given to the chat template.
        chat_template_args: Further values for the chat template.
        seed: Of sampled answers.
        options: None is known; here so that a misspelt one is refused by name.

    Raises:
        InputError: An option is unknown or wrong, or the checkpoint cannot be opened.
    """

    backend = "causal"

    def __init__(
        self,
        checkpoint: str | Path | EvaluationModel | None = None,
        engine: str = "megatron",
        tokenizer: str | None = None,
        tp: int = 1,
        pp: int = 1,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        _check_options(options)
        if checkpoint is None:
            raise InputError("model_args: checkpoint is missing: --model_args checkpoint=PATH")
        self.about: dict[str, str] = {}
        if isinstance(checkpoint, str | Path | int):  # lm-eval makes a number of a path of digits
            opened = _open(str(checkpoint), engine, tokenizer, int(tp), int(pp), batch_tokens, options)
            checkpoint, self.about = opened.model, opened.about
        self.model: EvaluationModel = checkpoint
        if max_length is not None and not 1 <= max_length <= self.model.max_length:
            raise InputError(f"max_length: {max_length} is not from 1 to the model's {self.model.max_length}")
        self.max_length: int = max_length or self.model.max_length
        folder = self.model.tokenizer.path.parent
        self.text = TextTokens(folder, add_bos_token, prefix_token_id)
        self.tokenizer = self.text.tokenizer
        self.endings = ending_tokens(self.tokenizer, folder)
        self.think_end_token, self.seed = think_end_token, seed
        self._cut: set[tuple[str, str]] = set()
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's cache of answers.

        Raises:
            InputError: There are several ranks: each would have a file of its own, and where they differ after an
                interruption the ranks would wait for one another for ever.
        """
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise InputError("--use_cache works with one process only; leave it out, or run `prism-nemo eval`")
        super().set_cache_hook(cache_hook)

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before an empty context."""
        return self.text.prefix_id

    @property
    def max_gen_toks(self) -> int:
        """What a task that names no length may generate."""
        return _MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests: two tokenizers never share one."""
        return self.model.tokenizer.sha256[:16]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of a text; see `TextTokens.encode`."""
        return self.text.encode(string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without its system message if the template refuses one, as in HFLM."""
        return self.text.chat(chat_history, add_generation_prompt, self.chat_template_args)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results beside the model's name."""
        return {
            **{f"model_{name}": value for name, value in self.about.items()},
            "model_engine": self.model.engine,
            "model_max_length": self.max_length,
            "tokenizer_sha256": self.model.tokenizer.sha256,
        }

    def was_cut(self, context: str, answer: str) -> bool:
        """Whether this answer was cut off at the longest allowed length."""
        return (context, answer) in self._cut

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str] | None, list[int], list[int]]],
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """Log-probability (nats) of each continuation and whether greedy decoding would have written it.

        Args:
            requests: For each the texts (None for a window of a longer text), the context's and the continuation's ids.

        Raises:
            PrismError: A continuation is empty or longer than the model can read; the message quotes it.
        """
        asked = [self._continuation(*request) for request in requests]
        answers = []
        for (texts, _context, _tokens), found in zip(requests, self.model.score(asked), strict=True):
            answers.append((found.logprob, found.greedy))
            if texts is not None:  # windows are cached as the whole text that they are of
                self.cache_hook.add_partial("loglikelihood", texts, answers[-1])
        return answers

    def _continuation(self, texts: tuple[str, str] | None, context: list[int], tokens: list[int]) -> Continuation:
        named = "a window of a text" if texts is None else f"{texts[1]!r} after ...{texts[0][-80:]!r}"
        if not tokens:
            raise PrismError(f"nothing is left to score of {named}: its tokens all belong to the context")
        if len(tokens) > self.max_length:
            raise PrismError(f"{named}: {len(tokens)} tokens are to be scored, but the model reads {self.max_length}")
        # The last token is only predicted, never read, so one more than max_length fits. Cut from the left as in HFLM.
        room = self.max_length + 1 - len(tokens)
        if len(context) > room:
            _log.warning("%s: %d tokens cut from the left of its context", named, len(context) - room)
        return Continuation(context[-room:], tokens)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probability (nats) of whole texts; long ones in windows, each token scored once."""
        windows, counts = [], []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            mine = [(None, *make_disjoint_window(window)) for window in found]
            windows += mine
            counts.append(len(mine))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the task's stop texts.

        Raises:
            PrismError: A task asks for something that no engine of ours does, such as beam search.
        """
        eos = str(self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False))
        times: Counter[str] = Counter()
        asked, stops = [], []
        for request in requests:
            context, given = request.args
            stop, prompt, sampling = self._sampling(context, given, eos, times[context])
            times[context] += 1  # a question that is asked several times gets different answers
            asked.append(Request(prompt, sampling))
            stops.append(stop)
        answers = []
        for request, response, stop in zip(requests, self.model.generate(asked), stops, strict=True):
            text = str(self.tokenizer.decode(response.tokens, skip_special_tokens=True))
            text = postprocess_generated_text(text, stop, self.think_end_token)
            answers.append(text)
            if not response.finished:
                self._cut.add((request.args[0], text))
            self.cache_hook.add_partial("generate_until", request.args, text)
        return answers

    def _sampling(
        self, context: str, given: dict[str, Any], eos: str, time: int
    ) -> tuple[list[str], list[int], SamplingParams]:
        """Stop texts, prompt and settings of one request."""
        wanted = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stop = handle_stop_sequences(wanted.pop("until"), eos)
        longest = int(wanted.pop("max_gen_toks"))
        sample, temperature = bool(wanted.pop("do_sample")), float(wanted.pop("temperature", 0.0) or 0.0)
        top_p, top_k = float(wanted.pop("top_p", 1.0)), int(wanted.pop("top_k", 0) or 0)
        if sample and temperature == 0:
            temperature = 1.0  # what transformers takes where a task only says do_sample
        if wanted:
            raise PrismError(
                f"generation_kwargs: {', '.join(sorted(wanted))} cannot be followed; known are until, do_sample, "
                "temperature, top_p, top_k and max_gen_toks"
            )
        room = self.max_length - longest
        if room < 1:
            raise PrismError(
                f"max_gen_toks: {longest} leaves no room for a prompt in the {self.max_length} tokens that the model "
                "reads; lower it with --gen_kwargs max_gen_toks=..."
            )
        prompt = self.text.encode_prompt(context)
        if len(prompt) > room:
            _log.warning("%d tokens cut from the left of a prompt of %d", len(prompt) - room, len(prompt))
        sampling = SamplingParams(
            max_new_tokens=longest,
            temperature=temperature if sample else 0.0,
            top_p=top_p,
            top_k=top_k,
            stop_ids=self.endings,
            # The end token ends a response by its id; thinking may hold stop texts, which then count after it only.
            stop_texts=() if self.think_end_token else tuple(text for text in stop if text and text != eos),
            seed=request_seed(self.seed, *context.encode(), time) if sample else 0,
        )
        return stop, prompt[-room:], sampling


def _open(
    path: str, engine: str, tokenizer: str | None, tp: int, pp: int, batch_tokens: int | None, options: dict[str, Any]
) -> OpenedModel:
    """Load a checkpoint in this process, which may be one of torchrun's."""
    from prism_nemo.config import ParallelConfig
    from prism_nemo.evaluation.engines.open import open_model

    if tp * pp > 1 and "WORLD_SIZE" not in os.environ:
        raise InputError(
            f"tp={tp}, pp={pp}: needs {tp * pp} processes; start them with `torchrun --nproc-per-node {tp * pp} -m "
            "lm_eval ...`"
        )
    own: dict[str, Any] = {}
    if batch_tokens is not None:
        if engine != "megatron":
            raise InputError(f"batch_tokens: no option of engine {engine}; leave it out")
        own["pass_tokens"] = batch_tokens
    rows = options.get("batch_size")
    if engine == "transformers" and isinstance(rows, int):
        own["batch_size"] = rows
    return open_model(path, engine, tokenizer, ParallelConfig(tp, pp), **own)


def _check_options(options: dict[str, Any]) -> None:
    """Refuse options that nothing would follow."""
    if str(options.get("trust_remote_code") or "").lower() == "true":
        raise InputError("trust_remote_code: code that comes with a model is never run; leave the option out")
    known = [name for name in inspect.signature(PrismNemoLM.__init__).parameters if name not in ("self", "options")]
    for name in options:
        if name not in _FROM_LM_EVAL:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            advice = f"did you mean {near[0]}? " if near else ""
            raise InputError(f"model_args: {name} is unknown; {advice}known: {', '.join(known)}")
