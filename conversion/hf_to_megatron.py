"""Hugging Face folder to native checkpoint: ``python conversion/hf_to_megatron.py HF_DIR --out CKPT``."""

import sys

from prism_nemo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["import"]
    main()
