"""What the fault-injection tests run in processes of their own."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.checkpoint import forked, native, writer
from prism_nemo.checkpoint.saver import Saver
from prism_nemo.config import CheckpointConfig, MidtrainConfig, OptimizerConfig, ParallelConfig, PrecisionConfig
from prism_nemo.models.family import architecture_from_hf
from prism_nemo.runtime import start, stop


def midtrain_alone(config: MidtrainConfig, writing_takes: float) -> None:
    """Mid-training in this process, the leader of a new process group, with a writer that takes its time."""
    os.setsid()
    from prism_nemo.training.midtrain import midtrain

    _delay_writing(writing_takes)
    midtrain(config)


def _delay_writing(seconds: float) -> None:
    for module in (writer, forked):
        real = module._write

        def slow(*args: Any, real: Any = real) -> Any:
            time.sleep(seconds / 2)  # the snapshot lies in shared memory, or in the forked process
            result = real(*args)
            time.sleep(seconds / 2)
            return result

        module._write = slow


def newest_of(folders: list[str]) -> list[tuple[str | None, list[str]]]:
    """For each run's folder of checkpoints, the newest that is whole, and what was wrong with newer ones."""
    from prism_nemo.training.stage import newest_good

    start(ParallelConfig(), seed=0)
    found = []
    for folder in folders:
        latest, problems = newest_good(Path(folder), verify=True)
        found.append((latest.name if latest else None, problems))
    stop()
    return found


class Background:
    """A trainer on random rows, and a saver with its writer."""

    def __init__(
        self,
        shape: dict[str, Any],
        parallel: ParallelConfig,
        prepare: bool = True,
        fork_each: bool = False,
        precision: PrecisionConfig | None = None,
        **config: Any,
    ) -> None:
        from prism_nemo.training.stage import make_trainer
        from prism_nemo.training.trainer import Trainer

        self.saver = Saver(CheckpointConfig(keep=10, **config), fork_each)
        runtime = start(parallel, seed=3, precision=precision)
        settings = OptimizerConfig(lr=1e-2)
        self.trainer = Trainer(architecture_from_hf(shape, "test"), runtime, settings, 32, True)
        self.trainer.set_learning_rate(1e-2)
        start_with = {"parallel": parallel, "dtype": runtime.dtype, "precision": runtime.precision}
        if prepare:
            self.saver.prepare(self.trainer, make_trainer, start_with, *self.trainer.arguments)

    def step(self) -> float:
        from prism_nemo.training.midtrain import forward_step

        tokens = torch.randint(0, 200, (2, 32))
        places = torch.arange(32).expand(2, -1)
        batch = {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(2, 32), "position_ids": places}
        return self.trainer.step(forward_step, iter([batch]), 1, 2, 32).sums["loss"]

    def save(self, path: str | Path, state: native.TrainState, background: bool = True) -> Path | None:
        return self.saver.save(Path(path), self.trainer, state, {}, background)


def saved_twice(
    shape: dict[str, Any],
    folder: str,
    parallel: ParallelConfig,
    fork_each: bool = False,
    precision: PrecisionConfig | None = None,
) -> None:
    """The same moment saved synchronously and in the background, while everything changes in place."""
    _delay_writing(1.0)
    work = Background(shape, parallel, fork_each=fork_each, precision=precision)
    with work.saver:
        for step in (1, 2):
            work.step()
            state = native.TrainState(step, 10 * step, 100 * step, 0.5, {"losses": [float(step)]})
            random = native.generators()
            work.save(f"{folder}/sync/{native.step_directory(Path(), step)}", state, background=False)
            native.restore_generators(random)
            assert work.save(f"{folder}/async/{native.step_directory(Path(), step)}", state) is None
            work.step()
            work.step()
            state.step, state.extra["losses"] = 99, []
            state.extra["losses"].append(3.0)
            work.trainer.set_learning_rate(7.0)
            work.trainer.set_learning_rate(1e-2)
            work.saver.wait()
    stop()


def fails_in_the_background(shape: dict[str, Any], folder: str, parallel: ParallelConfig, how: str, rank: int) -> None:
    """The second save fails in the writer of one rank: 'full', 'error' or 'killed'; training goes on until it shows."""
    real, count = native.dist_checkpointing.save, 0

    def failing(content: Any, directory: str, **kwargs: Any) -> None:
        nonlocal count
        count += 1
        if count == 2 and dist.get_rank() == rank:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device") if how == "full" else RuntimeError("bad luck")
        real(content, directory, **kwargs)

    native.dist_checkpointing.save = failing
    work = Background(shape, parallel)
    with work.saver:
        for step in range(1, 10_000):
            work.step()
            if dist.get_rank() == 0:  # it must learn the cause from its own writer, wherever it failed
                work.saver.poll()
            if step < 3:
                work.save(native.step_directory(Path(folder), step), native.TrainState(step))
            time.sleep(0.01)


def fails_in_a_forked_process(
    shape: dict[str, Any], folder: str, parallel: ParallelConfig, how: str, rank: int
) -> None:
    """The second save fails in the process of one rank; every rank polls after each step, as a stage does."""
    real, saves = forked._write, 0

    def failing(write: Any, *args: Any) -> Any:
        def broken(*_: Any) -> None:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(errno.ENOSPC, "No space left on device") if how == "full" else RuntimeError("bad luck")

        return real(broken if saves == 2 and dist.get_rank() == rank else write, *args)

    forked._write = failing
    work = Background(shape, parallel, fork_each=True)
    with work.saver:
        for step in range(1, 10_000):
            work.step()
            work.saver.poll()
            if step < 3:
                saves = step
                work.save(native.step_directory(Path(folder), step), native.TrainState(step))
            time.sleep(0.01)


def kept_by_policy(shape: dict[str, Any], folder: str, parallel: ParallelConfig) -> list[str]:
    """Three saves by forked processes of which one is kept; the names in the end, seen by rank 0."""
    work = Background(shape, parallel, fork_each=True)
    work.saver.config.keep = 1
    with work.saver:
        for step in (1, 2, 3):
            work.step()
            work.saver.poll()
            work.save(native.step_directory(Path(folder), step), native.TrainState(step))
    stop()
    return sorted(path.name for path in Path(folder).iterdir())


def raises_while_a_forked_process_writes(shape: dict[str, Any], folder: str) -> None:
    """An error in the training loop right after a save began, with a process forked for it."""
    _delay_writing(60.0)
    work = Background(shape, ParallelConfig(), fork_each=True)
    with work.saver:
        work.step()
        work.save(native.step_directory(Path(folder), 1), native.TrainState(1))
        assert work.saver._pending is not None
        (Path(folder).parent / "pid").write_text(str(work.saver._pending._process.pid))
        raise RuntimeError("the training loop broke")


def raises_while_writing(shape: dict[str, Any], folder: str) -> None:
    """An error in the training loop right after a save began."""
    _delay_writing(0.5)
    writer.Writer.close.__defaults__ = (0.02,)  # the process gets no time that it was not waited for
    work = Background(shape, ParallelConfig())
    with work.saver:
        work.step()
        work.save(native.step_directory(Path(folder), 1), native.TrainState(1))
        raise RuntimeError("the training loop broke")


def two_saves(shape: dict[str, Any], folder: str) -> tuple[list[str], float]:
    """Two saves, the second while the first is being written.

    Returns:
        Names in the folder right after the second call, and how long it took.
    """
    _delay_writing(0.4)
    work = Background(shape, ParallelConfig())
    with work.saver:
        work.step()
        work.save(native.step_directory(Path(folder), 1), native.TrainState(1))
        began = time.monotonic()
        work.save(native.step_directory(Path(folder), 2), native.TrainState(2))
        names, seconds = sorted(p.name for p in Path(folder).iterdir()), time.monotonic() - began
    stop()
    return names, seconds


def another_model_in_the_writer(shape: dict[str, Any], folder: str) -> None:
    """The writer builds a model of another shape than the trainer's."""
    from prism_nemo.training.stage import make_trainer

    work = Background(shape, ParallelConfig(), prepare=False)
    other = architecture_from_hf({**shape, "intermediate_size": 2 * shape["intermediate_size"]}, "other")
    start_with = {"parallel": ParallelConfig(), "dtype": torch.float32, "precision": None}
    with work.saver:
        work.saver.prepare(work.trainer, make_trainer, start_with, other, *work.trainer.arguments[1:])
        work.save(native.step_directory(Path(folder), 1), native.TrainState(1))


def writer_ends_with_its_rank(out: str) -> None:
    """The writer's process id in a file; then this process is killed."""
    made = writer.Writer()
    Path(out).write_text(str(made.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def forked_process_ends_with_its_rank(shape: dict[str, Any], folder: str) -> None:
    """A rank is killed while a process of its own writes."""
    _delay_writing(60.0)
    work = Background(shape, ParallelConfig(), fork_each=True)
    work.step()
    work.save(native.step_directory(Path(folder), 1), native.TrainState(1))
    assert work.saver._pending is not None
    (Path(folder).parent / "pid").write_text(str(work.saver._pending._process.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def adam_steps_after_load(shape: dict[str, Any], checkpoint: str) -> tuple[list[float], bool]:
    """Train, save, load, train on: the step counters of Adam, and whether any two parameters share one."""
    work = Background(shape, ParallelConfig(), prepare=False)
    work.step()
    work.step()
    work.save(checkpoint, native.TrainState(2), background=False)
    native.load(Path(checkpoint), work.trainer.raw, work.trainer.optimizer)
    states = work.trainer.optimizer.chained_optimizers[0].optimizer.state
    shared = len({state["step"].data_ptr() for state in states.values()}) < len(states)
    work.step()
    stop()
    return sorted({float(state["step"]) for state in states.values()}), shared
