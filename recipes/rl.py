"""RL with verifiable rewards, with the study's hyper-parameters (arXiv 2603.17074, table 21).

prism-nemo rl recipes/rl.py checkpoint=CKPT tokenizer=DIR run_dir=runs/rl tasks=[arithmetic]
"""

from prism_nemo.config import RLConfig


def rl(checkpoint: str, tokenizer: str, run_dir: str) -> RLConfig:
    """GRPO with 64 prompts x 16 responses, 1000 steps at 5e-7, KL 0.05: the defaults of `RLConfig`."""
    return RLConfig(run_dir=run_dir, init_from=checkpoint, tokenizer=tokenizer)
