"""Mid-training with the study's hyper-parameters (arXiv 2603.17074, table 16) on a checkpoint of your own.

prism-nemo midtrain recipes/midtrain.py checkpoint=CKPT data=TOKENS run_dir=runs/mid hardware=h100x64
"""

from prism_nemo.config import DataConfig, MidtrainConfig, OptimizerConfig, ScheduleConfig
from recipes.hardware import layout_of


def midtrain(checkpoint: str, data: str, run_dir: str, hardware: str = "cpu") -> MidtrainConfig:
    """The study's recipe: 25,000 steps of 128 sequences of 8,192 tokens, 26.2B tokens in all."""
    return MidtrainConfig(
        run_dir=run_dir,
        init_from=checkpoint,
        data=DataConfig(path=data),
        parallel=layout_of(hardware),
        optimizer=OptimizerConfig(lr=5e-5, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-10),
        schedule=ScheduleConfig(lr_warmup_steps=500, decay="cosine", min_lr_ratio=0.1),
        train_steps=25_000,
        seq_length=8192,
        micro_batch_size=1,
        global_batch_size=128,
    )
