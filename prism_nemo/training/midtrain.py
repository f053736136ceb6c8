"""Mid-training: blended tokens through Megatron's pipeline schedules, with resume, validation and guards."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prism_nemo.checkpoint.native import TrainState, load, read_architecture
from prism_nemo.checkpoint.saver import Saver
from prism_nemo.config import MidtrainConfig
from prism_nemo.data.plan import DataPlan
from prism_nemo.data.samples import Batch
from prism_nemo.errors import InputError
from prism_nemo.evaluation.in_training.hooks import InTraining
from prism_nemo.evaluation.in_training.suite import Suite, resolve_suite
from prism_nemo.models.family import Architecture, architecture_from_hf
from prism_nemo.models.layers.context_parallel import cut_batch
from prism_nemo.models.layers.documents import pack_documents
from prism_nemo.models.recompute import check_recompute_of, recompute_fields
from prism_nemo.planning.flops import training_flops
from prism_nemo.precision.check import check_precision
from prism_nemo.run import RunDirectory, last_value
from prism_nemo.runtime import Runtime, start, stop
from prism_nemo.training.feed import Feed, Validation, micro_batch_shape, open_held_out, planned
from prism_nemo.training.guards import RollBack, StepGuard, check_guards, check_replicas
from prism_nemo.training.layout import check_batch, check_layout
from prism_nemo.training.monitors import check_monitors, listen
from prism_nemo.training.progress import Progress
from prism_nemo.training.schedule import learning_rate
from prism_nemo.training.stage import begin, check_stage, end_step, newest_good
from prism_nemo.training.stopping import StopRequest
from prism_nemo.training.trainer import Trainer
from prism_nemo.training.utilisation import peak_memory_gb, utilisation
from prism_nemo.training.watch import RankTimes, Watchdog


def check(config: MidtrainConfig) -> Architecture:
    """Everything that can be refused before processes start.

    Returns:
        The architecture that will be trained.

    Raises:
        InputError: Naming the key and what would work.
    """
    from prism_nemo.data.manifest import load_manifest

    check_stage(config, "seq_length", "global_batch_size", "eval_interval", "data.validation_rows")
    check_guards(config.guards)
    check_monitors(config.monitor)
    if (config.init_from is None) == (config.model is None):
        raise InputError("give either init_from (a checkpoint) or model (a configuration to train from scratch)")
    if config.init_from is not None:
        architecture = read_architecture(Path(config.init_from))
    else:
        architecture = architecture_from_hf(dict(config.model or {}), "model")
    layout = config.parallel
    check_layout(architecture, layout, config.use_distributed_optimizer)
    check_recompute_of(config.recompute, architecture, layout, config.precision)
    check_precision(config.precision, architecture, layout, config.use_distributed_optimizer, config.recompute)
    if config.seq_length > architecture.max_position_embeddings:
        raise InputError(
            f"seq_length {config.seq_length} is more than the model's {architecture.max_position_embeddings}"
        )
    check_batch(layout, config.seq_length, config.micro_batch_size, config.global_batch_size)
    manifest = load_manifest(config.data.path)
    if manifest.tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"{config.data.path}: tokens of a vocabulary of {manifest.tokenizer.vocab_size}, but the model has "
            f"{architecture.vocab_size}; build the data with the model's tokenizer"
        )
    if config.data.validation_source is not None:
        open_held_out(config)
    planned(config, manifest)
    _suite(config, architecture)
    return architecture


def _suite(config: MidtrainConfig, architecture: Architecture) -> Suite | None:
    """What is asked while training goes on."""
    from prism_nemo.data.manifest import load_manifest

    path, fp8 = config.data.path, config.precision.fp8 != "off"
    tokenizer = load_manifest(path).tokenizer.path
    return resolve_suite(config.evaluation, architecture, config.parallel, path, config.seq_length, tokenizer, fp8)


def language_model_loss(
    batch: Batch, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of the masked losses with its token count.

    Args:
        batch: `loss_mask` of the losses' shape, 0 or 1. With `sources` (rows, sources), one-hot, and `text_tokens`
            (rows,), the sums are also reported by source.
        losses: [b, s] cross entropies.
    """
    masked = losses.float() * batch["loss_mask"]
    loss_sum, tokens = masked.sum(), batch["loss_mask"].sum()
    report = {"loss": loss_sum.detach(), "tokens": tokens}
    if "sources" in batch:
        sources = batch["sources"]
        values = torch.stack([masked.detach(), batch["loss_mask"]])
        if "row_of_token" in batch:  # a share of the tokens, which may begin and end within a row
            rows = values.new_zeros(2, len(sources)).index_add_(1, batch["row_of_token"], values.flatten(1))
        else:
            rows = values.view(2, len(sources), -1).sum(-1)
        report["source_loss"], report["source_tokens"] = rows @ sources
        report["source_text"] = batch["text_tokens"].float() @ sources
        report["flops"] = batch["flops"]
    return loss_sum, tokens.to(torch.int), report


def forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    """Megatron's forward step for language modelling; every pipeline stage learns where documents begin."""
    whole = next(batches)
    batch, packed = cut_batch(whole), None
    if "cu_seqlens" in whole:
        packed = pack_documents(whole["cu_seqlens"], whole["tokens"].numel(), whole["tokens"].device)
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], packed_seq_params=packed)
    return losses, partial(language_model_loss, batch)


def _plan(state: TrainState) -> DataPlan | None:
    """The order of samples that a state records (see `Feed`)."""
    recorded = state.extra.get("data")
    return None if recorded is None else DataPlan.from_dict(recorded["plan"])


class _Session:
    """What one process of a run holds, from its start or its return to a checkpoint until it ends."""

    def __init__(self, config: MidtrainConfig, stage: str, runtime: Runtime, saver: Saver) -> None:
        self.config, self.runtime, self.saver = config, runtime, saver
        architecture = check(config)
        self.run = RunDirectory(config.run_dir, writes=runtime.is_main)
        overrides = recompute_fields(config.recompute)
        if config.init_from is None:
            overrides.update(
                init_method_std=config.init_method_std,
                embedding_init_method_std=config.embedding_init_method_std,
            )
        self.trainer = Trainer(
            architecture, runtime, config.optimizer, config.seq_length, config.use_distributed_optimizer, **overrides
        )
        self.state, self.saved = begin("midtrain", config, self.run, self.trainer, saver)
        self.progress = Progress(stage, config.train_steps, self.state.step, runtime.is_main)
        self.times = RankTimes(runtime.device, config.guards.slow_rank_ratio)
        self.validation = None
        if config.data.validation_source is not None:
            self.validation = Validation(config, self.trainer, forward_step)
        self.monitors = listen(self.run, config, config.monitor, self.state.step)
        suite = _suite(config, architecture)
        self.evaluation = InTraining(
            config, suite, self.run, self.trainer, forward_step, self.state.step, self.progress.say
        )
        self._open()
        self.loss = last_value(self.run.metrics_path, "loss")

    def _open(self) -> None:
        """What follows from the state: the data from there on, and what the guards remember."""
        lengths_to_flops = partial(training_flops, self.trainer.architecture)
        before = _plan(self.state)
        self.feed = Feed(self.config, self.run, self.state, self.runtime, self.progress.say, lengths_to_flops)
        self.guard = StepGuard(self.config.guards, self.state, self.run)
        if before is not None and before != _plan(self.state):
            self.guard.forget_losses()
        self.stream = iter(self.feed)

    def step(self) -> None:
        """One update, judged, counted and logged.

        Raises:
            RollBack: If the run should go back.
            PrismError: If it cannot go on.
        """
        config, state = self.config, self.state
        began = time.perf_counter()
        lr = learning_rate(config.schedule, config.optimizer.lr, state.step, config.train_steps)
        self.trainer.set_learning_rate(lr)
        with self.times.step():
            result = self.trainer.step(
                forward_step, self.stream, self.feed.micro_batches, *micro_batch_shape(config), self.guard.judge
            )
        loss = result.sums["loss"] / max(result.sums["tokens"], 1)
        first_sample = state.consumed_samples
        news = self.guard.settle(state.step + 1, first_sample, config.global_batch_size, loss, result.grad_norm)
        if news is not None:
            self.progress.say(news)
        seconds = time.perf_counter() - began
        tokens = self.feed.account(result)
        state.step += 1
        state.consumed_samples += config.global_batch_size
        state.consumed_tokens += tokens
        state.seconds += seconds
        if math.isfinite(loss):
            self.loss = loss
        if state.step % config.log_interval == 0 or state.step in (1, config.train_steps):
            self._log(lr, loss, result.grad_norm, tokens / seconds, result.sums["flops"] / seconds)
        if self.loss is not None:
            speed = state.consumed_tokens / state.seconds
            self.progress.update(state.step, f"loss {self.loss:.3f}  {speed:,.0f} tok/s")

    def _log(self, lr: float, loss: float, grad_norm: float, speed: float, flops: float) -> None:
        state = self.state
        busy, warning = self.times.slowest()
        if warning is not None:
            self.progress.say(f"step {state.step}: {warning}")
        values = {
            "step": state.step,
            # JSON has no NaN; a step without a finite loss is in bad_steps.jsonl.
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "lr": lr,
            "tokens": state.consumed_tokens,
            "skipped_steps": self.guard.skipped,
            "tokens_per_second": speed,
            **utilisation(flops / self.runtime.world_size, self.runtime.device),
            "memory_gb": peak_memory_gb(self.runtime.device),
            "seconds": state.seconds,
            **busy,
            **self.feed.log_values(state.consumed_samples),
        }
        self.run.log({name: value for name, value in values.items() if value is not None})

    def go_back(self, reason: str) -> bool:
        """Return to the newest checkpoint, and go on behind the samples that led away from it.

        Returns:
            Whether there was one; if not, the step counts as left out.
        """
        bad, step = self.state.consumed_samples + self.config.global_batch_size, self.state.step + 1
        self.saver.wait()
        before, verify = self.guard, self.config.checkpoint.verify_on_load
        latest, problems = newest_good(self.run.checkpoints, verify)
        for problem in problems:
            self.progress.say(problem)
        if latest is None:
            self.progress.say(f"step {step}: {reason}; there is no checkpoint to go back to: the step is left out")
            self.state.step += 1
            self.state.consumed_samples = bad
            return False
        self.state = load(latest, self.trainer.raw, self.trainer.optimizer)
        event = {"event": "rolled back", "step": step, "to": self.state.step, "reason": reason}
        self.run.record({**event, "left_out": [self.state.consumed_samples, bad]})
        self.progress.say(
            f"step {step}: {reason}; back to step {self.state.step}, and on from sample {bad:,}: samples "
            f"{self.state.consumed_samples:,} to {bad - 1:,} are left out"
        )
        self.run.truncate_metrics(self.state.step)
        self.evaluation.rewind(self.state.step)
        self.state.consumed_samples = bad
        self._open()
        self.guard.rolled_back(before)
        return True


def midtrain(config: MidtrainConfig, stage: str = "midtrain") -> dict[str, Any]:
    """Run or continue the stage; every rank calls this.

    Args:
        config: As resolved; `check` must have passed.
        stage: Name in the progress line.

    Returns:
        Summary: last step, last loss, tokens, seconds, checkpoint.

    Raises:
        StoppedEarly: On a signal or the time limit, after saving.
        PrismError: If loss or gradient stay without a finite value, replicas differ, or a save fails.
    """
    saver = Saver(config.checkpoint)  # forks its writer, so before there are threads and process groups
    runtime = start(config.parallel, config.seed, precision=config.precision)
    with (
        StopRequest(config.max_seconds, runtime.device) as request,
        Watchdog(config.guards.watchdog_seconds, runtime.rank) as watchdog,
        saver,
        ExitStack() as ending,
    ):
        watchdog.alive("building the model and loading the checkpoint")
        session = _Session(config, stage, runtime, saver)
        ending.callback(session.monitors.close)
        ending.callback(session.evaluation.close)
        while session.state.step < config.train_steps:
            watchdog.alive(f"step {session.state.step + 1}")
            try:
                session.step()
            except RollBack as back:
                if session.go_back(str(back)):
                    continue
            state, interval = session.state, config.guards.replica_check_interval
            if interval and state.step % interval == 0:
                check_replicas(session.trainer.raw, state.step)
            if session.validation is not None and (
                state.step % config.eval_interval == 0 or state.step == config.train_steps
            ):
                watchdog.alive(f"the validation after step {state.step}")
                session.run.log({"step": state.step, "validation_loss": session.validation.loss()})
            session.evaluation.after_step(state.step, watchdog.alive)
            watchdog.alive(f"saving after step {state.step}")
            saved = end_step(stage, config, session.run, session.trainer, state, request, saver)
            session.saved = saved or session.saved
        session.evaluation.finish(watchdog.alive)
    stop()
    return {
        "step": session.state.step,
        "loss": session.loss,
        "tokens": session.state.consumed_tokens,
        "seconds": session.state.seconds,
        "checkpoint": str(session.saved),
    }
