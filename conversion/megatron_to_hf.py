"""Native checkpoint to Hugging Face folder.

python conversion/megatron_to_hf.py CKPT --out HF_DIR
torchrun --nproc-per-node 2 conversion/megatron_to_hf.py CKPT --out HF_DIR
"""

import sys

from prism_nemo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["export"]
    main()
