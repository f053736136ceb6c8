r"""RL with verifiable rewards, with the study's hyper-parameters (arXiv 2603.17074, table 21).

prism-nemo rl recipes/rl.py checkpoint=CKPT tokenizer=DIR run_dir=runs/rl hardware=h100x64 \
    'tasks=["prompts:math.jsonl"]'
"""

from prism_nemo.config import RLConfig
from recipes.hardware import layout_of


def rl(checkpoint: str, tokenizer: str, run_dir: str, hardware: str = "cpu") -> RLConfig:
    """GRPO with 64 prompts x 16 responses, 1000 steps at 5e-7, KL 0.05: the defaults of `RLConfig`."""
    return RLConfig(run_dir=run_dir, init_from=checkpoint, tokenizer=tokenizer, parallel=layout_of(hardware))
