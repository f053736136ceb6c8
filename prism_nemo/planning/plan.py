"""From a recipe to a plan: which model, which GPUs, what fits, how long it takes. Nothing it names need exist yet."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prism_nemo.checkpoint.native import read_architecture
from prism_nemo.config import MidtrainConfig, ParallelConfig, check_positive
from prism_nemo.errors import InputError
from prism_nemo.models.catalog import CATALOG, find
from prism_nemo.models.family import Architecture, architecture_from_hf, parameter_count, read_hf_config
from prism_nemo.models.recompute import check_recompute_of
from prism_nemo.planning.activations import Kernels
from prism_nemo.planning.flops import RECOMPUTE, flops_per_token
from prism_nemo.planning.hardware import GPU, Assumptions, assumptions, find_gpu
from prism_nemo.planning.layouts import Candidate, divisions, enumerate_layouts, evaluate
from prism_nemo.planning.memory import Workload
from prism_nemo.planning.rehearsal import Rehearsal, rehearse
from prism_nemo.precision.check import check_fp8_on, check_precision_values
from prism_nemo.recipe import argument_of, load_recipe

NOT_GIVEN = "(not given)"
SECONDS_PER_DAY = 86400

PROVENANCE = {
    "parameters, gradients, optimizer": "formula from the weight table; equal to what --rehearse counts",
    "activations, logits": "formula; checked to the byte on CPU runs and in rehearsals for torch's layers; "
    "for Transformer Engine's from what is known of them, not measured",
    "FP8": "copies of weights, rounded activations and their traffic: from what Transformer Engine is known to do; not "
    "measured, and not rehearsed: the rehearsal is in bf16",
    "communication, working": "formula, an estimate: CPU processes took 0 to 3 % more than all parts together, and 9 "
    "to 24 % more with the holes in their heap",
    "reserved": "assumption",
    "time": "roofline of the datasheet's peaks with assumed efficiencies; not measured on any GPU",
    "FLOPs": "exact formula, equal to torch's FlopCounterMode; rows of one document, masked pairs not counted",
}


@dataclass(frozen=True)
class Plan:
    """What is predicted of a recipe.

    Attributes:
        model: Its name.
        architecture: The model.
        parameters: Of the model.
        gpu: The GPU planned for.
        gpus: How many.
        assumed: What no datasheet says.
        kernels: That the model is built with on a GPU.
        work: Sequence length and batches.
        train_steps: Of the recipe.
        candidates: Every layout: first those that fit, the fastest first.
        own: The recipe's layout, where it is for this number of GPUs.
        own_layout: The recipe's layout in words.
        rehearsal: Of the recipe's layout, or of the fastest.
        rehearsed: Which one.
    """

    model: str
    architecture: Architecture
    parameters: int
    gpu: GPU
    gpus: int
    assumed: Assumptions
    kernels: Kernels
    work: Workload
    train_steps: int
    candidates: tuple[Candidate, ...]
    own: Candidate | None
    own_layout: str
    rehearsal: Rehearsal | None = None
    rehearsed: Candidate | None = None

    @property
    def fitting(self) -> list[Candidate]:
        """The layouts that fit, the fastest first, each with the mode of recomputation that is fastest in it."""
        best: dict[str, Candidate] = {}
        for candidate in self.candidates:
            if candidate.refusal is None:
                best.setdefault(candidate.layout.describe(), candidate)
        return list(best.values())

    @property
    def tokens_per_step(self) -> int:
        """Of all ranks."""
        return self.work.global_batch_size * self.work.seq_length

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return self.train_steps * self.tokens_per_step

    @property
    def flops_per_token(self) -> float:
        """The model's own, forward and backward."""
        return flops_per_token(self.architecture, self.work.seq_length)

    @property
    def refusal(self) -> str | None:
        """Why the run cannot be; None if it can."""
        if self.own is not None and self.own.refusal is not None:
            advice = self._advice()
            return (
                f"{self.model} as {self.own.describe()} on {self.gpus} x {self.gpu.name}: {self.own.refusal}; {advice}"
            )
        if self.own is None and not self.fitting:
            where = f"{self.model} on {self.gpus} x {self.gpu.name}"
            possible = [c for c in self.candidates if c.memory]
            if not possible:
                why = f"most often because {self._commonest()}"
                return f"{where}: no layout is possible, {why}; {self._other_numbers()}"
            nearest = min(possible, key=lambda c: c.memory.total if c.memory else 0)
            return f"{where}: no layout fits; {nearest.describe()} needs least: {nearest.refusal}"
        return None

    def _commonest(self) -> str:
        """Why most layouts cannot be, in the words of the first of them; the numbers differ from layout to layout."""
        reasons = [c.refusal.partition(";")[0] for c in self.candidates if c.refusal and c.recompute == "none"]
        kinds = Counter(re.sub(r"\d+", "N", reason) for reason in reasons)
        kind, count = kinds.most_common(1)[0]
        first = next(reason for reason in reasons if re.sub(r"\d+", "N", reason) == kind)
        return f"{first} ({count} of {len(reasons)} layouts)"

    def _other_numbers(self) -> str:
        """The next numbers of GPUs below and above that a layout fits on."""
        numbers = [range(self.gpus - 1, 0, -1), range(self.gpus + 1, 2 * self.gpus + 1)]
        found = [next((n for n in near if self._fits_on(n)), None) for near in numbers]
        words = " or ".join(str(n) for n in found if n is not None)
        return f"--gpus {words} would do" if words else "no number of GPUs up to twice as many would do"

    def _fits_on(self, gpus: int) -> bool:
        return any(
            evaluate(
                self.architecture, layout, replace(self.work, recompute=mode), self.gpu, self.assumed, self.kernels
            ).refusal
            is None
            for layout in divisions(gpus)
            for mode in RECOMPUTE
        )

    def _advice(self) -> str:
        names = [c.describe() for c in self.fitting[:3]]
        return f"these would fit: {'; '.join(names)}" if names else f"no layout of {self.gpus} GPUs would fit"

    def speed(self, candidate: Candidate) -> dict[str, float]:
        """Seconds of a step, tokens per second, MFU, days and GPU-hours of the whole run."""
        if candidate.time is None:
            return {}
        step = candidate.time.step
        rate = self.tokens_per_step / step
        seconds = self.train_steps * step
        return {
            "step_seconds": step,
            "tokens_per_second": rate,
            "tokens_per_second_per_gpu": rate / self.gpus,
            "mfu": self.flops_per_token * rate / (self.gpus * self.gpu.bf16_flops),
            "days": seconds / SECONDS_PER_DAY,
            "gpu_hours": seconds * self.gpus / 3600,
        }


def make_plan(
    recipe: Path,
    overrides: list[str],
    model: str | None = None,
    gpus: int | None = None,
    gpu: str = "h100",
    assume: list[str] | None = None,
    rehearsing: bool = False,
) -> Plan:
    """Read the recipe as ``midtrain`` does and predict.

    Args:
        recipe: A recipe or a resolved config.yaml.
        overrides: ``key=value``.
        model: A name of the catalog or a Hugging Face folder, in place of what the recipe trains; the recipe's own
            ``model=NAME`` if not given.
        gpus: How many; as many as the recipe's layout has if None.
        gpu: Their type.
        assume: ``key=value`` of `Assumptions`.
        rehearsing: Whether to build every rank.

    Raises:
        InputError: For anything in the recipe, the model or the flags that cannot be.
    """
    config = load_recipe(recipe, "midtrain", MidtrainConfig, overrides, not_given=NOT_GIVEN)
    check_positive(config, "train_steps", "seq_length", "micro_batch_size", "global_batch_size")
    check_positive(config.parallel, "tensor_model_parallel_size", "pipeline_model_parallel_size", "data_parallel_size")
    if model is None and recipe.suffix == ".py":
        named = argument_of(overrides, "model")  # a recipe's own argument is a name of the catalog
        model = named if named in CATALOG else None
    name, a = _model(model, config, recipe)
    if config.seq_length > a.max_position_embeddings:
        raise InputError(f"seq_length {config.seq_length} is more than the model's {a.max_position_embeddings}")
    device, assumed = find_gpu(gpu), assumptions(assume or ())
    precision, layout = config.precision, config.parallel
    _check_precision(config, a, device)
    kernels = Kernels.on_gpu(a, precision.fp8_recipe if precision.fp8 == "on" else None)
    outside = precision.fp8 == "on" and precision.first_last_layers_bf16
    work = Workload(
        config.seq_length,
        config.micro_batch_size,
        config.global_batch_size,
        _recompute(config, a),
        distributed_optimizer=config.use_distributed_optimizer,
        fp8_param_gather=precision.fp8_param_gather,
        bf16_at_start=precision.num_layers_at_start_in_bf16 if outside else 0,
        bf16_at_end=precision.num_layers_at_end_in_bf16 if outside else 0,
    )
    count = gpus or layout.world_size
    own = evaluate(a, layout, work, device, assumed, kernels) if layout.world_size == count else None
    plan = Plan(
        name,
        a,
        parameter_count(a),
        device,
        count,
        assumed,
        kernels,
        work,
        config.train_steps,
        tuple(enumerate_layouts(a, count, work, device, assumed, kernels)),
        own,
        layout.describe(),
    )
    return _rehearsed(plan) if rehearsing else plan


def _check_precision(config: MidtrainConfig, a: Architecture, gpu: GPU) -> None:
    """Refuse numbers that this GPU or model cannot compute in, or that nothing is predicted of.

    Raises:
        InputError: Naming the key and what works.
    """
    precision = config.precision
    if precision.dtype == "fp32":
        raise InputError("precision.dtype: fp32 on GPUs is not planned for; use bf16 (fp32 master weights are kept)")
    if precision.fp8 == "emulate":
        raise InputError(
            "precision.fp8: emulate measures what a recipe does to the loss and is slower than bf16 everywhere; plan "
            "with precision.fp8=on or off"
        )
    layout = config.parallel
    check_precision_values(precision, a, layout, config.use_distributed_optimizer, config.recompute)
    if precision.fp8 == "on":
        fits = a.fits_tensor_parallel(layout.tensor_model_parallel_size)
        check_fp8_on(precision, a, layout if fits else ParallelConfig(), gpu.capability)


def _recompute(config: MidtrainConfig, a: Architecture) -> str:
    """The recipe's mode of recomputation, if it is one whose memory is predicted.

    Raises:
        InputError: If it is another.
    """
    recompute = config.recompute
    check_recompute_of(recompute, a, ParallelConfig(), config.precision)
    planned = {"selective": recompute.modules == ["core_attn"]}
    planned["full"] = recompute.method == "uniform" and recompute.num_layers == 1
    if not planned.get(recompute.granularity, True):
        raise InputError(
            "recompute: memory and time are predicted of none, of selective with modules=[core_attn], and of full with "
            "method=uniform num_layers=1; midtrain runs the others as well"
        )
    return recompute.granularity


def _rehearsed(plan: Plan) -> Plan:
    chosen = plan.own if plan.own is not None and plan.own.memory is not None else next(iter(plan.fitting), None)
    if chosen is None:
        return plan
    work = plan.work
    counted = rehearse(
        plan.architecture,
        chosen.layout,
        work.seq_length,
        work.micro_batch_size,
        chosen.recompute,
        work.distributed_optimizer,
    )
    return replace(plan, rehearsal=counted, rehearsed=chosen)


def _model(given: str | None, config: MidtrainConfig, recipe: Path) -> tuple[str, Architecture]:
    if given is not None:
        folder = Path(given)
        if folder.is_dir():
            return folder.name, read_hf_config(folder)
        model = find(given)
        return model.name, model.architecture
    if config.model is not None:
        return "model of the recipe", architecture_from_hf(dict(config.model), f"{recipe}: model")
    if config.init_from in (None, NOT_GIVEN):
        raise InputError(
            f"{recipe}: which model? give --model NAME ({', '.join(CATALOG)}), --model HF_DIR, or the recipe's "
            "checkpoint"
        )
    return str(config.init_from), read_architecture(Path(str(config.init_from)))


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan in values that JSON has."""

    def one(candidate: Candidate) -> dict[str, Any]:
        return {
            "layout": candidate.layout.describe(),
            "parallel": vars(candidate.layout),
            "recompute": candidate.recompute,
            "fits": candidate.refusal is None,
            "refusal": candidate.refusal,
            "memory": candidate.memory and candidate.memory.to_dict(),
            "time": candidate.time and candidate.time.to_dict(),
            **plan.speed(candidate),
        }

    rehearsal = None
    if plan.rehearsal is not None and plan.rehearsed is not None:
        rehearsal = {"layout": plan.rehearsed.describe(), **plan.rehearsal.to_dict()}
    return {
        "model": plan.model,
        "parameters": plan.parameters,
        "gpu": vars(plan.gpu),
        "gpus": plan.gpus,
        "kernels": plan.kernels.name,
        "fp8_recipe": plan.kernels.fp8_recipe,
        "seq_length": plan.work.seq_length,
        "micro_batch_size": plan.work.micro_batch_size,
        "global_batch_size": plan.work.global_batch_size,
        "train_steps": plan.train_steps,
        "tokens": plan.tokens,
        "flops_per_token": plan.flops_per_token,
        "recipe_layout": plan.own_layout,
        "recipe": plan.own and one(plan.own),
        "layouts": [one(candidate) for candidate in plan.candidates],
        "refused": plan.refusal,
        "assumptions": plan.assumed.to_dict(),
        "obtained": PROVENANCE,
        "rehearsal": rehearsal,
    }
