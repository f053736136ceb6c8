"""What a mid-training run reads: its plan, recorded in every checkpoint, its batches, and what they came to so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from prism_nemo.checkpoint.native import TrainState
from prism_nemo.config import MidtrainConfig
from prism_nemo.data.batches import BatchIterator
from prism_nemo.data.held_out import HeldOut
from prism_nemo.data.manifest import Manifest, load_manifest
from prism_nemo.data.plan import DataPlan, check_epochs, continue_plan, differences, make_plan
from prism_nemo.data.samples import Batch, Samples
from prism_nemo.errors import InputError, PrismError
from prism_nemo.run import RunDirectory
from prism_nemo.runtime import Runtime
from prism_nemo.training.trainer import StepResult, Trainer

_STATE = "data"  # in TrainState.extra


def planned(config: MidtrainConfig, manifest: Manifest) -> DataPlan:
    """Returns the plan that a configuration asks for, for a run from its first sample on.

    Raises:
        InputError: A number out of range, or a source that would be repeated above its limit.
    """
    plan = make_plan(manifest, seq_length=config.seq_length, seed=config.seed, packing=config.data.packing)
    check_epochs(plan, manifest, config.train_steps * config.global_batch_size)
    return plan


def _end(config: MidtrainConfig, state: TrainState) -> int:
    """One past the last sample of the run; a rollback leaves samples out, so there may be more than steps read."""
    return state.consumed_samples + (config.train_steps - state.step) * config.global_batch_size


def micro_batch_shape(config: MidtrainConfig) -> tuple[int, int]:
    """Rows and tokens of what the model is given: isolated documents come as one packed row."""
    if config.data.isolate_documents:
        return 1, config.micro_batch_size * config.seq_length
    return config.micro_batch_size, config.seq_length


class Feed:
    """Batches of a run, and the account of what was read.

    The plan, the tokens read of each source and the losses since the last line of the log are part of the training
    state, so a run that was stopped logs what one that never stopped logs.

    Args:
        config: Of the stage.
        run: Its directory; a changed mixture is recorded in its lineage.
        state: From the newest checkpoint; filled with the plan.
        runtime: This process.
        say: Told about long work.
        flops_of: FLOPs of a training pass over a row of documents of these lengths.

    Attributes:
        micro_batches: Micro-batches per step on this rank.

    Raises:
        InputError: The data or its order is not what the checkpoint was trained on, and the change was not asked for.
        PrismError: The index cannot be written.
    """

    def __init__(
        self,
        config: MidtrainConfig,
        run: RunDirectory,
        state: TrainState,
        runtime: Runtime,
        say: Callable[[str], None],
        flops_of: Callable[[list[int]], float],
    ) -> None:
        manifest = load_manifest(config.data.path)
        wanted = plan = planned(config, manifest)
        if state.consumed_samples:
            if _STATE not in state.extra:
                raise InputError(
                    f"{config.run_dir}: its checkpoints do not record the order of their samples, so it cannot go on "
                    "exactly; start a new stage from the newest one (init_from)."
                )
            recorded = DataPlan.from_dict(state.extra[_STATE]["plan"])
            plan = continue_plan(recorded, wanted, state.consumed_samples, config.data.change_mixture)
            check_epochs(plan, manifest, _end(config, state))
            if plan != recorded:
                what, sample = differences(recorded, plan), state.consumed_samples
                change = {"step": state.step, "sample": sample, "what": what, "plan": plan.hash}
                run.record({"event": "mixture changed", **change})
                say(f"data: from sample {sample:,} on: {'; '.join(what)}")
        run.record({"event": "data", "path": str(Path(config.data.path).resolve()), "plan": plan.hash})
        index = Path(config.data.index_dir) if config.data.index_dir else run.path / "index"
        self._samples = Samples(manifest, plan, index, config.data.isolate_documents)
        self._prepare(state.consumed_samples, _end(config, state), runtime, say)
        batches = BatchIterator(
            self._samples,
            micro_batch_size=config.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=config.parallel.data_parallel_size,
            global_batch_size=config.global_batch_size,
            consumed_samples=state.consumed_samples,
        )
        self.micro_batches = batches.micro_batches_per_step
        self._flops_of = flops_of
        self._batches, self._device, self._extra = batches, runtime.device, state.extra
        before = state.extra.get(_STATE, {})
        self._extra[_STATE] = {
            "plan": plan.to_dict(),
            "tokens": dict(before.get("tokens", {})),
            "window": {name: list(sums) for name, sums in before.get("window", {}).items()},
        }

    def _prepare(self, first: int, end: int, runtime: Runtime, say: Callable[[str], None]) -> None:
        problem: list[str | None] = [None]
        if runtime.is_main:
            try:
                self._samples.prepare(first, end, say)
            except PrismError as error:
                problem = [str(error)]
        # The others wait here, and hear of a failure instead of waiting for ever.
        if runtime.world_size > 1:
            dist.broadcast_object_list(problem, src=0)
        if problem[0]:
            raise PrismError(problem[0])

    def __iter__(self) -> Iterator[Batch]:
        """This rank's micro-batches on its device, for ever; `sources` is one-hot, (rows, sources)."""
        for batch in self._batches:
            ids = batch.pop("sources")
            if "cu_seqlens" in batch:
                lengths = batch["cu_seqlens"].diff().tolist()
            else:
                lengths = [batch["tokens"].shape[1]] * len(ids)
            batch["flops"] = torch.tensor(self._flops_of(lengths), dtype=torch.float64)
            batch["sources"] = torch.nn.functional.one_hot(ids, len(self._samples.names)).float()
            yield to_device(self._device, batch)

    def account(self, result: StepResult) -> int:
        """Adds a step to the account.

        Returns:
            The tokens of text that the step read, padding left out, over all ranks.
        """
        mine = self._extra[_STATE]
        arrays = result.arrays
        for i, drawn in enumerate(self._samples.plan.sources):
            text = int(arrays["source_text"][i])
            mine["tokens"][drawn.prefix] = mine["tokens"].get(drawn.prefix, 0) + text
            sums = mine["window"].setdefault(drawn.name, [0.0, 0.0])
            sums[0] += arrays["source_loss"][i]
            sums[1] += arrays["source_tokens"][i]
        return int(sum(arrays["source_text"]))

    def log_values(self, consumed_samples: int) -> dict[str, float]:
        """The realised mixture, and the mean loss of each source since the last call.

        Returns:
            For each source `tokens/NAME` (so far), `epoch/NAME` (passes so far), and `loss/NAME` where it was read.
        """
        mine, plan = self._extra[_STATE], self._samples.plan
        counts = plan.counts(consumed_samples)
        values: dict[str, float] = {}
        for drawn in plan.sources:
            values[f"tokens/{drawn.name}"] = mine["tokens"].get(drawn.prefix, 0)
            values[f"epoch/{drawn.name}"] = round(counts.get(drawn.prefix, 0) / drawn.rows_per_epoch, 4)
            loss, tokens = mine["window"].get(drawn.name, (0.0, 0.0))
            if tokens:
                values[f"loss/{drawn.name}"] = loss / tokens
        mine["window"] = {}
        return values


def to_device(device: torch.device, batch: Batch) -> Batch:
    """The batch on a device; `cu_seqlens` stays on the CPU, where it is looked at."""
    return {
        name: tensor if name == "cu_seqlens" else tensor.to(device, non_blocking=True) for name, tensor in batch.items()
    }


class Validation:
    """Mean loss on evenly spaced held-out rows of one source, shared over data-parallel ranks.

    Every row counts once, whatever the layout: micro-batches are filled up with rows that no loss counts.

    Args:
        config: Of the stage; names the source and the rows.
        trainer: Whose model is asked.
        forward_step: As in training.
    """

    def __init__(self, config: MidtrainConfig, trainer: Trainer, forward_step: Callable[..., Any]) -> None:
        self._config, self._trainer, self._forward_step = config, trainer, forward_step
        self._held_out = open_held_out(config)

    def loss(self) -> float:
        """The mean over tokens."""
        config = self._config
        count = validation_micro_batches(config)
        first = count * parallel_state.get_data_parallel_rank()
        batches = (
            to_device(self._trainer.runtime.device, held_out_batch(self._held_out, config, number))
            for number in range(first, first + count)
        )
        sums = self._trainer.evaluate(self._forward_step, batches, count, *micro_batch_shape(config))
        return sums["loss"] / sums["tokens"]


def open_held_out(config: MidtrainConfig) -> HeldOut:
    """The held-out rows that a configuration asks for.

    Raises:
        InputError: No such source, or too little text.
    """
    data = config.data
    return HeldOut(
        data.path, data.validation_source or "", config.seq_length, data.validation_rows, data.isolate_documents
    )


def validation_micro_batches(config: MidtrainConfig) -> int:
    """Micro-batches of a validation on each data-parallel rank: enough for all rows, in whole rounds of a virtual
    pipeline."""
    layout = config.parallel
    count = -(-config.data.validation_rows // (config.micro_batch_size * layout.data_parallel_size))
    unit = layout.pipeline_model_parallel_size if layout.virtual_pipeline_model_parallel_size > 1 else 1
    return -(-count // unit) * unit


def held_out_batch(held_out: HeldOut, config: MidtrainConfig, number: int) -> Batch:
    """A micro-batch of held-out rows.

    Args:
        held_out: From `open_held_out`.
        config: Of the stage.
        number: Of the micro-batch, over all data-parallel ranks. Where the rows end, zeros that no loss counts follow,
            each row a document of its own.
    """
    size, rows, tokens = config.micro_batch_size, config.data.validation_rows, config.seq_length
    real = min(size, max(0, rows - number * size))
    if real == size:
        return held_out.batch(number * size, size)
    found = held_out.batch(number * size if real else 0, max(1, real))
    batch: Batch = {}
    for name in ("tokens", "labels", "loss_mask", "position_ids"):
        filled = found[name].new_zeros(size, tokens)
        if name == "position_ids":
            filled[:] = torch.arange(tokens)
        filled[:real] = found[name].view(-1, tokens)[:real]
        batch[name] = filled.view(1, -1) if "cu_seqlens" in found else filled
    batch["text_tokens"] = found["text_tokens"].new_zeros(size)
    batch["text_tokens"][:real] = found["text_tokens"][:real]
    if "cu_seqlens" in found:
        bounds = found["cu_seqlens"]
        empty = torch.arange(real, size + 1, dtype=bounds.dtype) * tokens
        batch["cu_seqlens"] = torch.cat([bounds[bounds < real * tokens], empty])
    return batch
