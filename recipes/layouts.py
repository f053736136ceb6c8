"""Which layout fits which size of model: rows that `prism_nemo.planning` was asked about, and is asked in the tests.

Each row was taken from the planner's ranking of all layouts of its machines: the fastest, or one that is predicted to
be at most a fifth slower and serves more machines. Speeds are predicted, not measured (docs/plan.md).
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_nemo.errors import InputError
from prism_nemo.models.catalog import find
from prism_nemo.planning.hardware import find_gpu

USES = {
    "8k": "mid-training on rows of 8,192 tokens",
    "16k": "mid-training on rows of 16,384 tokens",
    "32k": "mid-training on rows of 32,768 tokens",
    "long": "the long-context phase, rows of up to 131,072 tokens",
    "rl": "RL with responses of up to 16,384 tokens, beside a reference model and caches",
    "eval": "an evaluation: weights and caches only",
}
# Beside training memory, per GPU: the reference model's weights, and room in which rollouts keep their caches.
ROLLOUT_BYTES = 8e9


@dataclass(frozen=True)
class Row:
    """A layout for a size of model, a use and a range of GPUs; data parallelism is what is left.

    Attributes:
        use: Key of `USES`.
        size: "3b", "8b" or "24b": below 5, 10 and 30 billion parameters.
        least: GPUs from which.
        most: GPUs up to which.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        cp: Context-parallel size.
        recompute: Granularity.
        memory: GB that a GPU must have.
    """

    use: str
    size: str
    least: int
    most: int
    tp: int
    pp: int
    cp: int
    recompute: str = "none"
    memory: int = 80

    @property
    def why(self) -> str:
        """What the layout was chosen for."""
        return f"{self.size} on {self.least} to {self.most} GPUs of {self.memory} GB or more, {self.use}"


# The first row that fits is taken: those for larger memories stand first.
ROWS = (
    Row("8k", "24b", 8, 8, 4, 1, 1, memory=141),
    Row("16k", "24b", 8, 8, 4, 1, 2, memory=141),
    Row("32k", "24b", 8, 8, 8, 1, 1, memory=141),
    Row("rl", "24b", 8, 8, 4, 2, 1, memory=141),
    Row("8k", "3b", 8, 128, 2, 1, 1),
    Row("8k", "8b", 8, 32, 2, 1, 1),
    Row("8k", "8b", 64, 128, 4, 1, 1),
    Row("8k", "24b", 8, 8, 8, 1, 1),
    Row("8k", "24b", 16, 128, 4, 2, 1),
    Row("16k", "3b", 8, 128, 2, 1, 2),
    Row("16k", "8b", 8, 128, 4, 1, 1),
    Row("16k", "24b", 8, 8, 4, 2, 1, "full"),
    Row("16k", "24b", 16, 128, 4, 2, 2),
    Row("32k", "3b", 8, 128, 4, 1, 2),
    Row("32k", "8b", 8, 128, 4, 1, 2),
    Row("32k", "24b", 8, 8, 4, 2, 1, "full"),
    Row("32k", "24b", 16, 128, 8, 1, 2),
    # A step has 36 rows (Table 17), so data parallelism must divide 36; the study recomputes here.
    Row("long", "3b", 8, 32, 2, 1, 4, "full"),
    Row("long", "3b", 64, 64, 2, 2, 4, "full"),
    Row("long", "3b", 128, 128, 4, 4, 2, "full"),
    Row("long", "3b", 144, 144, 1, 1, 4, "full"),
    Row("long", "8b", 8, 8, 2, 1, 4, "full"),
    Row("long", "8b", 16, 64, 4, 1, 4, "full"),
    Row("long", "8b", 128, 128, 8, 1, 4, "full"),
    Row("long", "8b", 144, 144, 4, 1, 4, "full"),
    Row("long", "24b", 8, 8, 4, 2, 1, "full"),
    Row("long", "24b", 16, 64, 4, 1, 4, "full"),
    Row("long", "24b", 128, 128, 8, 1, 4, "full"),
    Row("long", "24b", 144, 144, 4, 1, 4, "full"),
    # Prompts of a step (64) are shared out over data parallelism; RL has neither context nor virtual parallelism.
    Row("rl", "3b", 8, 128, 4, 1, 1),
    Row("rl", "8b", 8, 128, 4, 1, 1),
    Row("rl", "24b", 8, 8, 8, 1, 1, "full"),
    Row("rl", "24b", 16, 128, 8, 2, 1),
    Row("eval", "3b", 8, 144, 1, 1, 1),
    Row("eval", "8b", 8, 144, 2, 1, 1),
    Row("eval", "24b", 8, 144, 4, 1, 1),
)
_SIZES = (("3b", 5e9), ("8b", 10e9), ("24b", 30e9))


def size_of(model: str) -> str:
    """Size class of a model of the catalog; the largest for no name, whose layouts fit all others.

    Raises:
        InputError: For a name that the catalog does not have.
    """
    parameters = find(model).parameters if model else _SIZES[-1][1] - 1
    return next(name for name, limit in _SIZES if parameters < limit)


def find_row(gpu: str, gpus: int, model: str, use: str) -> Row:
    """The row for a model on so many GPUs of a type.

    Raises:
        InputError: If there is none; names the numbers of GPUs that have one.
    """
    size, memory = size_of(model), find_gpu(gpu).memory_bytes / 1e9
    of_size = [row for row in ROWS if (row.use, row.size) == (use, size) and row.memory <= memory]
    for row in of_size:
        if row.least <= gpus <= row.most:
            return row
    ranges = ", ".join(f"{row.least} to {row.most}" for row in of_size)
    raise InputError(
        f"hardware: no layout of {model or 'a model of any size'} on {gpus} GPUs for {USES[use]}; there are some for "
        f"{ranges} GPUs, or set parallel.* yourself after asking prism-nemo plan"
    )
