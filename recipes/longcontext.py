"""The long-context phase after mid-training (arXiv 2603.17074, tables 7, 17, 18), all parameters trained.

prism-nemo midtrain recipes/longcontext.py checkpoint=CKPT data=TOKENS run_dir=runs/long model=granite-3.3-8b \
    hardware=h100x144

The study also trains the attention layers alone; this project has no way to keep the others still.
"""

from prism_nemo.config import MidtrainConfig
from prism_nemo.errors import InputError
from prism_nemo.models.catalog import find
from recipes.hardware import layout_values
from recipes.provenance import Values, fill, given, inferred, ours, study

LENGTH = 131_072
LEAST = 32_768

STUDY_VALUES: Values = {
    "train_steps": study(1000, "Table 17"),
    "micro_batch_size": study(1, "Table 17"),
    "global_batch_size": inferred(36, "Table 17: 4-way sharding x 9 replicas, micro-batch 1"),
    "optimizer.lr": study(5e-5, "Table 17"),
    "optimizer.weight_decay": study(0.1, "Table 17"),
    "optimizer.adam_beta1": study(0.9, "Table 17"),
    "optimizer.adam_beta2": study(0.95, "Table 17"),
    "optimizer.adam_eps": study(1e-10, "Table 17"),
    "optimizer.clip_grad": ours(1.0, "the study says nothing of clipping; the field's usual value"),
    "schedule.lr_warmup_steps": study(100, "Table 17"),
    "schedule.decay": ours("linear", "Table 17 has exponential decay to 0 and no rate; linear reaches 0 as well"),
    "schedule.min_lr_ratio": study(0.0, "Table 17"),
    "data.packing": study("best_fit", "Table 17: best-fit decreasing"),
}


def values(checkpoint: str, data: str, run_dir: str, model: str, hardware: str = "h100x144") -> Values:
    """The recipe with where each value came from; see `longcontext`.

    Raises:
        InputError: For a model with nothing to restore.
    """
    longest = find(model).context_length
    if longest < LEAST:
        raise InputError(f"{model} reads {longest} tokens: there is no long context to restore (at least {LEAST})")
    length = inferred(LENGTH, "Table 7 measures up to 128k; the length trained at is not stated")
    if longest < LENGTH:
        length = ours(longest, f"the longest that {model} reads")
    return {
        "run_dir": given(run_dir),
        "init_from": given(checkpoint),
        "data.path": given(data),
        "seq_length": length,
        **STUDY_VALUES,
        **layout_values(hardware, model, "long"),
    }


def longcontext(checkpoint: str, data: str, run_dir: str, model: str, hardware: str = "h100x144") -> MidtrainConfig:
    """1,000 steps of 36 rows of 131,072 tokens, 4.7B tokens in all.

    Args:
        checkpoint: Native checkpoint, mid-trained or merged with its base (Table 7: 15 % base).
        data: Folder written by ``prism-nemo data build recipes/mixtures/long-context.yaml``.
        run_dir: Directory of the run.
        model: Name in the catalog, which decides the length and the layout.
        hardware: Name in `recipes.hardware`.
    """
    return fill(MidtrainConfig, values(checkpoint, data, run_dir, model, hardware))


# `prism-nemo midtrain` calls the function of its own name.
midtrain = longcontext
