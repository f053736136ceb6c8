"""What runs in processes of its own: lm-eval's own backend and ours on the same folder and tasks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TASKS = ("choices", "last_word", "whole_text", "writing")


def evaluated(lm: Any, tasks: str, names: tuple[str, ...] = TASKS) -> dict[str, Any]:
    """lm-eval's results and the answers to every request, by task."""
    import lm_eval.evaluator
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    lm_eval.evaluator.add_env_info = lambda results: None  # lists all packages, which takes seconds
    manager = TaskManager(include_path=tasks, include_defaults=False)
    found = simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, log_samples=True)
    if found is None:  # not the first rank
        return {}
    answers = {name: [(s["doc_id"], s["resps"]) for s in sorted_samples(found, name)] for name in names}
    return {"results": found["results"], "answers": answers}


def alone() -> None:
    """Forget the launcher: accelerate, which lm-eval's backend asks for its device, would join a group of its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


def sorted_samples(found: Any, name: str) -> list[dict[str, Any]]:
    return sorted(found["samples"][name], key=lambda sample: sample["doc_id"])


def theirs_and_ours(folder: str, tasks: str, engines: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """By backend: lm-eval's `hf`, and ours with each engine; and under ``tokens`` what both make of texts."""
    from lm_eval.models.huggingface import HFLM

    from prism_nemo.evaluation.harness.model import PrismNemoLM

    alone()
    found = {"hf": evaluated(HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=4), tasks)}
    for engine in engines:
        found[engine] = evaluated(PrismNemoLM(checkpoint=folder, engine=engine), tasks)
    found["tokens"] = {}
    for add_bos in (None, True, False):
        theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", add_bos_token=add_bos)
        mine = PrismNemoLM(checkpoint=folder, engine="transformers", add_bos_token=add_bos)
        found["tokens"][add_bos] = (tokens_of(theirs), tokens_of(mine))
    return found


def on_real_questions(folder: str, tasks: str, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """lm-eval's own backend in fp32 and in fp64, and ours in Megatron."""
    from lm_eval.models.huggingface import HFLM

    from prism_nemo.evaluation.harness.model import PrismNemoLM

    alone()
    found = {"megatron": evaluated(PrismNemoLM(checkpoint=folder), tasks, names)}
    for name, dtype in (("hf", "float32"), ("hf64", "float64")):
        found[name] = evaluated(HFLM(pretrained=folder, device="cpu", dtype=dtype, batch_size=8), tasks, names)
    return found


def ours(folder: str, tasks: str, tp: int, pp: int) -> dict[str, Any]:
    """Ours on several ranks; every rank runs lm-eval, the first returns its results."""
    from prism_nemo.evaluation.harness.model import PrismNemoLM

    return evaluated(PrismNemoLM(checkpoint=folder, tp=tp, pp=pp), tasks)


TEXTS = ("red fox", " red fox ", "", "<bos>red fox", "<eos>red", "a\n\n b", "zebra 12 ñ", "the")
PAIRS = (("red fox", " sees"), ("red fox ", "sees"), ("red  \n", " dog"), ("red f", "ox"), ("<bos>the", " dog"))
CHAT = [{"role": "user", "content": "red fox"}, {"role": "assistant", "content": "sees"}]


def tokens_of(lm: Any) -> dict[str, Any]:
    """What a backend makes of texts, of contexts with their continuations, and of a conversation."""
    return {
        "texts": [lm.tok_encode(text) for text in TEXTS],
        "texts without special tokens": [lm.tok_encode(text, add_special_tokens=False) for text in TEXTS],
        "pairs": [lm._encode_pair(*pair) for pair in PAIRS],
        "chat": [lm.apply_chat_template(CHAT), lm.apply_chat_template(CHAT, add_generation_prompt=False)],
        "facts": [lm.prefix_token_id, lm.eot_token_id, lm.max_length, lm.max_gen_toks, lm.chat_template(True)],
    }


def on_two_ranks(folder: str, tasks: str, out: str) -> Any:
    """Our own run of user tasks with tensor parallelism; what the first rank returns."""
    import dataclasses

    from prism_nemo.config import ParallelConfig
    from prism_nemo.evaluation.engines.open import open_model
    from prism_nemo.evaluation.harness.run import HarnessSettings, run_harness

    opened = open_model(folder, layout=ParallelConfig(2))
    settings = HarnessSettings(("choices", "writing"), folder=Path(tasks))
    return dataclasses.asdict(run_harness(opened.model, settings, Path(out), opened.about))
