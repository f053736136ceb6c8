"""The study's evaluations (arXiv 2603.17074, section 5) of a checkpoint, with the settings of the suites."""

from prism_nemo.config import ParallelConfig
from prism_nemo.evaluation.settings import EvaluateConfig
from recipes.hardware import find_machine, layout_of
from recipes.provenance import Values, fill, given, ours

_REASONS = {
    "reasoning": "AIME24, AIME25, MATH500, LiveCodeBench, Codeforces, GPQA-Diamond, sampled as the study does",
    "retention": "the tasks of the study's LB-V1 and LB-V2",
    "longcontext": "8k to 128k, as the study's RULER columns; the questions are made here",
}


def values(model_path: str, out: str, suite: str = "reasoning", hardware: str = "cpu", model: str = "") -> Values:
    """The recipe with where each value came from; see `evaluate`."""
    layout = ParallelConfig(data_parallel_size=find_machine(hardware).processes)
    if find_machine(hardware).gpu is not None:
        layout = layout_of(hardware, model, "eval")
    return {
        "model": given(model_path),
        "out": given(out),
        "suite": given(suite, _REASONS.get(suite, "argument of the recipe")),
        "seed": ours(0, "the study names no seed"),
        # Tensor parallelism no further than one GPU needs: answers are written faster by more data parallelism.
        "parallel.tensor_model_parallel_size": ours(layout.tensor_model_parallel_size, f"{hardware}: weights, caches"),
        "parallel.data_parallel_size": ours(layout.data_parallel_size, f"{hardware}: what is left"),
    }


def evaluate(
    model_path: str, out: str, suite: str = "reasoning", hardware: str = "cpu", model: str = ""
) -> EvaluateConfig:
    """One suite on one model, test split.

    Args:
        model_path: Native checkpoint or Hugging Face folder.
        out: Folder of the result.
        suite: reasoning, retention, longcontext, pocket, or a file of questions.
        hardware: Name in `recipes.hardware`.
        model: Name in the catalog, for a layout of its own; empty for one that fits all.
    """
    return fill(EvaluateConfig, values(model_path, out, suite, hardware, model))
