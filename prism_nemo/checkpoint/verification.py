"""Whether a checkpoint and a Hugging Face folder are the same weights and the same function."""

from __future__ import annotations

import gc
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prism_nemo.checkpoint.convert import run
from prism_nemo.checkpoint.distcp_reader import CheckpointReader
from prism_nemo.checkpoint.exporting import CheckpointTensors
from prism_nemo.checkpoint.hf import HFReader
from prism_nemo.checkpoint.importing import on_main, together
from prism_nemo.checkpoint.native import load, read_architecture
from prism_nemo.checkpoint.safetensors_file import as_bytes
from prism_nemo.config import ParallelConfig
from prism_nemo.errors import InputError, PrismError
from prism_nemo.models.family import Architecture, read_hf_config
from prism_nemo.runtime import Runtime, start, stop

# The root mean square of the differences may be this much of the logits' standard deviation. Two right implementations
# in fp32 differ by rounding only: transformers' sdpa and eager attention differ from each other, and its fp32 from its
# own fp64, by 8e-7 to 3e-6 of it (Llama of 4 to 32 layers, standard deviation 1.1 to 1.4); a wrong mapping, scalar or
# mask shows at 1e-3 and above. The largest of N differences is another matter: of N draws from a normal distribution
# it is near sqrt(2 ln N) times the root mean square, 4.6 times for 40 thousand logits. So a bound of 1e-5 on it would
# refuse transformers against itself (seen: up to 3e-5), and it gets that factor. It is checked as well because a mean
# over all logits does not see one wrong row of the vocabulary.
RELATIVE_TOLERANCE = 1e-5
DT_WARNING = (
    "transformers floors the step size of Mamba mixers at time_step_min, which training did not do; its mixers were "
    "set to the checkpoint's limits {limit} before comparing. Plain transformers scores this model a little differently"
)


@dataclass(frozen=True)
class Verification:
    """Result of comparing weights and of forwarding both models on the same tokens.

    Attributes:
        max_abs_logit_diff: Largest difference of any logit.
        tolerance: What it may be.
        rms_logit_diff: Root mean square of the differences.
        rms_tolerance: What it may be.
        logit_std: Standard deviation of the reference's logits.
        argmax_agreement: Share of positions with the same most likely token.
        tokens: Positions compared.
        tensors: Hugging Face tensors compared, every bit.
        different_tensors: Those that differ.
        cast: Type conversions after which tensors were compared, if any, such as "float32 to bfloat16".
        notes: What was done to the reference before comparing, and what else a reader must know.
        device: Kind of device that the models ran on.
    """

    max_abs_logit_diff: float
    tolerance: float
    rms_logit_diff: float
    rms_tolerance: float
    logit_std: float
    argmax_agreement: float
    tokens: int
    tensors: int = 0
    different_tensors: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"

    @property
    def same_function(self) -> bool:
        """Whether the logits agree within both tolerances."""
        return self.max_abs_logit_diff <= self.tolerance and self.rms_logit_diff <= self.rms_tolerance

    @property
    def passed(self) -> bool:
        """Whether no tensor differs and the logits agree."""
        return not self.different_tensors and self.same_function

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "passed": self.passed}


def verify(
    hf_dir: Path, checkpoint: Path, parallel: ParallelConfig, batch: int = 2, length: int = 64, seed: int = 0
) -> Verification:
    """Compare every weight bit for bit, then forward both models on the same random tokens, in fp32.

    Neither step holds both models in memory: weights are compared block by block, and the Hugging Face model is gone
    before the Megatron model is built.

    Args:
        hf_dir: Hugging Face folder.
        checkpoint: Native checkpoint.
        parallel: Layout in which the Megatron model is loaded.
        batch: Sequences.
        length: Tokens per sequence.
        seed: Of the tokens.

    Raises:
        InputError: For a folder, checkpoint or layout that cannot be used.
    """
    theirs, architecture = read_hf_config(hf_dir), read_architecture(checkpoint)
    HFReader(hf_dir).check(theirs)
    for name in ("family", "vocab_size", "num_layers"):
        if getattr(theirs, name) != getattr(architecture, name):
            raise InputError(
                f"{name} is {getattr(theirs, name)} in {hf_dir} but {getattr(architecture, name)} in {checkpoint}: "
                "not the same model"
            )
    architecture.check_layout(parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size)
    result = run(_worker, str(hf_dir), str(checkpoint), architecture, batch, length, seed, parallel)
    if not isinstance(result, Verification):
        raise PrismError("verification produced no result")
    return result


def _worker(
    hf_dir: str,
    checkpoint: str,
    architecture: Architecture,
    batch: int,
    length: int,
    seed: int,
    parallel: ParallelConfig,
) -> Verification:
    from prism_nemo.models.build import build_model
    from prism_nemo.models.forward import forward_logits

    # The whole model first, described only: rank 0 reads both sides, the others wait.
    everyone = ParallelConfig(data_parallel_size=parallel.world_size)
    runtime = start(everyone, seed=0, dtype=torch.float32)
    different, cast, count = together(lambda: compare_weights(hf_dir, checkpoint, architecture, runtime))[0]
    runtime = start(parallel, seed=0, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, architecture.vocab_size, (batch, length), generator=generator).to(runtime.device)
    reference = on_main(lambda: reference_logits(hf_dir, architecture, tokens))
    model = build_model(architecture, runtime, seq_length=length)
    load(Path(checkpoint), model)
    ours = forward_logits(model, tokens)
    result = None
    if ours is not None:
        theirs, notes = reference
        result = compare_logits(
            ours[..., : architecture.vocab_size].cpu(),
            theirs,
            tensors=count,
            different_tensors=different,
            cast=cast,
            notes=notes,
            device=runtime.device.type,
        )
    results: list[Verification | None] = [None] * runtime.world_size
    dist.all_gather_object(results, result)  # the ranks of the last stage have one
    stop()
    return next(r for r in results if r is not None)


def compare_weights(
    hf_dir: str, checkpoint: str, architecture: Architecture, runtime: Runtime
) -> tuple[list[str], list[str], int]:
    """Every Hugging Face tensor against the checkpoint's, bit for bit, with a few blocks in memory.

    Where the types differ (a checkpoint that was trained in another one), the folder's numbers are converted to the
    checkpoint's type first, which is said in the result.

    Returns:
        Names of tensors that differ, conversions made, and how many tensors were compared; on rank 0.
    """
    if not runtime.is_main:
        return [], [], 0
    reader = HFReader(Path(hf_dir))
    different: list[str] = []
    cast: set[str] = set()
    with CheckpointReader(Path(checkpoint)) as stored:
        tensors = CheckpointTensors(stored, architecture, runtime, reader.tied_head(architecture))
        for name in tensors.shapes:
            theirs, ours = reader.dtype(name), tensors.dtype(name)
            if theirs != ours:
                cast.add(f"{str(theirs)[6:]} to {str(ours)[6:]}")
            row = 0
            for block in tensors.blocks(name):
                other = torch.empty(block.shape, dtype=theirs)
                reader.read(name, row, other)
                row += len(block)
                if not (as_bytes(block) == as_bytes(other.to(ours))).all():
                    different.append(name)
                    break
    return different, sorted(cast), len(tensors.shapes)


def reference_logits(hf_dir: str, architecture: Architecture, tokens: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Logits [b, s, vocab] of transformers' model in fp32, and notes; the model is gone when this returns."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # it warns that its Mamba kernels are not installed, which is no fault
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
        hf_dir, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, use_safetensors=True
    )
    notes = set_dt_limits(model, architecture)
    with torch.no_grad():
        logits = model.to(tokens.device).eval()(input_ids=tokens, use_cache=False).logits.float().cpu()
    del model
    gc.collect()
    return logits, notes


def set_dt_limits(model: torch.nn.Module, architecture: Architecture) -> list[str]:
    """Give transformers' Mamba mixers the checkpoint's step-size limits; a note if that changed anything."""
    if architecture.mamba is None:
        return []
    limit = architecture.mamba.dt_limit
    changed = False
    for module in model.modules():
        if hasattr(module, "time_step_limit") and hasattr(module, "A_log"):
            changed |= tuple(module.time_step_limit) != tuple(limit)  # type: ignore[arg-type]
            module.time_step_limit = limit  # type: ignore[assignment]
    return [DT_WARNING.format(limit=limit)] if changed else []


def compare_logits(ours: torch.Tensor, theirs: torch.Tensor, **more: Any) -> Verification:
    """Differences of two [b, s, vocab] logit tensors, with the tolerances that apply to them."""
    difference = ours - theirs
    largest, rms = difference.abs().max().item(), difference.square().mean().sqrt().item()
    std = theirs.std().item()
    return Verification(
        max_abs_logit_diff=largest if math.isfinite(largest) else math.inf,
        tolerance=RELATIVE_TOLERANCE * std * math.sqrt(2 * math.log(max(2, theirs.numel()))),
        rms_logit_diff=rms if math.isfinite(rms) else math.inf,
        rms_tolerance=RELATIVE_TOLERANCE * std,
        logit_std=std,
        argmax_agreement=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        tokens=ours.shape[0] * ours.shape[1],
        **more,
    )
