"""The RL stage: rollout, reward, advantage, update; resumable at every checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from prism_nemo.checkpoint.native import TrainState, read_architecture
from prism_nemo.checkpoint.saver import Saver
from prism_nemo.config import RLConfig
from prism_nemo.data.tokenizer import load_tokenizer
from prism_nemo.evaluation.in_training.hooks import InTraining
from prism_nemo.generation.engine import Engine
from prism_nemo.generation.vllm import VLLMEngine
from prism_nemo.models.recompute import recompute_fields
from prism_nemo.rl.check import check, suite_of, tasks_of
from prism_nemo.rl.collect import Collected, Collector, sum_over_ranks
from prism_nemo.rl.metrics import keep_samples, metrics_line, summarise
from prism_nemo.rl.parity import check_gap, check_parity
from prism_nemo.rl.prompts import PromptStream
from prism_nemo.rl.reference import Reference
from prism_nemo.rl.rewards.judge import Judge
from prism_nemo.rl.rewards.task import Task
from prism_nemo.rl.scoring import length_fields
from prism_nemo.rl.store import RolloutStore
from prism_nemo.rl.update import Updater, update_values
from prism_nemo.run import RunDirectory, last_value
from prism_nemo.runtime import Runtime, start, stop
from prism_nemo.training.guards import StepGuard, check_replicas
from prism_nemo.training.midtrain import forward_step
from prism_nemo.training.monitors import listen
from prism_nemo.training.progress import Progress
from prism_nemo.training.schedule import learning_rate
from prism_nemo.training.stage import begin, end_step
from prism_nemo.training.stopping import StopRequest
from prism_nemo.training.trainer import StepResult, Trainer
from prism_nemo.training.watch import Watchdog

__all__ = ["check", "train"]


class Session:
    """One start of the stage: what its steps share. `train` drives it; the benchmark takes single steps."""

    def __init__(
        self, config: RLConfig, tasks: Sequence[Task], saver: Saver, judge: Judge, runtime: Runtime, stage: str
    ) -> None:
        self.config, self.saver, self.stage, self.runtime = config, saver, stage, runtime
        self.tokenizer = load_tokenizer(config.tokenizer)
        architecture = read_architecture(Path(config.init_from))
        self.run = RunDirectory(config.run_dir, writes=runtime.is_main)
        self.trainer = Trainer(
            architecture,
            runtime,
            config.optimizer,
            architecture.max_position_embeddings,
            config.use_distributed_optimizer,
            **length_fields(config.parallel),
            **recompute_fields(config.recompute),
        )
        self.state, self.saved = begin("rl", config, self.run, self.trainer, saver)
        first_of_rank = (
            parallel_state.get_tensor_model_parallel_rank() == 0 and parallel_state.is_pipeline_first_stage()
        )
        self.store = RolloutStore(
            self.run.path, parallel_state.get_data_parallel_rank(), first_of_rank and config.keep_rollouts == "all"
        )
        self.store.truncate(self.state.step)
        self.reference = None
        if config.grpo.kl_beta > 0:
            folder = self.run.path / "reference"
            self.reference = Reference(self.trainer, config.grpo, Path(config.init_from), folder, self.state)
        stream = PromptStream(tasks, config.seed, config.task_shares)
        self.vllm = self._vllm() if config.rollout.backend == "vllm" else None
        rollout = config.rollout
        engine = self.vllm or Engine(self.trainer.raw, rollout.slots, rollout.cache_tokens or None)
        self.collector = Collector(config, stream, engine, judge, self.tokenizer)
        self.updater = Updater(config, self.trainer, self.reference, self.tokenizer.pad_id)
        self.guard = StepGuard(config.guards, self.state, self.run)
        self.progress = Progress(stage, config.train_steps, self.state.step, runtime.is_main)
        self.first_step = self.state.step
        self.reward = last_value(self.run.metrics_path, "reward")
        self.monitors = listen(self.run, config, config.monitor, self.state.step)
        suite = suite_of(config, architecture)
        self.evaluation = InTraining(
            config, suite, self.run, self.trainer, forward_step, self.state.step, self.progress.say
        )

    def step(self) -> None:
        """Sample, score, update, report; moves the state."""
        config, state = self.config, self.state
        clock: dict[str, float] = {}
        began = mark = time.perf_counter()

        def lap(name: str) -> None:
            nonlocal mark
            now = time.perf_counter()
            clock[name], mark = now - mark, now

        if self.vllm is not None:
            # Here and not after the update: also the first step of a start, which may go on from a checkpoint.
            self.vllm.refit(self.trainer.raw)
            lap("refit_seconds")
        self.trainer.model.eval()
        collected = self.collector.collect(state)
        self.trainer.model.train()
        clock["reward_seconds"] = self.collector.reward_seconds
        lap("sampling_seconds")
        clock["sampling_seconds"] -= clock["reward_seconds"]
        if state.step == self.first_step:
            batches = self.updater.micro_batches(collected.sampled)
            gap = check_parity(self.trainer, collected.sampled, batches, config.rollout.backend)
            self.run.record({"event": "parity", "step": state.step + 1, "logprob_gap": gap})
            lap("parity_seconds")
        means = sum_over_ranks(summarise(collected, config.rollout.group_size))
        self._tell_failures(means)
        lr = learning_rate(config.schedule, config.optimizer.lr, state.step, config.train_steps)
        self.trainer.set_learning_rate(lr)
        prepared = self.updater.prepare(collected.used, collected.sampled[0])
        lap("scoring_seconds")
        results = self._update(prepared, int(means["responses"]))
        lap("update_seconds")
        state.step += 1
        if self.reference is not None:
            self.reference.update(state)
        state.consumed_samples += int(means["responses"])
        state.consumed_tokens += int(means["response_tokens"])
        clock["step_seconds"] = time.perf_counter() - began
        state.seconds += clock["step_seconds"]
        self._report(collected, means, results, lr, clock)

    def _tell_failures(self, means: dict[str, float]) -> None:
        failed = {name[7:]: int(count) for name, count in means.items() if name.startswith("failed/")}
        if failed:
            kinds = ", ".join(f"{kind} {count}" for kind, count in failed.items())
            self.progress.say(
                f"step {self.state.step + 1}: {sum(failed.values())} of {int(means['responses'])} responses have no "
                f"verdict ({kinds}); they do not take part in the advantage"
            )

    def _vllm(self) -> VLLMEngine:
        model, rollout = self.trainer.raw, self.config.rollout
        positions = model.architecture.max_position_embeddings
        folder = self.run.path / "vllm"
        return VLLMEngine(model, folder, self.runtime.dtype, positions, rollout.vllm_memory_share)

    def _judge(self, sums: dict[str, float], grad_norm: float) -> str | None:
        check_gap(sums, self.runtime.dtype, self.state.step + 1)
        return self.guard.judge(sums, grad_norm)

    def _update(self, prepared: list[Any], responses: int) -> list[StepResult]:
        results = []
        for _ in range(self.config.grpo.epochs):
            for mini in prepared:
                result = self.updater.step(mini, self._judge)
                loss = result.sums["loss"] / max(result.sums["tokens"], 1)
                first = self.state.consumed_samples
                news = self.guard.settle(self.state.step + 1, first, responses, loss, result.grad_norm)
                if news is not None:
                    self.progress.say(news)
                results.append(result)
        return results

    def _report(
        self,
        collected: Collected,
        means: dict[str, float],
        results: list[StepResult],
        lr: float,
        clock: dict[str, float],
    ) -> None:
        state, config = self.state, self.config
        self.reward = means["score"] / means["responses"]
        self.store.write(state.step, collected.sampled)
        if state.step % config.log_interval == 0 or state.step == config.train_steps:
            line = metrics_line(state, means, update_values(results), lr, clock, config.control)
            if config.grpo.dynamic_sampling:
                line["sampling_rounds"] = collected.rounds
            epochs = self.collector.epochs(state)
            if epochs:
                line["prompt_epochs"] = epochs
            self.run.log(line)
            keep_samples(self.run, state.step, collected.sampled)
        length = means["response_tokens"] / means["responses"]
        speed = state.consumed_samples / state.seconds
        self.progress.update(state.step, f"reward {self.reward:.3f}  length {length:.0f}  {speed:.0f} responses/s")

    def end_step(self, request: StopRequest) -> None:
        """Save or stop where that is due."""
        saving = []

        def before_save() -> None:
            saving.append(True)
            if self.reference is not None:
                self.reference.save(self.state)

        saved = end_step(
            self.stage, self.config, self.run, self.trainer, self.state, request, self.saver, before_save=before_save
        )
        self.saved = saved or self.saved
        if saving and self.reference is not None:
            # Not before: until a new save begins, the one before it may still be on its way to disk.
            self.reference.remove_unused(self.run.checkpoints)


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
        PrismError: If a number stops being finite, sampler and trainer part later on, or a save fails.
    """
    saver = Saver(config.checkpoint)  # forks its writer, so before there are threads and process groups
    tasks = tasks_of(config)
    tokenizer = load_tokenizer(config.tokenizer)
    judge = Judge(config.rewards, {task.name: task for task in tasks}, config.rollout.max_new_tokens, tokenizer.end)
    with ExitStack() as ending:
        ending.enter_context(judge)
        runtime = start(config.parallel, config.seed, precision=config.precision)
        session = Session(config, tasks, saver, judge, runtime, stage)
        request = ending.enter_context(StopRequest(config.max_seconds, runtime.device))
        watchdog = ending.enter_context(Watchdog(config.guards.watchdog_seconds, runtime.rank))
        ending.enter_context(saver)
        ending.callback(session.monitors.close)
        ending.callback(session.evaluation.close)
        state: TrainState = session.state
        while state.step < config.train_steps:
            watchdog.alive(f"step {state.step + 1}")
            session.step()
            if config.guards.replica_check_interval and state.step % config.guards.replica_check_interval == 0:
                check_replicas(session.trainer.raw, state.step)
            session.evaluation.after_step(state.step, watchdog.alive)
            session.end_step(request)
        session.evaluation.finish(watchdog.alive)
    stop()
    return {"step": state.step, "reward": session.reward, "seconds": state.seconds, "checkpoint": str(session.saved)}
