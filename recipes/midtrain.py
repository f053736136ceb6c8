"""Mid-training with the study's hyper-parameters (arXiv 2603.17074, table 16) on a checkpoint of your own.

prism-nemo midtrain recipes/midtrain.py checkpoint=CKPT data=TOKENS run_dir=runs/mid model=granite-3.3-8b \
    hardware=h100x64
"""

from prism_nemo.config import MidtrainConfig
from prism_nemo.errors import InputError
from prism_nemo.models.catalog import find
from recipes.hardware import layout_values
from recipes.provenance import Values, fill, given, inferred, ours, study

STUDY_VALUES: Values = {
    "train_steps": study(25_000, "Table 16"),
    "micro_batch_size": study(1, "Table 16"),
    "optimizer.lr": study(5e-5, "Table 16"),
    "optimizer.weight_decay": study(0.1, "Table 16"),
    "optimizer.adam_beta1": study(0.9, "Table 16"),
    "optimizer.adam_beta2": study(0.95, "Table 16"),
    "optimizer.adam_eps": study(1e-10, "Table 16"),
    "optimizer.clip_grad": ours(1.0, "the study says nothing of clipping; the field's usual value"),
    "schedule.lr_warmup_steps": study(500, "Table 16"),
    "schedule.decay": study("cosine", "Table 16"),
    "schedule.min_lr_ratio": study(0.1, "Table 16"),
}
# Tokens of a step are the same at every context length (the study: "comparable tokens", Table 8).
TOKENS_PER_STEP = 128 * 8192
CONTEXTS = {"8192": "8k", "16384": "16k", "32768": "32k"}


def values(
    checkpoint: str, data: str, run_dir: str, hardware: str = "cpu", model: str = "", context: str = "8192"
) -> Values:
    """The recipe with where each value came from; see `midtrain`.

    Raises:
        InputError: For a context that the study did not train with, or that the model does not have.
    """
    if context not in CONTEXTS:
        raise InputError(f"context '{context}' is none of the study's; choose one of {', '.join(CONTEXTS)}")
    length = int(context)
    if model and find(model).context_length < length:
        raise InputError(f"context {length} is more than the {find(model).context_length} tokens of {model}")
    rows = inferred(128, "Table 16: 8-way sharding x 16 replicas, micro-batch 1, no accumulation")
    if length != 8192:
        rows = inferred(TOKENS_PER_STEP // length, "Table 8: comparable tokens, so as many in a step as at 8,192")
    return {
        "run_dir": given(run_dir),
        "init_from": given(checkpoint),
        "data.path": given(data),
        "seq_length": study(length, "Section 6" if length == 8192 else "Table 8"),
        "global_batch_size": rows,
        **STUDY_VALUES,
        **layout_values(hardware, model, CONTEXTS[context]),
    }


def midtrain(
    checkpoint: str, data: str, run_dir: str, hardware: str = "cpu", model: str = "", context: str = "8192"
) -> MidtrainConfig:
    """The study's recipe: 25,000 steps of 1,048,576 tokens, 26.2B tokens in all.

    Args:
        checkpoint: Native checkpoint to start from.
        data: Folder written by ``prism-nemo data build``.
        run_dir: Directory of the run.
        hardware: Name in `recipes.hardware`.
        model: Name in the catalog, for a layout of its own; empty for one that fits all.
        context: Tokens of a row: 8192, 16384 or 32768; the rows of a step follow.
    """
    return fill(MidtrainConfig, values(checkpoint, data, run_dir, hardware, model, context))
