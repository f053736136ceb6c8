"""The RL stage: rollout, reward, advantage, one on-policy update; resumable at every checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.checkpoint.saver import Saver
from prism_nemo.config import RLConfig
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.errors import InputError
from prism_nemo.models.build import build_model
from prism_nemo.models.decoder import LanguageModel
from prism_nemo.models.forward import positions
from prism_nemo.models.recompute import check_recompute_of, recompute_fields
from prism_nemo.precision.check import check_precision
from prism_nemo.rl.grpo import group_advantages, policy_loss
from prism_nemo.rl.metrics import keep_samples, metrics_line, sum_over_ranks, summarise
from prism_nemo.rl.rewards.task import Task, task_named
from prism_nemo.rl.rollout import PolicyBatch, Rollout, collate, draw_prompts, roll_out
from prism_nemo.run import RunDirectory, last_value
from prism_nemo.runtime import start, stop
from prism_nemo.training.guards import StepGuard, check_guards, check_replicas
from prism_nemo.training.layout import check_layout
from prism_nemo.training.monitors import check_monitors, listen
from prism_nemo.training.progress import Progress
from prism_nemo.training.schedule import learning_rate
from prism_nemo.training.stage import begin, check_stage, end_step
from prism_nemo.training.stopping import StopRequest
from prism_nemo.training.trainer import Trainer
from prism_nemo.training.watch import Watchdog

# fp32 log-probabilities of sampler and trainer differ by rounding, 1e-6 per token; a wrong position, mask or cache
# shows at 1e-2 and above. bf16 kernels differ by up to 1e-2. Above this the stage refuses to start.
PARITY_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def check(config: RLConfig) -> list[Task]:
    """Everything that can be refused before processes start.

    Raises:
        InputError: Naming the key and what would work.
    """
    check_stage(config, "rollout.prompts_per_step", "rollout.max_new_tokens")
    if not config.tasks:
        raise InputError("tasks: name at least one, for example tasks=[arithmetic]")
    tasks = [task_named(name) for name in config.tasks]
    architecture = read_architecture(Path(config.init_from))
    layout = config.parallel
    check_layout(architecture, layout, config.use_distributed_optimizer)
    check_recompute_of(config.recompute, architecture, layout, config.precision)
    check_precision(config.precision, architecture, layout, config.use_distributed_optimizer, config.recompute)
    if config.precision.fp8 != "off":
        # Rollouts decode from the weights without FP8 (generation/layers.py): another policy than the one trained.
        raise InputError(
            f"precision.fp8: {config.precision.fp8} is not available for RL: rollouts are sampled without FP8, and "
            "every update would follow another policy than the sampled one; leave it off"
        )
    if layout.pipeline_model_parallel_size > 1:
        raise InputError("parallel.pipeline_model_parallel_size: rollouts need 1; use tensor or data parallelism")
    check_guards(config.guards)
    check_monitors(config.monitor)
    if config.guards.spike == "rollback":
        raise InputError("guards.spike: an RL stage samples anew and has no data to leave out; use off, warn or skip")
    if config.rollout.prompts_per_step % layout.data_parallel_size:
        raise InputError(
            f"rollout.prompts_per_step {config.rollout.prompts_per_step} is not a multiple of "
            f"parallel.data_parallel_size {layout.data_parallel_size}"
        )
    if layout.context_parallel_size > 1 or layout.overlap_grad_reduce:
        raise InputError(
            "parallel.context_parallel_size, parallel.overlap_grad_reduce: responses have any length and ranks any "
            "number of micro-batches; RL runs with 1 and without overlap; use tensor or data parallelism"
        )
    if layout.sequence_parallel:
        raise InputError("parallel.sequence_parallel: responses have any length; RL runs without it")
    if config.rollout.group_size < 2:
        raise InputError("rollout.group_size: a group of fewer than 2 responses has no relative advantage")
    if config.rollout.temperature != 1.0 or config.rollout.top_p != 1.0:
        # The loss compares log-probabilities of the policy itself with those of the sampler; tokens drawn from another
        # distribution would get an importance weight that does not know of it.
        raise InputError(
            f"rollout.temperature {config.rollout.temperature}, rollout.top_p {config.rollout.top_p}: training needs "
            "samples of the policy itself, temperature 1 and top_p 1"
        )
    if config.rollout.max_new_tokens >= architecture.max_position_embeddings:
        raise InputError(
            f"rollout.max_new_tokens {config.rollout.max_new_tokens} leaves no room for a prompt within the model's "
            f"{architecture.max_position_embeddings} positions"
        )
    if config.grpo.kl_beta < 0:
        raise InputError(f"grpo.kl_beta: {config.grpo.kl_beta} is negative; 0 means no KL term")
    vocab = load_tokenizer(config.tokenizer).vocab_size
    if vocab > architecture.vocab_size:
        raise InputError(f"{config.tokenizer}: {vocab} tokens, but the model has {architecture.vocab_size}")
    return tasks


def token_logprobs(model: torch.nn.Module, batch: PolicyBatch) -> torch.Tensor:
    """[B, S] log-probabilities of the labels, through tensor-parallel ranks."""
    return -model(batch.tokens, positions(batch.tokens), None, labels=batch.labels)


def _micro_batches(
    rollouts: list[Rollout], advantages: list[float], config: RLConfig, pad_id: int, device: torch.device
) -> list[PolicyBatch]:
    """Responses that have a gradient, sorted by length so that little is padding.

    Without a KL term a response of zero advantage has none, and its tokens stay out of the denominator; with one, every
    response is held to the reference.
    """
    kept = [i for i in range(len(rollouts)) if advantages[i] != 0.0 or config.grpo.kl_beta > 0]
    kept.sort(key=lambda i: len(rollouts[i].response.prompt) + len(rollouts[i].response.tokens))
    size = config.micro_batch_size
    batches = []
    for first in range(0, len(kept), size):
        rows = kept[first : first + size]
        batches.append(collate([rollouts[i] for i in rows], [advantages[i] for i in rows], pad_id, device))
    return batches


@torch.no_grad()
def check_parity(trainer: Trainer, rollouts: list[Rollout], micro_batch_size: int, pad_id: int) -> None:
    """Compare the sampler's log-probabilities with the trainer's before the first update; every rank calls this.

    Raises:
        InputError: If they part: every update would then follow another policy than the one that was sampled.
    """
    device, limit = trainer.runtime.device, PARITY_LIMIT[trainer.runtime.dtype]
    sums = {"gap": 0.0, "tokens": 0.0}
    for first in range(0, len(rollouts), micro_batch_size):
        part = rollouts[first : first + micro_batch_size]
        batch = collate(part, [0.0] * len(part), pad_id, device)
        gap = (token_logprobs(trainer.model, batch).float() - batch.sampler_logprobs).abs() * batch.mask
        sums["gap"] += float(gap.sum())
        sums["tokens"] += float(batch.mask.sum())
    sums = sum_over_ranks(sums)
    mean = sums["gap"] / sums["tokens"]
    if not mean <= limit:  # also where it is not a number
        raise InputError(
            f"sampler and trainer disagree: mean log-probability gap {mean:.2e} per token on the first batch (limit "
            f"{limit:.0e}); updates would not follow the sampled policy"
        )


class _Reference:
    """The policy that the KL term holds on to: a frozen copy of the starting weights."""

    def __init__(self, trainer: Trainer, init_from: Path) -> None:
        self.model: LanguageModel = build_model(trainer.architecture, trainer.runtime, trainer.raw.max_sequence_length)
        load(init_from, self.model)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def logprobs(self, batch: PolicyBatch) -> torch.Tensor:
        return token_logprobs(self.model, batch).float()


def train(config: RLConfig, stage: str = "rl") -> dict[str, Any]:
    """Run or continue the stage; every rank calls this.

    Args:
        config: As resolved; `check` must have passed.
        stage: Name in the progress line.

    Returns:
        Summary: last step, last reward, seconds, checkpoint.

    Raises:
        StoppedEarly: On a signal or the time limit, after saving.
        InputError: If sampler and trainer disagree on the first batch.
        PrismError: If a number stops being finite, or a save fails.
    """
    saver = Saver(config.checkpoint)  # forks its writer, so before there are threads and process groups
    runtime = start(config.parallel, config.seed, precision=config.precision)
    tasks = check(config)
    by_name = {task.name: task for task in tasks}
    tokenizer = load_tokenizer(config.tokenizer)
    architecture = read_architecture(Path(config.init_from))
    run = RunDirectory(config.run_dir, writes=runtime.is_main)
    trainer = Trainer(
        architecture,
        runtime,
        config.optimizer,
        architecture.max_position_embeddings,
        config.use_distributed_optimizer,
        **recompute_fields(config.recompute),
    )
    state, saved = begin("rl", config, run, trainer, saver)
    reference = _Reference(trainer, Path(config.init_from)) if config.grpo.kl_beta > 0 else None

    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), config.parallel.data_parallel_size
    share = config.rollout.prompts_per_step // dp_size
    group = config.rollout.group_size
    progress = Progress(stage, config.train_steps, state.step, runtime.is_main)
    first_step, reward = state.step, last_value(run.metrics_path, "reward")

    def forward_step(batches: Iterator[PolicyBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        batch = next(batches)
        logprobs = token_logprobs(model, batch)

        def loss_of(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            ref = reference.logprobs(batch) if reference is not None else None
            result = policy_loss(
                output.float(), batch.sampler_logprobs, batch.advantages, batch.mask, config.grpo, None, ref
            )
            return result.loss, batch.mask.sum().to(torch.int), result.sums

        return logprobs, loss_of

    guard = StepGuard(config.guards, state, run)
    with (
        StopRequest(config.max_seconds, runtime.device) as request,
        Watchdog(config.guards.watchdog_seconds, runtime.rank) as watchdog,
        saver,
        ExitStack() as ending,
    ):
        ending.callback(listen(run, config, config.monitor, state.step).close)
        while state.step < config.train_steps:
            watchdog.alive(f"step {state.step + 1}")
            began = time.perf_counter()
            step = state.step
            problems = draw_prompts(tasks, config.rollout.prompts_per_step, step, config.seed)
            mine = problems[dp_rank * share : (dp_rank + 1) * share]
            seed = (config.seed * 1_000_003 + step) * 1009 + dp_rank
            trainer.model.eval()
            rollouts = roll_out(trainer.raw, mine, by_name, tokenizer, config.rollout, seed)
            trainer.model.train()
            sampled = time.perf_counter()
            if step == first_step:
                check_parity(trainer, rollouts, config.micro_batch_size, tokenizer.pad_id)
            rewards = torch.tensor([r.score.reward for r in rollouts])
            advantages = group_advantages(rewards, group, config.grpo.normalize_advantage).tolist()
            batches = _micro_batches(rollouts, advantages, config, tokenizer.pad_id, runtime.device)
            means = sum_over_ranks({**summarise(rollouts, group), "batches": len(batches)})
            lr = learning_rate(config.schedule, config.optimizer.lr, step, config.train_steps)
            trainer.set_learning_rate(lr)
            result = None
            if means["batches"] > 0:
                # A rank without a live group joins the update with one response of no weight: all reduce together.
                batches = batches or [_no_weight(rollouts[:1], tokenizer.pad_id, runtime.device)]
                result = trainer.step(
                    forward_step,
                    iter(batches),
                    len(batches),
                    config.micro_batch_size,
                    batches[0].tokens.shape[1],
                    guard.judge,
                )
                loss = result.sums["loss"] / max(result.sums["tokens"], 1)
                news = guard.settle(step + 1, state.consumed_samples, int(means["responses"]), loss, result.grad_norm)
                if news is not None:
                    progress.say(news)
            seconds = time.perf_counter() - began
            state.step += 1
            state.consumed_samples += int(means["responses"])
            state.consumed_tokens += int(means["response_tokens"])
            state.seconds += seconds
            reward = means["reward"] / means["responses"]
            if state.step % config.log_interval == 0 or state.step == config.train_steps:
                run.log(metrics_line(state, means, result, lr, sampled - began, seconds))
                keep_samples(run, state.step, rollouts, tokenizer)
            length = means["response_tokens"] / means["responses"]
            speed = state.consumed_samples / state.seconds
            progress.update(state.step, f"reward {reward:.3f}  length {length:.0f}  {speed:.0f} responses/s")
            if config.guards.replica_check_interval and state.step % config.guards.replica_check_interval == 0:
                check_replicas(trainer.raw, state.step)
            saved = end_step(stage, config, run, trainer, state, request, saver) or saved
    stop()
    return {"step": state.step, "reward": reward, "seconds": state.seconds, "checkpoint": str(saved)}


def _no_weight(rollouts: list[Rollout], pad_id: int, device: torch.device) -> PolicyBatch:
    batch = collate(rollouts, [0.0] * len(rollouts), pad_id, device)
    batch.mask.zero_()
    return batch
