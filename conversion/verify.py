"""Compare weights and forward both models.

python conversion/verify.py HF_DIR CKPT
torchrun --nproc-per-node 2 conversion/verify.py HF_DIR CKPT --tp 2
"""

import sys

from prism_nemo.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["verify"]
    main()
