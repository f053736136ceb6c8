r"""Mid-training with the study's hyper-parameters (arXiv 2603.17074, table 16).

prism-nemo midtrain recipes/midtrain.py checkpoint=CKPT data=TOKENS run_dir=runs/mid model=granite-3.3-8b \
    hardware=h100x64
prism-nemo midtrain recipes/midtrain.py model=granite-3.3-8b mixture=mcs root=study hardware=h100x64
"""

from pathlib import Path

from prism_nemo.config import MidtrainConfig
from prism_nemo.errors import InputError
from prism_nemo.models.catalog import find
from recipes.folders import Folders
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
MIXTURES = ("math", "mc", "mcs")


def values(
    checkpoint: str | None = None,
    data: str | None = None,
    run_dir: str | None = None,
    hardware: str = "cpu",
    model: str = "",
    context: str = "8192",
    mixture: str = "",
    root: str = "study",
) -> Values:
    """The recipe with where each value came from; see `midtrain`.

    Raises:
        InputError: For a context that the study did not train with, or that the model does not have; for a model or
            mixture that is unknown; where a folder is neither given nor follows from model and mixture.
    """
    if context not in CONTEXTS:
        raise InputError(f"context '{context}' is none of the study's; choose one of {', '.join(CONTEXTS)}")
    if mixture and mixture not in MIXTURES:
        raise InputError(f"mixture '{mixture}' is unknown; choose one of {', '.join(MIXTURES)}, or give data=FOLDER")
    length = int(context)
    if model and find(model).context_length < length:
        raise InputError(f"context {length} is more than the {find(model).context_length} tokens of {model}")
    rows = inferred(128, "Table 16: 8-way sharding x 16 replicas, micro-batch 1, no accumulation")
    if length != 8192:
        rows = inferred(TOKENS_PER_STEP // length, "Table 8: comparable tokens, so as many in a step as at 8,192")
    folders, missing = Folders(Path(root)), []
    name = f"{model}-{mixture}" + ("" if context == "8192" else f"-{CONTEXTS[context]}")
    places = {
        "checkpoint": (checkpoint, folders.checkpoint(model) if model else None),
        "data": (data, folders.data(model, mixture) if model and mixture else None),
        "run_dir": (run_dir, folders.run(name) if model and mixture else None),
    }
    found = {}
    for key, (chosen, usual) in places.items():
        if chosen is None and usual is None:
            missing.append(f"{key}=...")
        found[key] = given(chosen) if chosen is not None else ours(usual, "below root: see recipes/folders.py")
    if missing:
        raise InputError(
            f"midtrain() needs {', '.join(missing)}; or model=NAME mixture=NAME and files below root=FOLDER"
        )
    return {
        "run_dir": found["run_dir"],
        "init_from": found["checkpoint"],
        "data.path": found["data"],
        "seq_length": study(length, "Section 6" if length == 8192 else "Table 8"),
        "global_batch_size": rows,
        **STUDY_VALUES,
        **layout_values(hardware, model, CONTEXTS[context]),
    }


def midtrain(
    checkpoint: str | None = None,
    data: str | None = None,
    run_dir: str | None = None,
    hardware: str = "cpu",
    model: str = "",
    context: str = "8192",
    mixture: str = "",
    root: str = "study",
) -> MidtrainConfig:
    """The study's recipe: 25,000 steps of 1,048,576 tokens, 26.2B tokens in all.

    Args:
        checkpoint: Native checkpoint to start from; ``ROOT/checkpoints/MODEL`` if not given.
        data: Folder written by ``prism-nemo data build``; ``ROOT/data/MODEL/MIXTURE`` if not given.
        run_dir: Directory of the run; ``ROOT/runs/MODEL-MIXTURE`` if not given.
        hardware: Name in `recipes.hardware`.
        model: Name in the catalog, for a layout of its own; empty for one that fits all.
        context: Tokens of a row: 8192, 16384 or 32768; the rows of a step follow.
        mixture: math, mc or mcs; for the folders only, since ``data`` holds the tokens.
        root: Folder of everything that is not given.
    """
    return fill(MidtrainConfig, values(checkpoint, data, run_dir, hardware, model, context, mixture, root))
