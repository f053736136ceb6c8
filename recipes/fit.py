"""Whether a stage of a recipe fits its machine, asked of `prism_nemo.planning` before anything is queued."""

from __future__ import annotations

from dataclasses import replace

from prism_nemo.config import MidtrainConfig, RLConfig
from prism_nemo.errors import InputError
from prism_nemo.evaluation.settings import EvaluateConfig
from prism_nemo.models.catalog import find
from prism_nemo.planning.activations import Kernels
from prism_nemo.planning.hardware import assumptions, find_gpu
from prism_nemo.planning.layouts import Candidate, evaluate
from prism_nemo.planning.memory import Workload
from recipes.hardware import find_machine
from recipes.layouts import ROLLOUT_BYTES

_BF16 = 2


def predict(config: MidtrainConfig | RLConfig, model: str, hardware: str) -> Candidate:
    """What is predicted of a training stage on a machine with GPUs.

    Of RL only the update is predicted: the longest responses that there can be, one after another, with the reference
    model's weights and room for the rollouts' caches beside it.
    """
    machine, a = find_machine(hardware), find(model).architecture
    gpu, assumed, layout = find_gpu(str(machine.gpu)), assumptions(), config.parallel
    assumed = replace(assumed, gpus_per_node=machine.per_node)
    if isinstance(config, RLConfig):
        length = min(a.max_position_embeddings, 16_384)
        rows = config.rollout.prompts_per_step * config.rollout.group_size
        shares = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
        beside = _BF16 * find(model).parameters / shares + ROLLOUT_BYTES
        assumed = replace(assumed, reserved_bytes=assumed.reserved_bytes + beside)
    else:
        length, rows = config.seq_length, config.global_batch_size
    work = Workload(
        length,
        config.micro_batch_size,
        rows,
        config.recompute.granularity,
        distributed_optimizer=config.use_distributed_optimizer,
    )
    return evaluate(a, layout, work, gpu, assumed, Kernels.on_gpu(a, None))


def check_fit(config: MidtrainConfig | RLConfig | EvaluateConfig, model: str, hardware: str) -> None:
    """Refuse a stage that its machine cannot run.

    Raises:
        InputError: With the arithmetic of what does not fit, or the size that does not divide.
    """
    machine = find_machine(hardware)
    if config.parallel.world_size != machine.processes:
        raise InputError(
            f"{model} on {hardware}: the layout {config.parallel.describe()} needs {config.parallel.world_size} "
            f"processes, but there are {machine.processes}"
        )
    if machine.gpu is None:
        return
    if isinstance(config, EvaluateConfig):
        weights = _BF16 * find(model).parameters / config.parallel.tensor_model_parallel_size
        memory = find_gpu(machine.gpu).memory_bytes
        if weights + assumptions().reserved_bytes + ROLLOUT_BYTES > memory:
            raise InputError(f"{model} on {hardware}: weights of {weights / 1e9:.0f} GB leave no room for caches")
        return
    if isinstance(config, RLConfig) and config.rollout.prompts_per_step % config.parallel.data_parallel_size:
        raise InputError(
            f"{model} on {hardware}: rollout.prompts_per_step {config.rollout.prompts_per_step} is not a multiple of "
            f"data_parallel_size {config.parallel.data_parallel_size}"
        )
    found = predict(config, model, hardware)
    if found.refusal is not None:
        raise InputError(f"{model} as {found.describe()} on {hardware}: {found.refusal}")
