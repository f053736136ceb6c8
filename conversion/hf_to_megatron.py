"""Hugging Face folder to native checkpoint.

python conversion/hf_to_megatron.py HF_DIR --out CKPT
torchrun --nproc-per-node 2 conversion/hf_to_megatron.py HF_DIR --out CKPT --tp 2
"""

import sys

from prism_nemo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["import"]
    main()
