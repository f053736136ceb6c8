"""One step of reinforcement learning here and in TRL's GRPOTrainer, interleaved in one process.

    pip install --no-deps trl==1.16.0 accelerate==1.14.0
    python benchmarks/rl_step.py [--json] [--steps 30] [--seeds 3]

Both sides start from the same weights and do the same work: 24 prompts, 8 responses of at most 40 tokens to each, a
Python reward, advantages without division by the deviation, the loss averaged over all response tokens, no KL term, one
update by AdamW. The task can be learned from random weights: a response is right if it begins with a digit. A step of
one side follows a step of the other; the speed is the median over steps, the curves are averaged over seeds.

- `rl_step`: responses per second; peer is TRL.
- `rl_step curves`: area under the reward curve, whose difference should lie within what seeds differ by.
- `rl_step overhead`: share of a step that is not generation, forward and backward passes, or reward.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from prism_nemo.checkpoint.convert import import_hf
from prism_nemo.checkpoint.saver import Saver
from prism_nemo.config import (
    CheckpointConfig,
    GRPOConfig,
    MonitorConfig,
    OptimizerConfig,
    ParallelConfig,
    RLConfig,
    RolloutConfig,
    ScheduleConfig,
)
from prism_nemo.data.tokenizer import save_tokenizer
from prism_nemo.rl.check import check
from prism_nemo.rl.rewards.judge import Judge
from prism_nemo.rl.rewards.task import Problem, Score, Task, register
from prism_nemo.rl.train import Session
from prism_nemo.run import read_metrics
from prism_nemo.runtime import start

PROMPTS, GROUP, NEW_TOKENS, LR = 24, 8, 40, 1e-3
SHAPE: dict[str, Any] = {
    "vocab_size": 104,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SPECIAL = ["<pad>", "<eos>", "<think>", "</think>"]


class FirstDigit(Task):
    """Right when the response begins with a digit: about one in ten of a random model's does."""

    name, domain = "benchmark-first-digit", "math"

    def draw(self, rng: random.Random) -> Problem:
        """See `Task.draw`."""
        return Problem(self.name, "x" * rng.randint(0, 9) + str(rng.randint(0, 9999)), "", "0")

    def score(self, problem: Problem, response: str) -> Score:
        """See `Task.score`."""
        right = float(response[:1].isdigit())
        return Score(right, True, response[:1], correct=right)


def make_model(root: Path) -> None:
    """Random weights as a Hugging Face folder and as a checkpoint, and a tokenizer of characters."""
    import tokenizers
    import transformers
    from tokenizers import Regex, decoders, models, pre_tokenizers

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    inner = tokenizers.Tokenizer(
        models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *characters])}, unk_token=" ")
    )
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(SPECIAL)
    save_tokenizer(inner, root / "tokenizer")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=1, pad_token_id=0, initializer_range=0.08)
    transformers.LlamaForCausalLM(config).save_pretrained(root / "hf")
    import_hf(root / "hf", root / "native", ParallelConfig())


def our_session(root: Path, seed: int, steps: int) -> tuple[Session, Judge, Path]:
    """This project's stage, ready for its first step."""
    run = root / f"ours-{seed}"
    config = RLConfig(
        run_dir=str(run),
        init_from=str(root / "native"),
        tokenizer=str(root / "tokenizer"),
        tasks=[FirstDigit.name],
        rollout=RolloutConfig(group_size=GROUP, prompts_per_step=PROMPTS, max_new_tokens=NEW_TOKENS),
        grpo=GRPOConfig(kl_beta=0.0, normalize_advantage=False, aggregation="token"),
        optimizer=OptimizerConfig(lr=LR, weight_decay=0.0),
        schedule=ScheduleConfig(lr_warmup_steps=0, decay="constant"),
        checkpoint=CheckpointConfig(save_interval=steps + 1, async_save=False),
        monitor=MonitorConfig(tensorboard=False),
        train_steps=steps + 1,
        micro_batch_size=32,
        seed=seed,
    )
    runtime = start(config.parallel, config.seed)
    tasks = check(config)
    judge = Judge(config.rewards, {task.name: task for task in tasks}, NEW_TOKENS)
    return Session(config, tasks, Saver(config.checkpoint), judge, runtime, "ours"), judge, run


def race(root: Path, seed: int, steps: int) -> dict[str, list[float]]:
    """Both sides, a step each in turn; seconds of each step, and rewards."""
    import datasets
    import transformers
    import trl

    session, judge, run = our_session(root, seed, steps)
    result: dict[str, list[float]] = {"ours_seconds": [], "peer_seconds": [], "peer_rewards": []}
    began = [0.0]

    class Turns(transformers.TrainerCallback):
        """Times the peer's step, then takes one of ours."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            """See TrainerCallback."""
            began[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            """See TrainerCallback."""
            result["peer_seconds"].append(time.perf_counter() - began[0])
            mark = time.perf_counter()
            session.step()
            result["ours_seconds"].append(time.perf_counter() - mark)

    def first_digit(completions: list[str], **_: Any) -> list[float]:
        return [float(text[:1].isdigit()) for text in completions]

    task, rng = FirstDigit(), random.Random(seed)
    rows = [{"prompt": task.sample(rng, "train").prompt} for _ in range(PROMPTS * steps)]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(root / "tokenizer" / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="<eos>",
        padding_side="left",
    )
    settings = trl.GRPOConfig(
        output_dir=str(root / f"trl-{seed}"),
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * GROUP,
        num_generations=GROUP,
        max_completion_length=NEW_TOKENS,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        scale_rewards="none",
        epsilon_high=0.28,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        adam_beta2=OptimizerConfig().adam_beta2,
        max_grad_norm=1.0,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    trainer = trl.GRPOTrainer(
        model=str(root / "hf"),
        reward_funcs=first_digit,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Turns()],
    )
    trainer.train()
    judge.close()
    result["peer_rewards"] = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    lines = read_metrics(run / "metrics.jsonl")
    result["ours_rewards"] = [line["reward"] for line in lines]
    working = ("sampling_seconds", "reward_seconds", "update_seconds", "parity_seconds")
    result["overhead"] = [1 - sum(line.get(name, 0.0) for name in working) / line["step_seconds"] for line in lines]
    return result


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    try:
        import trl  # noqa: F401
    except ImportError as error:
        sys.exit(f"{error}; this benchmark compares with TRL: pip install --no-deps trl==1.16.0 accelerate==1.14.0")
    torch.set_num_threads(1)
    register(FirstDigit())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start(ParallelConfig(), seed=0)
        make_model(root)
        runs = [race(root, seed, options.steps) for seed in range(options.seeds)]
    warm = 2  # the first steps allocate
    pairs = [p for r in runs for p in zip(r["ours_seconds"][warm:], r["peer_seconds"][warm:], strict=True)]
    samples = PROMPTS * GROUP
    ours, peer = (samples / statistics.median(side) for side in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    areas = {side: [statistics.mean(r[f"{side}_rewards"]) for r in runs] for side in ("ours", "peer")}
    mean = {side: statistics.mean(values) for side, values in areas.items()}
    spread = max(0.02, *(max(values) - min(values) for values in areas.values()))
    curves = {
        side: [round(statistics.mean(step), 3) for step in zip(*(r[f"{side}_rewards"] for r in runs), strict=True)]
        for side in ("ours", "peer")
    }
    overhead = statistics.median(x for r in runs for x in r["overhead"][warm:])
    lines: list[dict[str, Any]] = [
        {"name": "rl_step", "ours": round(ours, 1), "peer": round(peer, 1), "unit": "responses/s",
         "ratio": round(ratio, 2), "target": 1.5, "pass": ratio >= 1.5},
        {"name": "rl_step curves", "ours": round(mean["ours"], 4), "peer": round(mean["peer"], 4),
         "unit": "mean reward over all steps", "ratio": round(mean["ours"] / mean["peer"], 3),
         "target": f"within {spread:.3f}, the spread of seeds", "pass": abs(mean["ours"] - mean["peer"]) <= spread,
         "curves": curves, "by_seed": areas},
        {"name": "rl_step overhead", "ours": round(overhead, 4), "peer": None, "unit": "share of a step",
         "ratio": None, "target": 0.05, "pass": overhead < 0.05},
    ]  # fmt: skip
    for line in lines:
        if options.json:
            print(json.dumps(line), flush=True)
        else:
            peer_side = "" if line["peer"] is None else f", peer {line['peer']}, ratio {line['ratio']}"
            print(f"{line['name']}: {line['ours']} {line['unit']}{peer_side}, target {line['target']}", flush=True)


if __name__ == "__main__":
    main()
