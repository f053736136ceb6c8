"""Mid-training with the study's hyper-parameters (arXiv 2603.17074, table 16) on a checkpoint of your own.

prism-nemo midtrain recipes/midtrain.py checkpoint=CKPT data=TOKENS run_dir=runs/mid hardware=h100x64
"""

from prism_nemo.config import DataConfig, MidtrainConfig, OptimizerConfig, ParallelConfig, ScheduleConfig
from prism_nemo.errors import InputError

# GPUs and how a model of 8B to 24B is laid out on them. The study does not state its layout; these are ours.
HARDWARE = {
    "cpu": ParallelConfig(),
    "cpu2": ParallelConfig(data_parallel_size=2),
    "h100x8": ParallelConfig(tensor_model_parallel_size=4, data_parallel_size=2, sequence_parallel=True),
    "h100x64": ParallelConfig(
        tensor_model_parallel_size=4, pipeline_model_parallel_size=2, data_parallel_size=8, sequence_parallel=True
    ),
}


def midtrain(checkpoint: str, data: str, run_dir: str, hardware: str = "cpu") -> MidtrainConfig:
    """The study's recipe: 25,000 steps of 128 sequences of 8,192 tokens, 26.2B tokens in all."""
    if hardware not in HARDWARE:
        raise InputError(f"hardware '{hardware}' is unknown; choose one of {', '.join(HARDWARE)}")
    return MidtrainConfig(
        run_dir=run_dir,
        init_from=checkpoint,
        data=DataConfig(path=data),
        parallel=HARDWARE[hardware],
        optimizer=OptimizerConfig(lr=5e-5, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, adam_eps=1e-10),
        schedule=ScheduleConfig(lr_warmup_steps=500, decay="cosine", min_lr_ratio=0.1),
        train_steps=25_000,
        seq_length=8192,
        micro_batch_size=1,
        global_batch_size=128,
    )
