"""The pocket-size setting. Choices were made on validation questions; the test questions are only ever reported on.

The study's proportions are kept where they make sense at this size (replay of general text in mid-training, prompts
only from domains that were mid-trained, linear decay in RL); sizes, learning rates and steps are ours, chosen so that
learning is visible in ten minutes on two cores. 24 prompts of 8 responses taught more than 12 of 16 in the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from prism_nemo.config import (
    CheckpointConfig,
    DataConfig,
    GRPOConfig,
    MidtrainConfig,
    OptimizerConfig,
    ParallelConfig,
    RLConfig,
    RolloutConfig,
    ScheduleConfig,
)

TASKS = ["arithmetic", "lists", "formulas"]
GENERAL_SHARE = 0.15  # retention: general text replayed during mid-training


@dataclass(frozen=True)
class PocketSettings:
    """Sizes and budgets of the quickstart."""

    seed: int = 1234
    processes: int = 2
    vocab_size: int = 1024
    seq_length: int = 128
    global_batch_size: int = 8
    base_steps: int = 1000
    midtrain_steps: int = 800
    rl_steps: int = 150
    prompts_per_step: int = 24
    group_size: int = 8
    max_new_tokens: int = 40
    documents_per_task: int = 12000
    general_chars: int = 2_600_000
    base_lr: float = 3e-3
    midtrain_lr: float = 2e-3
    longer_lr: float = 1e-3
    rl_lr: float = 2e-4
    rl_decay: str = "linear"
    rl_adam_beta2: float = 0.99
    questions: int = 800
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "mlp_bias": False,
        }
    )

    def parallel(self) -> ParallelConfig:
        """The layout of the long stages: on two cores, data parallelism scales best for a model this small."""
        return ParallelConfig(data_parallel_size=self.processes)

    def _midtrain(self, run_dir: str, data: str, steps: int, lr: float, **more: Any) -> MidtrainConfig:
        return MidtrainConfig(
            run_dir=run_dir,
            data=DataConfig(path=data, validation_source="general-heldout", validation_rows=64),
            parallel=self.parallel(),
            optimizer=OptimizerConfig(lr=lr, weight_decay=0.1, adam_eps=1e-8),
            schedule=ScheduleConfig(lr_warmup_steps=30, min_lr_ratio=0.05),
            checkpoint=CheckpointConfig(
                save_interval=max(1, steps // 2), keep=1, async_save=False
            ),  # one save: no process for it
            train_steps=steps,
            seq_length=self.seq_length,
            micro_batch_size=self.global_batch_size // self.processes,
            global_batch_size=self.global_batch_size,
            eval_interval=max(1, steps // 8),
            log_interval=5,
            seed=self.seed,
            **more,
        )

    def base(self, run_dir: str, data: str, vocab_size: int) -> MidtrainConfig:
        """Train the base from random weights."""
        return self._midtrain(
            run_dir,
            data,
            self.base_steps,
            self.base_lr,
            model={**self.model, "vocab_size": vocab_size},
            init_method_std=self.model["hidden_size"] ** -0.5,
        )

    def midtrain(self, run_dir: str, data: str, base: str) -> MidtrainConfig:
        """Mid-train the base on general text, maths, code and science."""
        return self._midtrain(run_dir, data, self.midtrain_steps, self.midtrain_lr, init_from=base)

    def longer(self, run_dir: str, data: str, midtrained: str, steps: int) -> MidtrainConfig:
        """The control: more mid-training, as long as RL took."""
        config = self._midtrain(run_dir, data, steps, self.longer_lr, init_from=midtrained)
        config.seed += 1  # other batches than the first time
        return config

    def rl(self, run_dir: str, init_from: str, tokenizer: str) -> RLConfig:
        """RL from a checkpoint; the same for both starting points."""
        return RLConfig(
            run_dir=run_dir,
            init_from=init_from,
            tokenizer=tokenizer,
            tasks=list(TASKS),
            rollout=RolloutConfig(
                group_size=self.group_size,
                prompts_per_step=self.prompts_per_step,
                max_new_tokens=self.max_new_tokens,
            ),
            # No KL term: the reference's forward pass costs a sixth of a step, and retention is measured directly.
            grpo=GRPOConfig(kl_beta=0.0, normalize_advantage=False, aggregation="token"),
            parallel=self.parallel(),
            optimizer=OptimizerConfig(lr=self.rl_lr, weight_decay=0.0, adam_beta2=self.rl_adam_beta2, adam_eps=1e-8),
            schedule=ScheduleConfig(lr_warmup_steps=3, decay=self.rl_decay, min_lr_ratio=0.0),
            checkpoint=CheckpointConfig(
                save_interval=max(1, self.rl_steps // 2), keep=1, async_save=False
            ),  # one save: no process for it
            train_steps=self.rl_steps,
            micro_batch_size=32,
            seed=self.seed,
        )
